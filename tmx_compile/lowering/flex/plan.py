"""Compact block plans for FlexAttention's CUDA template: a few columns a row, O(N) in all, no mask of rows by keys.

Blocks of keys are listed as a few half-open ranges of block numbers. Positions are absolute; every tensor here is
(B or 1, 1, Q, 1) for Q blocks of rows. A block may be listed only once: twice would count its keys twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tmx_compile.lowering.base import arange
from tmx_compile.lowering.flex.call import KeyBlocks, stored
from tmx_compile.lowering.rows import Extent
from tmx_compile.mask.geometry import Geometry

Range = tuple[Any, Any]


@dataclass(frozen=True)
class Tiles:
    """One program of the template: a block of ``rows`` x ``keys``, powers of two, its warps and pipeline stages.

    The block plan is made of the same blocks.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def row_bits(self) -> int:
        """The shift that divides by ``rows``."""
        return self.rows.bit_length() - 1

    @property
    def key_bits(self) -> int:
        """The shift that divides by ``keys``: Inductor asserts on a floor division of a symbolic length."""
        return self.keys.bit_length() - 1

    def reached(self, keys: int, *, aligned: bool = False) -> int:
        """The most blocks that ``keys`` consecutive keys lie in; ``aligned`` where they start with a block."""
        return -(-keys // self.keys) if aligned or keys == 0 else (keys + self.keys - 2) // self.keys + 1


def streaming_plan(
    like: Any,
    q_len: Any,
    kv_len: Any,
    where: Extent,
    padded: bool,
    geometry: Geometry,
    tiles: Tiles,
) -> KeyBlocks:
    """The plan of all rows as streaming rows: the blocks of the sinks, then those of the window.

    The window is at most the reach. Without padding, blocks inside the window of every row of their block of rows are
    full, where the window is wide enough for such blocks.
    """
    sink, window, reach = geometry.sink, geometry.window, geometry.reach
    # A block to spare, and never one block alone: either would be a guard on the length. No row reads it.
    q_blocks = (q_len >> tiles.row_bits) + 2
    first = (arange(like, q_blocks) * tiles.rows + (kv_len - q_len))[None, None, :, None]
    final = first + (tiles.rows - 1)
    start, end = _extent(first, where, padded, kv_len)
    own = torch.minimum(final, end - 1) >> tiles.key_bits
    near = torch.maximum(first - window, start) >> tiles.key_bits
    # Behind the sequence a window may hold no key at all: then the sinks alone, up to the last key's block.
    near = torch.where(first - window < end, near, torch.maximum(near, own + 1))
    # A block of rows before their sequence reads nothing.
    alive = (final >= start) & (start < end)
    stop = torch.where(alive, torch.maximum(own + 1, near), near)
    ranges: list[Range] = []
    if sink > 0:
        far = (start if reach is None else torch.maximum(start, first - reach)) >> tiles.key_bits
        sinks_end = torch.minimum(start + sink, end) - 1
        far_stop = torch.minimum((sinks_end >> tiles.key_bits) + 1, near)
        ranges.append((far, torch.where(alive, far_stop, far)))
    full: list[Range] = []
    if padded or window + 1 < tiles.rows + tiles.keys:
        ranges.append((near, stop))
    else:
        low, high = _inside(near, stop, final - window, first, tiles)
        ranges += [(near, low), (high, stop)]
        full.append((low, high))
    width = tiles.reached(sink, aligned=not padded) + tiles.reached(window + tiles.rows)
    return _plan(like, ranges, full, padded, width, kv_len, tiles)


def last_plan(
    like: Any,
    kv_len: Any,
    where: Extent,
    padded: bool,
    first: Any,
    final: Any,
    reach: int | None,
    copies: int,
    blocks: int,
    tiles: Tiles,
) -> KeyBlocks:
    """The plan of the last rows, written out ``copies`` times, a power of two: copy c reads the c-th part of the keys.

    A copy is ``blocks`` blocks of rows. ``first`` and ``final``, (B or 1, 1, 1, 1), are the lowest and the highest
    position of a real row; a sequence where ``first > final`` has none.
    """
    start, _ = _extent(first, where, padded, kv_len)
    begin = (start if reach is None else torch.maximum(start, first - reach)) >> tiles.key_bits
    stop = torch.where(final >= first, (final >> tiles.key_bits) + 1, begin)
    bits = copies.bit_length() - 1
    part = (stop - begin + (copies - 1)) >> bits
    copy = arange(like, copies)[:, None].expand(copies, blocks).reshape(1, 1, copies * blocks, 1)
    low = torch.minimum(begin + copy * part, stop)
    high = torch.minimum(low + part, stop)
    # Never one column alone: that would be a guard on the length.
    width = (((kv_len >> tiles.key_bits) + copies) >> bits) + 1
    if padded:
        return _plan(like, [(low, high)], [], padded, width, kv_len, tiles)
    oldest = begin * tiles.keys if reach is None else final - reach
    inner_low, inner_high = _inside(low, high, oldest, first, tiles)
    return _plan(like, [(low, inner_low), (inner_high, high)], [(inner_low, inner_high)], padded, width, kv_len, tiles)


def _extent(like: Any, where: Extent, padded: bool, kv_len: Any) -> Range:
    """Start and end of the valid keys as tensors that broadcast against ``like``, (B or 1, 1, Q, 1)."""
    zero = like * 0
    if padded:
        return zero + where.start[:, :, None, None], zero + where.end[:, :, None, None]
    return zero, zero + kv_len


def _inside(low: Any, high: Any, oldest: Any, newest: Any, tiles: Tiles) -> Range:
    """The blocks in [low, high) whose keys all lie in [oldest, newest]: those that every row sees whole."""
    begin = torch.minimum(torch.maximum((oldest + (tiles.keys - 1)) >> tiles.key_bits, low), high)
    return begin, torch.maximum(torch.minimum((newest + 1) >> tiles.key_bits, high), begin)


def _plan(
    like: Any, ranges: Sequence[Range], full: Sequence[Range], padded: bool, width: Any, kv_len: Any, tiles: Tiles
) -> KeyBlocks:
    # torch 2.11 reads the full blocks with the strides of the others: both lists have one width.
    lists = [_listed(like, part, width, kv_len, tiles) for part in (ranges, full) if part]
    return KeyBlocks(tiles.rows, tiles.keys, *(x for pair in lists for x in pair))


def _listed(like: Any, ranges: Sequence[Range], width: Any, kv_len: Any, tiles: Tiles) -> tuple[Any, Any]:
    """Ranges of blocks, one after another: counts (B or 1, 1, Q) and indices (B or 1, 1, Q, width), int32."""
    column = arange(like, width)
    total: Any = None
    index: Any = None
    for begin, stop in ranges:
        moved = begin + column if total is None else begin - total + column
        index = moved if total is None else torch.where(column < total, index, moved)
        count = (stop - begin).clamp(min=0)
        total = count if total is None else total + count
    # The first entry of a row is looked at even where none is counted.
    index = index.clamp(min=0, max=(kv_len - 1) >> tiles.key_bits)
    return stored(total.to(torch.int32), 3), stored(index.to(torch.int32))
