"""A mask as blocks of rows and keys: what a tiled kernel skips, what it masks, what it computes unmasked.

For each block of rows the plan stores a few *runs* of consecutive key blocks, so it grows with the number
of row blocks, never with the number of pairs of blocks. It is exact, and follows from the intervals by two
observations.

1. Within a segment an interval is never empty and its ends move by 0 or 1 key per row. So what it covers over
   several rows is contiguous: from its low end on the first of them to its high end on the last.
2. A block is full if and only if the opposite mask does not touch it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch

from tmx_compile.mask.algebra import Grid, Mask, check_int
from tmx_compile.mask.intervals import row_intervals

MAX_DENSE_CELLS = 2**24


class BlockKind(IntEnum):
    """What a kernel has to do with a block of rows and keys."""

    SKIP = 0
    PARTIAL = 1
    FULL = 2


class BlockCounts(NamedTuple):
    """How many blocks there are of each kind."""

    skip: int
    partial: int
    full: int


class Runs(NamedTuple):
    """For each row block, ascending disjoint runs ``[start, stop)`` of key blocks, at least one block apart.

    Both tensors are int32 of shape (number of row blocks, R), with R at least 1 and no larger than some row
    block needs. Unused runs come last and are empty, with both ends equal to the number of key blocks.
    """

    start: torch.Tensor
    stop: torch.Tensor


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The blocks of a mask on a grid.

    Row block ``a`` holds rows ``a * q_block`` up to ``(a + 1) * q_block``, key block ``b`` likewise keys.
    Where the last blocks reach past the grid, only pairs in the grid count. ``touched`` blocks contain an
    attended pair; ``full`` blocks, which are among them, contain no other.
    """

    grid: Grid
    q_block: int
    kv_block: int
    touched: Runs
    full: Runs

    @property
    def num_q_blocks(self) -> int:
        """The number of row blocks, the first dimension of every run tensor."""
        return -(-self.grid.q_len // self.q_block)

    @property
    def num_kv_blocks(self) -> int:
        """The number of key blocks."""
        return -(-self.grid.kv_len // self.kv_block)

    @property
    def partial(self) -> Runs:
        """The blocks that a kernel must mask: touched, but not full."""
        skip = _complement(self.touched, self.num_kv_blocks)
        start, stop = torch.cat([skip.start, self.full.start], 1), torch.cat([skip.stop, self.full.stop], 1)
        return _complement(_union(start, stop, self.num_kv_blocks), self.num_kv_blocks)

    def kind(self, q_index: int, kv_index: int) -> BlockKind:
        """The kind of one block.

        Raises:
            ValueError: if there is no such block.
        """
        if not (0 <= q_index < self.num_q_blocks and 0 <= kv_index < self.num_kv_blocks):
            size = f"{self.num_q_blocks} by {self.num_kv_blocks}"
            raise ValueError(f"block ({q_index}, {kv_index}) is outside the plan of {size} blocks")
        inside = [
            bool(((runs.start[q_index] <= kv_index) & (kv_index < runs.stop[q_index])).any())
            for runs in (self.touched, self.full)
        ]
        return BlockKind(sum(inside))

    def counts(self) -> BlockCounts:
        """How many blocks of each kind the whole plan has."""
        touched, full = (int((runs.stop - runs.start).sum()) for runs in (self.touched, self.full))
        return BlockCounts(self.num_q_blocks * self.num_kv_blocks - touched, touched - full, full)

    def touched_pairs(self) -> int:
        """The (row, key) pairs of the grid in touched blocks, attended to or not: the work of a kernel."""
        start, stop = ((end.long() * self.kv_block).clamp(max=self.grid.kv_len) for end in self.touched)
        rows = (self.grid.q_len - torch.arange(0, self.grid.q_len, self.q_block)).clamp(max=self.q_block)
        return int((rows * (stop - start).sum(1)).sum())

    def to_dense(self) -> torch.Tensor:
        """Every block's :class:`BlockKind`, as an int8 tensor (number of row blocks, number of key blocks).

        Raises:
            ValueError: above 2**24 blocks; this reading is for looking at small plans.
        """
        cells = self.num_q_blocks * self.num_kv_blocks
        if cells > MAX_DENSE_CELLS:
            raise ValueError(f"a dense block plan is limited to {MAX_DENSE_CELLS} blocks, this one has {cells}")
        index = torch.arange(self.num_kv_blocks)
        kinds = torch.zeros(self.num_q_blocks, self.num_kv_blocks, dtype=torch.int8)
        for runs in (self.touched, self.full):
            for start, stop in zip(runs.start.unbind(1), runs.stop.unbind(1), strict=True):
                kinds += (start[:, None] <= index) & (index < stop[:, None])
        return kinds


def block_plan(mask: Mask, grid: Grid, q_block: int, kv_block: int) -> BlockPlan:
    """Classify every block of a mask on a grid.

    Time and memory are O(q_len / q_block): the Python work depends on the mask alone.

    Args:
        mask: the mask.
        grid: its extent.
        q_block: rows per block.
        kv_block: keys per block.

    Raises:
        ValueError: if a block size is not an int of at least 1.
    """
    check_int("q_block", q_block, least=1)
    check_int("kv_block", kv_block, least=1)
    touched = _touched(mask, grid, q_block, kv_block)
    full = _complement(_touched(~mask, grid, q_block, kv_block), -(-grid.kv_len // kv_block))
    return BlockPlan(grid, q_block, kv_block, touched, full)


def _touched(mask: Mask, grid: Grid, q_block: int, kv_block: int) -> Runs:
    """The key blocks in which at least one pair is attended to."""
    num_kv_blocks = -(-grid.kv_len // kv_block)
    first = torch.arange(0, grid.q_len, q_block)
    nothing = torch.full_like(first, num_kv_blocks)
    starts, stops = [nothing], [nothing]
    for segment in row_intervals(mask, grid).segments:
        top = first.clamp(min=segment.start)
        bottom = (first + q_block).clamp(max=segment.stop) - 1
        for lo, hi in segment.intervals:
            low, high = lo.base + lo.slope * top, hi.base + hi.slope * bottom
            starts.append(torch.where(top <= bottom, low // kv_block, nothing))
            stops.append(torch.where(top <= bottom, (high + kv_block - 1) // kv_block, nothing))
    return _union(torch.stack(starts, 1), torch.stack(stops, 1), num_kv_blocks)


def _union(start: torch.Tensor, stop: torch.Tensor, num_kv_blocks: int) -> Runs:
    """Sort and merge runs, which may be empty, overlap and come in any order; (row blocks, any R) each."""
    empty = start >= stop
    start, order = start.masked_fill(empty, num_kv_blocks).sort(1)
    reach = stop.masked_fill(empty, num_kv_blocks).gather(1, order).cummax(1).values
    # A merged run begins where a run starts beyond all that came before it. Empty runs, now last, stand at
    # the end value, which also fills the columns of runs that were merged into another.
    gap = start[:, 1:] > reach[:, :-1]
    edge = gap.new_ones(len(gap), 1)
    start = start.masked_fill(~torch.cat([edge, gap], 1), num_kv_blocks).sort(1).values
    stop = reach.masked_fill(~torch.cat([gap, edge], 1), num_kv_blocks).sort(1).values
    width = max(1, int((start < num_kv_blocks).sum(1).max()))
    return Runs(start[:, :width].int(), stop[:, :width].int())


def _complement(runs: Runs, num_kv_blocks: int) -> Runs:
    """The key blocks in no run."""
    edge = runs.start.new_zeros(len(runs.start), 1)
    start, stop = torch.cat([edge, runs.stop], 1), torch.cat([runs.start, edge + num_kv_blocks], 1)
    return _union(start, stop, num_kv_blocks)
