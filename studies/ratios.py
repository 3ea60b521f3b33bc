"""How sure a ratio of times is: of pairs, and of rounds of several runs each."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

Round = tuple[Sequence[float], Sequence[float]]
"""The times of one round, of both kinds."""


def of_pairs(ratios: Sequence[float]) -> dict[str, Any]:
    """The median of the ratios of pairs, and where it lies with 95% confidence, by order statistics; few: nothing.

    A pair is measured one behind the other, so what changes slowly is in both.
    """
    count, ordered = len(ratios), sorted(ratios)
    # The median is below the (left out + 1)th with the probability that at most so many of all are below the median.
    below = list(itertools.accumulate(math.comb(count, number) * 0.5**count for number in range(count)))
    left_out = sum(probability <= 0.025 for probability in below) - 1
    if left_out < 0:
        return {}
    interval = [ordered[left_out], ordered[count - 1 - left_out]]
    return {"pairs": {"median": statistics.median(ratios), "confidence_95": interval}}


def of_rounds(rounds: Sequence[Round], draws: int = 1000) -> dict[str, Any]:
    """The ratio of the medians of all runs, and where it lies with 95% confidence, by drawing rounds anew.

    The ratio of the lower quartiles is beside it: other work on the machine only makes a run longer.
    """
    generator = random.Random(0)
    found = {}
    for name, part in (("median", 0.5), ("quartile", 0.25)):

        def ratio(some: Sequence[Round], part: float = part) -> float:
            one, other = (sorted(itertools.chain.from_iterable(times)) for times in zip(*some, strict=True))
            return quantile(one, part) / quantile(other, part)

        drawn = sorted(ratio(generator.choices(rounds, k=len(rounds))) for _ in range(draws))
        ends = [quantile(drawn, 0.025), quantile(drawn, 0.975)]
        found |= {name: ratio(rounds), ("" if name == "median" else f"{name}_") + "confidence_95": ends}
    return {"ratio": found}


def quantile(ordered: Sequence[float], part: float) -> float:
    """Of numbers in order, the one below which a part of them lies; between two of them by their distance."""
    place = part * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)
