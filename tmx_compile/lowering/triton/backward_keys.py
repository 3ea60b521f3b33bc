"""The GPU kernel of dK and dV: one tile of keys a program, O(N) work, nothing of N x N (:mod:`backward_queries`).

A program walks the rows that see its keys: those whose window holds one of them, then the last rows beyond. Rows are
stacked as everywhere: consecutive positions of the query heads that share the key head, so that their sum is made here.
Keys that are sinks are seen by all rows: a launch of its own takes those, in tiles of their own, and each program a
range of the rows (a *split*). The split that arrives last adds the partial sums, always in the same order.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tmx_compile.lowering.triton.tiles import (
    LOG2_E,
    all_arrived,
    bent,
    load_rows,
    stack,
    store_part,
    sum_parts,
    valid_range,
)
from tmx_compile.lowering.triton.walk import seen


@triton.jit
def _add_rows(
    grad_key, grad_value, key, value, query, grad, lse, delta, allowed, scale, FLOAT32: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add a block of rows to a tile's dK (N, D) and dV (N, Dv). ``allowed`` is (N, M), or None where all attend."""
    precision: tl.constexpr = "tf32x3" if FLOAT32 else "tf32"
    scores = tl.dot(key, tl.trans(query), input_precision=precision)
    factor = scale
    if SOFTCAP > 0:
        scores = bent(scores, scale, SOFTCAP)
        factor = SOFTCAP * LOG2_E
    weights = tl.exp2(scores * factor - lse[None, :])
    if allowed is not None:
        weights = tl.where(allowed, weights, 0.0)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=precision)
    grad_weights = tl.dot(value, tl.trans(grad), input_precision=precision)
    grad_scores = weights * (grad_weights - delta[None, :])
    if SOFTCAP > 0:
        grad_scores = grad_scores * (1.0 - scores * scores)
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=precision)
    return grad_key, grad_value


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "sink", "window", "last", "reach", "tiles", "splits", "split_rows",
    ]
)  # fmt: skip
def key_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_ptr,  # of out
    row_lse_ptr,  # (B, H / GROUP, Sq, GROUP) float32, as the query kernel left them
    delta_ptr,
    mask_ptr,  # (B, Skv) bool, with PADDED
    extent_ptr,  # (B, 3) int32, with PADDED
    grad_key_ptr,
    grad_value_ptr,
    part_ptr,  # (sink tiles of all heads, splits, BLOCK_N * (DIM + DIM_V)) float32, with SINKS: of keys, of values
    counter_ptr,  # (sink tiles of all heads) int32, zeros before and after, with SINKS
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    g_batch,
    g_head,
    g_row,
    gk_batch,
    gk_head,
    gk_row,
    gv_batch,
    gv_head,
    gv_row,
    mask_batch,
    q_len,
    kv_len,
    sink,
    window,
    last,
    reach,
    scale,
    tiles,
    splits,
    split_rows,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINKS: tl.constexpr,  # tiles of the sinks, over one split of the rows; else tiles of all keys, less the sinks
    PADDED: tl.constexpr,
    REACH: tl.constexpr,
    FLOAT32: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0: none
):
    """dK and dV of one tile of keys. Strides are in elements; the last dimension of every tensor is contiguous."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    HEAD_BLOCKS: tl.constexpr = HEADS // KV_HEADS // GROUP  # stacks of query heads that share the key head
    offset = kv_len - q_len
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    kv_head = program // (tiles * splits) % KV_HEADS
    batch = program // (tiles * splits * KV_HEADS)
    batch64 = batch.to(tl.int64)

    start, end, holes = valid_range(extent_ptr, batch, kv_len, PADDED)
    last_low = tl.maximum(tl.maximum(end - last, offset), start)
    sink_end = tl.minimum(start + sink, end)

    # Rows [low, high), and the last rows [far_low, far_high) beyond them. Keys that nobody may attend are walked like
    # their neighbours, and dropped at the end: no key's sum has a part of another key's.
    far_low = 0
    far_high = 0
    span = kv_len
    if REACH:
        span = reach
    if SINKS:
        first_key = start + tile * BLOCK_N
        stop_key = tl.minimum(first_key + BLOCK_N, sink_end)
        low = tl.maximum(tl.maximum(first_key, offset), offset + split * split_rows)
        high = tl.minimum(tl.minimum(offset + (split + 1) * split_rows, kv_len), stop_key + span)
        some = first_key < stop_key
    else:
        first_key = tile * BLOCK_N
        stop_key = tl.minimum(first_key + BLOCK_N, kv_len)
        far_high = tl.minimum(end, stop_key + span)
        span = tl.minimum(span, window)
        low = tl.maximum(first_key, offset)
        high = tl.minimum(stop_key + span, kv_len)
        far_low = tl.maximum(tl.maximum(last_low, high), low)
        some = (stop_key > sink_end) & (stop_key > start) & (first_key < end)
    high = tl.where(some, tl.maximum(high, low), low)
    far_high = tl.where(some, tl.maximum(far_high, far_low), far_low)
    # Blocks of rows that see every key of the tile: [full_front, full_end) of the near ones, the first of the far ones.
    blocks = tl.cdiv(high - low, ROWS)
    far_blocks = tl.cdiv(far_high - far_low, ROWS)
    full_front = tl.minimum(tl.cdiv(tl.maximum(stop_key - 1 - low, 0), ROWS), blocks)
    full_end = tl.maximum(tl.minimum(first_key + span + 1, high) - low, 0) // ROWS
    full_end = tl.maximum(full_end, full_front)
    far_full = far_high
    if REACH:
        far_full = tl.minimum(far_full, first_key + reach + 1)
    far_full = tl.maximum(far_full - far_low, 0) // ROWS
    near_full = full_end - full_front
    near_masked = blocks - near_full
    masked = near_masked + far_blocks - far_full

    column = tl.arange(0, BLOCK_N)
    place = first_key + column
    # Whose gradient is written here, and whose is not 0.
    if SINKS:
        mine = place < stop_key
        valid = mine
    else:
        mine = (place < stop_key) & ((place < start) | (place >= sink_end))
        valid = mine & (place >= start) & (place < end)
    if PADDED:
        valid = valid & (tl.load(mask_ptr + batch64 * mask_batch + place, mask=valid, other=0) != 0)
    wide = place.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    key = load_rows(key_ptr + batch64 * k_batch + kv_head64 * k_head, wide * k_row, 1, DIM, BLOCK_D, valid)
    value = load_rows(value_ptr + batch64 * v_batch + kv_head64 * v_head, wide * v_row, 1, DIM_V, BLOCK_DV, valid)
    # A stacked row's place from the first one's, once: (position, head) in the tensors, consecutive in lse and delta.
    row = tl.arange(0, BLOCK_M)
    query_base = query_ptr + batch64 * q_batch - offset.to(tl.int64) * q_row
    grad_base = grad_ptr + batch64 * g_batch - offset.to(tl.int64) * g_row
    query_at = (row // GROUP).to(tl.int64) * q_row + (row % GROUP).to(tl.int64) * q_head
    grad_at = (row // GROUP).to(tl.int64) * g_row + (row % GROUP).to(tl.int64) * g_head
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    scale2 = scale * LOG2_E

    for step in tl.range(0, masked * HEAD_BLOCKS, num_stages=STAGES):
        block = step // HEAD_BLOCKS
        is_near = block < near_masked
        index = tl.where(block < full_front, block, block + near_full)
        first = tl.where(is_near, low + index * ROWS, far_low + (block - near_masked + far_full) * ROWS)
        stop = tl.where(is_near, high, far_high)
        head_block = kv_head * HEAD_BLOCKS + step % HEAD_BLOCKS
        first_head = (head_block * GROUP).to(tl.int64)
        position, _, exists = stack(first, stop, head_block, GROUP, BLOCK_M)
        first64 = first.to(tl.int64)
        query = load_rows(query_base + first64 * q_row + first_head * q_head, query_at, 1, DIM, BLOCK_D, exists)
        grad = load_rows(grad_base + first64 * g_row + first_head * g_head, grad_at, 1, DIM_V, BLOCK_DV, exists)
        stacked = ((batch64 * (HEADS // GROUP) + head_block) * q_len + first64 - offset) * GROUP
        lse = tl.load(row_lse_ptr + stacked + row, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + stacked + row, mask=exists, other=0.0)
        row_span = tl.where((position >= last_low) & (position < end), kv_len, span)
        # What a sink is to a row is no matter here: a tile's keys are all sinks, or none is.
        allowed = seen(position[None, :], place[:, None], 0, row_span[None, :], reach, REACH)
        grad_key, grad_value = _add_rows(
            grad_key, grad_value, key, value, query, grad, lse, delta, allowed, scale2, FLOAT32, SOFTCAP
        )

    for step in tl.range(0, (near_full + far_full) * HEAD_BLOCKS, num_stages=STAGES):
        block = step // HEAD_BLOCKS
        first = tl.where(block < near_full, low + (full_front + block) * ROWS, far_low + (block - near_full) * ROWS)
        head_block = kv_head * HEAD_BLOCKS + step % HEAD_BLOCKS
        first_head = (head_block * GROUP).to(tl.int64)
        first64 = first.to(tl.int64)
        query_first = query_base + first64 * q_row + first_head * q_head
        grad_first = grad_base + first64 * g_row + first_head * g_head
        stacked = ((batch64 * (HEADS // GROUP) + head_block) * q_len + first64 - offset) * GROUP
        if ROWS * GROUP == BLOCK_M:
            query = load_rows(query_first, query_at, 1, DIM, BLOCK_D, None)
            grad = load_rows(grad_first, grad_at, 1, DIM_V, BLOCK_DV, None)
            lse = tl.load(row_lse_ptr + stacked + row)
            delta = tl.load(delta_ptr + stacked + row)
        else:
            exists = row < ROWS * GROUP
            query = load_rows(query_first, query_at, 1, DIM, BLOCK_D, exists)
            grad = load_rows(grad_first, grad_at, 1, DIM_V, BLOCK_DV, exists)
            lse = tl.load(row_lse_ptr + stacked + row, mask=exists, other=float("inf"))
            delta = tl.load(delta_ptr + stacked + row, mask=exists, other=0.0)
        grad_key, grad_value = _add_rows(
            grad_key, grad_value, key, value, query, grad, lse, delta, None, scale2, FLOAT32, SOFTCAP
        )

    if SINKS:
        if splits > 1:
            item = (batch64 * KV_HEADS + kv_head) * tiles + tile
            parts = part_ptr + item * splits * BLOCK_N * (DIM + DIM_V)
            value_parts = parts + splits * BLOCK_N * DIM
            store_part(parts, grad_key, split, DIM, BLOCK_N, BLOCK_D)
            store_part(value_parts, grad_value, split, DIM_V, BLOCK_N, BLOCK_DV)
            if not all_arrived(counter_ptr, item, splits):
                mine = mine & False
            else:
                grad_key = sum_parts(parts, splits, DIM, BLOCK_N, BLOCK_D)
                grad_value = sum_parts(value_parts, splits, DIM_V, BLOCK_N, BLOCK_DV)
    grad_key = tl.where(valid[:, None], grad_key * scale, 0.0)
    grad_value = tl.where(valid[:, None], grad_value, 0.0)
    key_at = grad_key_ptr + batch64 * gk_batch + kv_head64 * gk_head
    value_at = grad_value_ptr + batch64 * gv_batch + kv_head64 * gv_head
    _store_keys(key_at, grad_key, wide * gk_row, mine, DIM, BLOCK_D)
    _store_keys(value_at, grad_value, wide * gv_row, mine, DIM_V, BLOCK_DV)


@triton.jit
def _store_keys(base, x, rows, mine, DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    keep = mine[:, None]
    if DIM != BLOCK:
        keep = keep & (column < DIM)[None, :]
    tl.store(base + rows[:, None] + column[None, :], x.to(base.dtype.element_ty), mask=keep)
