"""What a CTA of the Hopper kernel works on: its share of the items, an item's rows and keys, and the slots of its keys.

Importing this module needs Triton with Gluon for Hopper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tmx_compile.lowering.triton.walk import walk


class Counts(NamedTuple):
    """The run-time numbers of a launch."""

    q_len: Any
    kv_len: Any
    sink: Any
    window: Any
    last: Any
    reach: Any
    last_items: Any
    last_tiles: Any
    splits: Any
    split_keys: Any
    tiles: Any
    stream_items: Any
    head_start: Any


class Share(NamedTuple):
    """The items of a CTA."""

    lasts: Any  # its last-row items
    early: Any  # its tiles while others do last-row items
    ahead: Any  # tiles of all CTAs that are done meanwhile
    items: Any  # how many it has in all


class Item(NamedTuple):
    """One work item: which rows, and which keys they walk; see :class:`~tmx_compile.lowering.triton.walk.Walk`."""

    is_last: Any
    tile: Any
    head_block: Any
    batch: Any
    split: Any
    start: Any
    end: Any
    holes: Any
    last_low: Any
    span: Any
    sinks: Any
    sink_low: Any
    first: Any
    stop: Any
    low: Any
    high: Any


@gluon.jit
def schedule(counts):
    """This CTA's :class:`Share`.

    Last-row items come first, one a CTA; a CTA without one takes ``head_start`` tiles meanwhile. Then all take turns.
    """
    last_items, stream_items = counts.last_items, counts.stream_items
    cta = gl.program_id(0)
    ctas = gl.num_programs(0)
    lasts = (last_items - cta + ctas - 1) // ctas
    free = gl.maximum(ctas - last_items, 0)
    ahead = gl.minimum(counts.head_start * free, stream_items)
    early = 0
    if lasts == 0:
        early = (ahead - (cta - last_items) + free - 1) // free
    return Share(lasts, early, ahead, lasts + early + (stream_items - ahead - cta + ctas - 1) // ctas)


@gluon.jit
def item(
    index, share, counts, extent_ptr,
    GROUP: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """The :class:`Item` with this number in a CTA's share."""
    q_len, kv_len, last_items, last_tiles, splits = (
        counts.q_len, counts.kv_len, counts.last_items, counts.last_tiles, counts.splits
    )  # fmt: skip
    lasts, early, ahead, _ = share
    HEAD_BLOCKS: gl.constexpr = HEADS // GROUP
    cta = gl.program_id(0)
    ctas = gl.num_programs(0)
    offset = kv_len - q_len
    is_last = index < lasts
    # Divisions by run-time numbers are slow here: a tile needs one.
    split = 0
    if is_last:
        number = cta + index * ctas
        rest = number // last_tiles
        tile = number - rest * last_tiles
        head_block = rest % HEAD_BLOCKS
        rest = rest // HEAD_BLOCKS
        batch = rest // splits
        split = rest - batch * splits
    else:
        turn = index - lasts
        number = gl.where(
            turn < early, turn * (ctas - last_items) + cta - last_items, ahead + (turn - early) * ctas + cta
        )
        # The item after a CTA's last one may be beyond all: any will do.
        number = gl.minimum(number, counts.stream_items - 1)
        # Heads first: rows of one position lie together in models' memory, and so are read and written together.
        head_block = number % HEAD_BLOCKS
        tile = number // HEAD_BLOCKS
        batch = 0
        if tile >= counts.tiles:
            batch = tile // counts.tiles
            tile = tile - batch * counts.tiles
    start = 0
    end = kv_len
    holes = 0
    if PADDED:
        start = gl.load(extent_ptr + batch * 3)
        end = gl.load(extent_ptr + batch * 3 + 1)
        holes = gl.load(extent_ptr + batch * 3 + 2)
    last_low, span, sinks, sink_low, first, stop, low, high = walk(
        is_last, tile, split, start, end, offset, kv_len, counts.sink, counts.window, counts.last, counts.reach,
        counts.split_keys, ROWS, REACH,
    )  # fmt: skip
    # Sinks have slots of their own where the window reaches them too.
    if (is_last == 0) & (low < start + counts.sink) & ((high > low) | (sinks > 0)):
        low = gl.maximum(gl.minimum(start + counts.sink, high), sink_low)
        sinks = low - sink_low
    high = gl.maximum(high, low)
    return Item(
        is_last, tile, head_block, batch, split, start, end, holes, last_low, span, sinks, sink_low, first, stop, low,
        high,
    )  # fmt: skip


@gluon.jit
def layout_slots(sinks, low, high, FIRST: gl.constexpr, BLOCK_N: gl.constexpr):
    """The slots of an item: (slots of the sinks, in whole pieces of 16; blocks; what turns a later slot into its key).

    The sinks come first, the window's keys follow and end with the last slot. The first block has ``FIRST`` slots, the
    others, at least one if they are larger, ``BLOCK_N``. Never no block: ptxas 12.8 loses the query's descriptor where
    the first product is in a branch.
    """
    far = (sinks + 15) // 16 * 16
    LEAST: gl.constexpr = 1 if FIRST != BLOCK_N else 0
    more = gl.maximum((far + high - low - FIRST + BLOCK_N - 1) // BLOCK_N, LEAST)
    return far, more + 1, high - FIRST - more * BLOCK_N


@gluon.jit
def masked_slots(work, first, far, blocks, shift, POSITIONS: gl.constexpr, FIRST: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of an item's slots, for rows from ``first`` on: (up to where a mask is needed, from where on another one is).

    At the front are unused slots, sinks, and keys that the last row no longer sees; at the end keys that the first row
    does not see yet.
    """
    stop = gl.minimum(first + POSITIONS, work.stop)
    front = gl.maximum(far, gl.maximum(work.low, stop - 1 - work.span) - shift)
    if work.holes != 0:
        front = FIRST + blocks * BLOCK_N
    return front, first + 1 - shift
