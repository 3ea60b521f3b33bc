"""The GPU kernel of triangle attention: one launch, O(N) work, no (rows, keys) tensor.

A program computes one *tile*: ``BLOCK_M // GROUP`` consecutive rows of the ``GROUP`` query heads that share a key head,
stacked, so that keys are read once for the whole group. It walks its keys as *slots*: first the sinks that lie before
the tile's window, then the window's own range, in blocks of ``BLOCK_N`` that end exactly at the tile's last row. Only
the blocks at either end need a mask; those between are computed without one.

The last rows read all keys. Their programs come first in the grid, so that they run beside the streaming tiles, and
each walks one range of the keys (a *split*). The split that finishes last merges all of them, always in the same order,
so that the result does not depend on which one that was.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tmx_compile.lowering.triton.tiles import (
    LOG2_E,
    all_arrived,
    bent,
    blocks_of,
    load_rows,
    masked_keys,
    stack,
    valid_range,
    work_of,
)
from tmx_compile.lowering.triton.walk import walk

# Finite, so that a row that has met no key yet subtracts no infinity from another.
NO_MAXIMUM = tl.constexpr(-3.0e38)


@triton.jit
def add_keys(
    acc, total, maximum, query, key, value, allowed, scale, FLOAT32: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """One step of the running softmax (Milakov and Gimelshein 2018): acc (M, Dv), total and maximum (M,), base 2.

    ``allowed`` is (M, N), or None where every pair is attended.
    """
    precision: tl.constexpr = "tf32x3" if FLOAT32 else "tf32"
    scores = tl.dot(query, tl.trans(key), input_precision=precision)
    factor = scale
    if SOFTCAP > 0:
        scores = bent(scores, scale, SOFTCAP)
        factor = SOFTCAP * LOG2_E
    if allowed is not None:
        scores = tl.where(allowed, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
    weights = tl.exp2(scores * factor - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision=precision)
    return acc, total, new_maximum


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "sink", "window", "last", "reach", "last_programs", "last_tiles", "splits", "split_keys",
    ]
)  # fmt: skip
def triangle_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,  # (B, H, Sq) float32, with WRITE_LSE
    mask_ptr,  # (B, Skv) bool, with PADDED
    extent_ptr,  # (B, 3) int32: start, end, whether a key between them is masked; with PADDED
    part_ptr,  # float32: parts (last tiles of all heads, splits, BLOCK_M, DIM_V), and behind them their lse, base 2
    counter_ptr,  # (last tiles of all heads) int32, zeros before and after
    done_ptr,  # (B, 2) int32: the positions [from, to) whose rows are in out already; with DONE
    sink_ptr,  # (H,) logits of any floating dtype, with SINK_LOGITS
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    mask_batch,
    q_len,
    kv_len,
    sink,
    window,
    last,
    reach,
    scale,  # times log2(e)
    last_programs,
    last_tiles,
    splits,
    split_keys,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL_N: tl.constexpr,  # keys a step of the blocks without a mask, a divisor of BLOCK_N
    PADDED: tl.constexpr,
    DONE: tl.constexpr,
    REACH: tl.constexpr,
    WRITE_LSE: tl.constexpr,
    FLOAT32: tl.constexpr,
    STAGES: tl.constexpr,
    FULL_STAGES: tl.constexpr,
    SINK_LOGITS: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0: none
):
    """See the module. Strides are in elements; the last dimension of every tensor is contiguous."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    HEAD_BLOCKS: tl.constexpr = HEADS // GROUP
    offset = kv_len - q_len
    program = tl.program_id(0)
    is_last, tile, split, head_block, batch = work_of(
        program, last_programs, last_tiles, splits, tl.cdiv(q_len, ROWS), HEAD_BLOCKS
    )

    start, end, holes = valid_range(extent_ptr, batch, kv_len, PADDED)
    last_low, span, sinks, sink_low, first, stop, low, high = walk(
        is_last, tile, split, start, end, offset, kv_len, sink, window, last, reach, split_keys, ROWS, REACH
    )
    done_from = 0
    done_to = 0
    if DONE:
        done_from = tl.load(done_ptr + batch * 2)
        done_to = tl.load(done_ptr + batch * 2 + 1)
        if (first >= done_from) & (stop <= done_to):
            sinks = 0
            high = low
    empty, blocks, masked_front, full_end = blocks_of(first, stop, span, sinks, low, high, holes, BLOCK_N, PADDED)
    masked = masked_front + blocks - full_end

    position, head, exists = stack(first, stop, head_block, GROUP, BLOCK_M)
    if DONE:
        exists = exists & ((position < done_from) | (position >= done_to))
    safe_row = (tl.minimum(position, kv_len - 1) - offset).to(tl.int64)
    head64 = head.to(tl.int64)
    batch64 = batch.to(tl.int64)
    mask_row = mask_ptr + batch64 * mask_batch
    kv_head = head_block * GROUP // (HEADS // KV_HEADS)
    query = load_rows(query_ptr + batch64 * q_batch, safe_row * q_row + head64 * q_head, 1, DIM, BLOCK_D, exists)
    key_base = key_ptr + batch64 * k_batch + kv_head.to(tl.int64) * k_head
    value_base = value_ptr + batch64 * v_batch + kv_head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    maximum = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)

    for step in tl.range(0, masked, num_stages=STAGES):
        block = tl.where(step < masked_front, step, step - masked_front + full_end)
        wide, used, allowed = masked_keys(
            block, empty, sinks, sink_low, low, mask_row, position, start + sink, span, reach, BLOCK_N, PADDED, REACH
        )
        key = load_rows(key_base, wide * k_row, 1, DIM, BLOCK_D, used)
        value = load_rows(value_base, wide * v_row, 1, DIM_V, BLOCK_DV, used)
        acc, total, maximum = add_keys(acc, total, maximum, query, key, value, allowed, scale, FLOAT32, SOFTCAP)

    front_place = low - sinks - empty + masked_front * BLOCK_N
    far_column = tl.arange(0, FULL_N)
    for step in tl.range(0, (full_end - masked_front) * (BLOCK_N // FULL_N), num_stages=FULL_STAGES):
        wide = (front_place + step * FULL_N).to(tl.int64)
        key = load_rows(key_base + wide * k_row, far_column, k_row, DIM, BLOCK_D, None)
        value = load_rows(value_base + wide * v_row, far_column, v_row, DIM_V, BLOCK_DV, None)
        acc, total, maximum = add_keys(acc, total, maximum, query, key, value, None, scale, FLOAT32, SOFTCAP)

    # A row without any key: total is 0, and so is its result.
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, maximum + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    mine = exists
    if is_last:
        if splits > 1:
            slot_of_tile = (batch * HEAD_BLOCKS + head_block) * last_tiles + tile
            acc, lse, mine = _merge(
                acc, lse, mine, part_ptr, counter_ptr, slot_of_tile, split, splits, last_programs,
                DIM_V, BLOCK_DV, BLOCK_M,
            )  # fmt: skip
    else:
        mine = exists & ((position < last_low) | (position >= end))
    if SINK_LOGITS:
        acc, lse = _add_sink(acc, lse, tl.load(sink_ptr + head).to(tl.float32) * LOG2_E)
    value_column = tl.arange(0, BLOCK_DV)
    out = out_ptr + batch64 * o_batch + (safe_row * o_row + head64 * o_head)[:, None] + value_column[None, :]
    keep = mine[:, None]
    if DIM_V != BLOCK_DV:
        keep = keep & (value_column < DIM_V)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=keep)
    if WRITE_LSE:
        place_of_row = (batch64 * HEADS + head64) * q_len + safe_row
        # To the natural logarithm.
        tl.store(lse_ptr + place_of_row, lse * 0.6931471805599453, mask=mine)


@triton.jit
def _add_sink(acc, lse, logit):
    """Results (M, Dv) and base-2 log-sum-exps (M,) with one more logit in each row's softmax, of a value of zeros."""
    top = tl.maximum(lse, logit)
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    own = tl.exp2(lse - top)
    total = tl.where(some, own + tl.exp2(logit - top), 1.0)
    return acc * (own / total)[:, None], tl.where(some, top + tl.log2(total), float("-inf"))


@triton.jit
def _merge(
    acc,
    lse,
    mine,
    part_ptr,
    counter_ptr,
    tile,
    split,
    splits,
    last_programs,
    DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Leave this split's result for the one that arrives last; that one returns the whole, every other no rows."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_DV)
    lse_at = part_ptr + last_programs.to(tl.int64) * BLOCK_M * DIM_V + tile.to(tl.int64) * splits * BLOCK_M + row
    part_at = part_ptr + (tile.to(tl.int64) * splits * BLOCK_M + row[:, None]) * DIM_V + column[None, :]
    keep = mine[:, None] & (column < DIM_V)[None, :]
    tl.store(part_at + split * BLOCK_M * DIM_V, acc, mask=keep)
    tl.store(lse_at + split * BLOCK_M, lse, mask=mine)
    if not all_arrived(counter_ptr, tile, splits):
        mine = mine & False
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        maximum = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
        for other in range(splits):
            # Past the first-level cache: other multiprocessors wrote these.
            its_lse = tl.load(lse_at + other * BLOCK_M, mask=mine, other=float("-inf"), cache_modifier=".cg")
            its = tl.load(part_at + other * BLOCK_M * DIM_V, mask=keep, other=0.0, cache_modifier=".cg")
            new_maximum = tl.maximum(maximum, its_lse)
            shrink = tl.exp2(maximum - new_maximum)
            weight = tl.exp2(its_lse - new_maximum)
            acc = acc * shrink[:, None] + its * weight[:, None]
            total = total * shrink + weight
            maximum = new_maximum
        some = total > 0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        lse = tl.where(some, maximum + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    return acc, lse, mine
