"""Bootstrapped confidence intervals of means over prompts."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tmx_compile.config import as_count


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval, of any unit.

    Attributes:
        mean: the mean.
        lower: the interval's lower end.
        upper: its upper end.

    >>> from tmx_compile.analysis import Interval
    >>> Interval(mean=0.1, lower=0.05, upper=0.2).as_list()
    [0.1, 0.05, 0.2]
    """

    mean: float
    lower: float
    upper: float

    def as_list(self) -> list[float]:
        """[mean, lower, upper], as result files keep it."""
        return [self.mean, self.lower, self.upper]


def interval(values: Sequence[float], *, exponent: bool = False, draws: int = 2000) -> Interval:
    """The mean of ``values`` with its 95% percentile bootstrap interval (Efron 1979); the same values, the same answer.

    Args:
        values: one for each prompt, of any unit; for a paired comparison, differences.
        exponent: the values are differences of log-likelihoods; the answer is the ratio of perplexities less 1.
        draws: resamples, at least 40.

    Raises:
        ValueError: no values, one that is not finite, or too few draws for the interval's ends.

    >>> from tmx_compile.analysis import interval
    >>> found = interval([0.1, 0.2, 0.3, 0.4])
    >>> found.lower < found.mean < found.upper, round(found.mean, 2)
    (True, 0.25)
    """
    draws = as_count("draws", draws, minimum=1)
    if draws < 40:
        raise ValueError(f"draws must be at least 40, got {draws}")
    values = list(values)
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite numbers and at least one, got {values}")
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    # 2.5% of the resamples lie beyond either end.
    out = draws // 40
    ends = statistics.fmean(values), means[out], means[draws - 1 - out]
    return Interval(*map(math.expm1, ends)) if exponent else Interval(*ends)
