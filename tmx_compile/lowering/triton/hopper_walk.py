"""What a CTA of the Hopper kernel works on: its share of the items, an item's rows and keys, and the slots of its keys.

Importing this module needs Triton with Gluon for Hopper.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def schedule(args):
    """This CTA's share: (its last-row items, its tiles while others do those, tiles before the rest, all its items).

    Last-row items come first, one a CTA; a CTA without one takes ``head_start`` tiles meanwhile. Then all take turns.
    """
    last_items, stream_items, head_start = args[6], args[11], args[12]
    cta = gl.program_id(0)
    ctas = gl.num_programs(0)
    lasts = (last_items - cta + ctas - 1) // ctas
    free = gl.maximum(ctas - last_items, 0)
    ahead = gl.minimum(head_start * free, stream_items)
    early = 0
    if lasts == 0:
        early = (ahead - (cta - last_items) + free - 1) // free
    return lasts, early, ahead, lasts + early + (stream_items - ahead - cta + ctas - 1) // ctas


@gluon.jit
def item(
    index, shares, args, extent_ptr,
    GROUP: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """One work item: which rows, and which keys they walk; see :mod:`kernel` for the names."""
    (
        q_len,
        kv_len,
        sink,
        window,
        last,
        reach,
        last_items,
        last_tiles,
        splits,
        split_keys,
        tiles,
        stream_items,
        head_start,
    ) = args
    lasts, early, ahead, _ = shares
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
        index = index - lasts
        number = gl.where(
            index < early, index * (ctas - last_items) + cta - last_items, ahead + (index - early) * ctas + cta
        )
        # Heads first: rows of one position lie together in models' memory, and so are read and written together.
        head_block = number % HEAD_BLOCKS
        rest = number // HEAD_BLOCKS
        batch = rest // tiles
        tile = rest - batch * tiles
    start = 0
    end = kv_len
    holes = 0
    if PADDED:
        start = gl.load(extent_ptr + batch * 3)
        end = gl.load(extent_ptr + batch * 3 + 1)
        holes = gl.load(extent_ptr + batch * 3 + 2)
    last_low = gl.maximum(gl.maximum(end - last, offset), start)
    span = kv_len
    if REACH:
        span = reach
    sinks = 0
    sink_low = start
    if is_last:
        first = last_low + tile * ROWS
        stop = gl.minimum(first + ROWS, end)
        low = gl.maximum(start, split * split_keys)
        if REACH:
            low = gl.maximum(low, first - reach)
        high = gl.minimum(stop, (split + 1) * split_keys)
    else:
        first = offset + tile * ROWS
        stop = gl.minimum(first + ROWS, kv_len)
        span = gl.minimum(span, window)
        low = gl.maximum(start, first - span)
        high = gl.minimum(stop, end)
        if REACH:
            sink_low = gl.maximum(start, first - reach)
        sinks = gl.maximum(gl.minimum(gl.minimum(start + sink, low), high) - sink_low, 0)
        if ((first >= last_low) & (stop <= end)) | (stop <= start):
            high = low
            sinks = 0
    high = gl.maximum(high, low)
    return (
        is_last,
        tile,
        head_block,
        batch,
        split,
        start,
        end,
        holes,
        last_low,
        span,
        sinks,
        sink_low,
        first,
        stop,
        low,
        high,
    )


@gluon.jit
def layout_slots(sinks, low, high, BLOCK_N: gl.constexpr):
    """The slots of an item: (slots of the sinks, in whole pieces of 16; blocks; what turns a later slot into its key).

    The sinks come first, the window's keys follow and end with the last slot. At least one block: ptxas 12.8 loses the
    query's descriptor where the first product is in a branch.
    """
    far = (sinks + 15) // 16 * 16
    blocks = gl.maximum((far + high - low + BLOCK_N - 1) // BLOCK_N, 1)
    return far, blocks, high - blocks * BLOCK_N
