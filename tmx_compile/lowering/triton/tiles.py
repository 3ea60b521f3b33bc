"""What the general kernels share, forward and backward: stacked rows, blocks of keys, loads, sums over splits.

Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tmx_compile.lowering.triton.walk import seen

LOG2_E = tl.constexpr(1.4426950408889634)


class Work(NamedTuple):
    """What a program does: a tile of streaming rows, or one split of the keys for a tile of last rows."""

    is_last: Any
    tile: Any
    split: Any
    head_block: Any
    batch: Any


@triton.jit
def work_of(program, last_programs, last_tiles, splits, tiles, HEAD_BLOCKS: tl.constexpr):
    """The :class:`Work` of a program: the last rows' come first, so that they run beside the streaming tiles."""
    is_last = program < last_programs
    split = 0
    if is_last:
        # Neighbours share a range of keys.
        tile = program % last_tiles
        head_block = program // last_tiles % HEAD_BLOCKS
        rest = program // (last_tiles * HEAD_BLOCKS)
        split = rest % splits
        batch = rest // splits
    else:
        tile = (program - last_programs) % tiles
        rest = (program - last_programs) // tiles
        head_block = rest % HEAD_BLOCKS
        batch = rest // HEAD_BLOCKS
    return Work(is_last, tile, split, head_block, batch)


class Blocks(NamedTuple):
    """A tile's slots in ``blocks`` blocks, the first ``empty`` slots unused.

    The blocks from ``masked_front`` up to ``full_end`` need no mask.
    """

    empty: Any
    blocks: Any
    masked_front: Any
    full_end: Any


@triton.jit
def blocks_of(first, stop, span, sinks, low, high, holes, BLOCK_N: tl.constexpr, PADDED: tl.constexpr):
    """The :class:`Blocks` of a walk (:mod:`tmx_compile.lowering.triton.walk`)."""
    keys = tl.maximum(high - low, 0)
    slots = sinks + keys
    blocks = tl.cdiv(slots, BLOCK_N)
    empty = blocks * BLOCK_N - slots
    # Slots at the front that a mask has to look at: unused ones, sinks, keys that the last row no longer sees.
    front = empty + sinks + tl.minimum(tl.maximum(stop - 1 - span - low, 0), keys)
    masked_front = tl.minimum(tl.cdiv(front, BLOCK_N), blocks)
    # And at the end: keys that the first row does not see yet.
    masked_end = tl.cdiv(tl.minimum(tl.maximum(high - first - 1, 0), keys), BLOCK_N)
    full_end = tl.maximum(blocks - masked_end, masked_front)
    if PADDED:
        if holes != 0:
            masked_front = blocks
            full_end = blocks
    return Blocks(empty, blocks, masked_front, full_end)


@triton.jit
def valid_range(extent_ptr, batch, kv_len, PADDED: tl.constexpr):
    """A sequence's valid keys: [start, end), and whether a key between them is masked."""
    start = 0
    end = kv_len
    holes = 0
    if PADDED:
        start = tl.load(extent_ptr + batch * 3)
        end = tl.load(extent_ptr + batch * 3 + 1)
        holes = tl.load(extent_ptr + batch * 3 + 2)
    return start, end, holes


@triton.jit
def masked_keys(
    block,
    empty,
    sinks,
    sink_low,
    low,
    mask_row,
    position,
    sink_end,
    span,
    reach,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    REACH: tl.constexpr,
):
    """The keys of a block that needs a mask: places (BLOCK_N,) int64, which are used, and which (M, BLOCK_N) are seen.

    ``mask_row`` points to the sequence's row of the key mask; ``empty``, ``sinks``, ``sink_low`` and ``low`` are
    those of :class:`Blocks` and of the walk.
    """
    slot = block * BLOCK_N + tl.arange(0, BLOCK_N) - empty
    place = tl.where(slot < sinks, sink_low + slot, low + slot - sinks)
    used = slot >= 0
    if PADDED:
        used = used & (tl.load(mask_row + place, mask=used, other=0) != 0)
    allowed = seen(position[:, None], place[None, :], sink_end, span, reach, REACH) & used[None, :]
    return place.to(tl.int64), used, allowed


@triton.jit
def bent(scores, scale, SOFTCAP: tl.constexpr):
    """The hyperbolic tangent of ``scores`` times the scale over the softcap; ``scale`` is times log2(e)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale * (2.0 / SOFTCAP))))


@triton.jit
def stack(first, stop, head_block, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Positions, query heads and existence, (BLOCK_M,) each, of the rows at [first, stop) of ``GROUP`` heads."""
    row = tl.arange(0, BLOCK_M)
    position = first + row // GROUP
    head = head_block * GROUP + row % GROUP
    exists = (row < BLOCK_M // GROUP * GROUP) & (position < stop)
    return position, head, exists


@triton.jit
def load_rows(base, rows, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, keep):
    """(len(rows), BLOCK) elements; zeros beyond DIM and, where ``keep`` is given, in the rows that it drops."""
    column = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * stride + column[None, :]
    if keep is not None:
        kept = keep[:, None]
        if DIM != BLOCK:
            kept = kept & (column < DIM)[None, :]
        loaded = tl.load(pointers, mask=kept, other=0.0)
    elif DIM != BLOCK:
        loaded = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        loaded = tl.load(pointers)
    return loaded


@triton.jit
def counter(counter_ptr, tile):
    """Where the splits of a tile are counted; the pointer is another tensor's where nothing is split."""
    return counter_ptr.to(tl.pointer_type(tl.int32)) + tile


@triton.jit
def all_arrived(counter_ptr, tile, splits):
    """Whether the other splits of a tile left their parts before this one; then its counter is 0 again."""
    # Every thread's stores before the one thread's release.
    tl.debug_barrier()
    all_here = tl.atomic_add(counter(counter_ptr, tile), 1, sem="acq_rel") == splits - 1
    if all_here:
        tl.store(counter(counter_ptr, tile), 0)
    return all_here


@triton.jit
def store_part(part_ptr, x, split, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Leave ``x`` (ROWS, BLOCK) as the part of a split: (splits, ROWS, DIM) float32 from ``part_ptr`` on."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = part_ptr + (split * ROWS + tl.arange(0, ROWS))[:, None] * DIM + column
    tl.store(pointers, x, mask=column < DIM)


@triton.jit
def sum_parts(part_ptr, splits, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the parts of all splits: (ROWS, BLOCK)."""
    column = tl.arange(0, BLOCK)[None, :]
    pointers = part_ptr + tl.arange(0, ROWS)[:, None] * DIM + column
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for split in range(splits):
        # Past the first-level cache: other multiprocessors wrote these.
        total += tl.load(pointers + split * ROWS * DIM, mask=column < DIM, other=0.0, cache_modifier=".cg")
    return total
