"""How long a layer takes whose blocks are chosen while it runs, as a part of dense attention: by length and density."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmx_compile.config.prices import prices


@dataclass(frozen=True)
class DynamicTimes:
    """Measured times over those of dense attention by its fastest backend.

    Attributes:
        machine: the GPU.
        dtype: of the layer.
        times: for each length, block and ``kernel`` over lists, "triton" or "fa4": ``tokens``, ``block``, ``select`` by
            method and group, and ``attend`` by ``density``, ascending.

    >>> from tmx_compile.bench.dynamic_times import DynamicTimes
    >>> row = {"block": 64, "kernel": "triton", "select": {"pooled 16": 0.1}}
    >>> row |= {"density": [0.2, 0.6], "attend": [0.3, 0.7]}
    >>> times = DynamicTimes("a GPU", "bfloat16", ({"tokens": 1024, **row}, {"tokens": 4096, **row}))
    >>> round(times.of_dense(2048, "pooled", 16, 64, 0.4), 3), times.of_dense(512, "pooled", 16, 64, 0.4)
    (0.6, None)
    """

    machine: str
    dtype: str
    times: tuple[Mapping[str, Any], ...]

    @classmethod
    def measured(cls) -> DynamicTimes:
        """Those that this project measured (``config/prices.json``)."""
        found = prices()["dynamic"]
        return cls(found["machine"], found["dtype"], tuple(found["times"]))

    @property
    def lengths(self) -> tuple[int, int]:
        """The shortest and the longest prompt that was measured (tokens)."""
        every = [x["tokens"] for x in self.times]
        return min(every), max(every)

    def of_dense(
        self, tokens: int, method: str, group: int | None, block: int, density: float, kernel: str = "triton"
    ) -> float | None:
        """The time of selection and attention over that of dense attention; None: it is not known.

        Between lengths it is interpolated by their logarithm, between densities linearly; below the least density it is
        that of the least. Nothing is told of a length outside of those measured, or of another block or group.

        Args:
            tokens: length of the prompt.
            method: how blocks are chosen.
            group: tokens that the estimate takes together.
            block: their side (tokens).
            density: the share of blocks that is visited.
            kernel: what attends to the lists: "triton", or "fa4" where the extra is installed.
        """
        way = f"{method} {group}"
        rows = [x for x in self.times if (x["block"], x["kernel"]) == (block, kernel) and way in x["select"]]
        rows.sort(key=lambda x: int(x["tokens"]))
        if not rows or not rows[0]["tokens"] <= tokens <= rows[-1]["tokens"]:
            return None
        parts = [x["select"][way] + _line(x["density"], x["attend"], density) for x in rows]
        return _line([math.log(x["tokens"]) for x in rows], parts, math.log(tokens))


def _line(places: Sequence[float], values: Sequence[float], at: float) -> float:
    """A line through points of ascending places, level before the first and going on behind the last."""
    if at <= places[0]:
        return float(values[0])
    found = values[-1]
    for (a, low), (b, high) in itertools.pairwise(zip(places, values, strict=True)):
        found = low + (high - low) * (at - a) / (b - a)
        if at <= b:
            break
    return float(found)
