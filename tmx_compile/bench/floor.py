"""The least time that a machine needs for one attention call: a floor under every implementation.

It is the larger of two times: moving query, key, value and the result once, at the measured rate of a copy; and the
multiplications and additions of the attended pairs, at the rate that the dense kernel reaches.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from tmx_compile.bench.timing import timing_events
from tmx_compile.mask import Geometry, Grid, dense_section, pair_count, pair_counts

# Large against every cache, small against the memory of the device.
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Shape:
    """One attention problem: ``n`` rows and keys, ``dim`` for keys and values alike, ``element`` bytes a number."""

    n: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    element: int

    @property
    def bytes(self) -> int:
        """Query, key, value and the result."""
        return 2 * self.batch * (self.heads + self.kv_heads) * self.n * self.dim * self.element

    def flops(self, pairs: int) -> int:
        """Multiplications and additions of ``pairs`` (row, key) pairs of every head: the scores and the products."""
        return 4 * self.batch * self.heads * self.dim * pairs


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do in a second: bytes copied (read and written), and dense operations."""

    copy_bytes_per_s: float
    flops_per_s: float

    def floor(self, shape: Shape, geometry: Geometry) -> tuple[float, str]:
        """The floor in milliseconds, and which of the two times it is: "bytes" or "pairs"."""
        moved = shape.bytes / self.copy_bytes_per_s
        computed = shape.flops(attended_pairs(shape.n, geometry)) / self.flops_per_s
        return 1e3 * max(moved, computed), "bytes" if moved >= computed else "pairs"


def attended_pairs(n: int, geometry: Geometry) -> int:
    """Exactly how many (row, key) pairs of one head the triangle mask attends to."""
    return pair_counts(geometry, n, n)[0]


def causal_pairs(n: int) -> int:
    """Those of dense causal attention."""
    return pair_count(dense_section(), Grid(n, n))


def copy_rate(device: torch.device) -> float:
    """Bytes a second that copying a large tensor reads and writes: the best of ten copies."""
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(11):
        if device.type == "cuda":
            start, stop = timing_events()
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            taken = float(start.elapsed_time(stop)) / 1e3
        else:
            begin = time.perf_counter()
            target.copy_(source)
            taken = time.perf_counter() - begin
        best = min(best, taken)
    return 2 * source.numel() / best
