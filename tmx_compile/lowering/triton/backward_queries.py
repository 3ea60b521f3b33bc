"""The GPU kernel of dQ: one tile of rows a program, O(N) work, nothing of N x N.

The backward pass is that of FlashAttention-2 (Dao 2023, section 3.1). With P the weights, exp(scores - lse), and
dP = dO V^T: dS = P * (dP - rowsum(dO * O) + dLSE), and from there dQ = dS K, dK = dS^T Q, dV = P^T dO, the first two
times the scale. P and dP are computed twice, here and in :mod:`backward_keys`, so that no sum needs atomic additions
and two runs give the same bits.

A program walks its keys as the forward kernel does (:mod:`kernel`). It also leaves what depends on the row alone for
the other kernel, in the order of its stacked rows: the log-sum-exp, and what dS takes from dP, *delta*. Splits of the
last rows leave partial sums; the one that arrives last adds them, always in the same order.

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
    store_part,
    sum_parts,
    valid_range,
    work_of,
)
from tmx_compile.lowering.triton.walk import walk


@triton.jit
def _add_keys(
    acc, query, grad, lse, delta, key, value, allowed, scale, FLOAT32: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """Add a block of keys to a tile's dQ (M, D). ``allowed`` is (M, N), or None where every pair is attended."""
    precision: tl.constexpr = "tf32x3" if FLOAT32 else "tf32"
    scores = tl.dot(query, tl.trans(key), input_precision=precision)
    factor = scale
    if SOFTCAP > 0:
        scores = bent(scores, scale, SOFTCAP)
        factor = SOFTCAP * LOG2_E
    weights = tl.exp2(scores * factor - lse[:, None])
    if allowed is not None:
        weights = tl.where(allowed, weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(value), input_precision=precision)
    grad_scores = weights * (grad_weights - delta[:, None])
    if SOFTCAP > 0:
        grad_scores = grad_scores * (1.0 - scores * scores)
    return tl.dot(grad_scores.to(key.dtype), key, acc, input_precision=precision)


@triton.jit(
    do_not_specialize=[
        "q_len", "kv_len", "sink", "window", "last", "reach", "last_programs", "last_tiles", "splits", "split_keys",
    ]
)  # fmt: skip
def query_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_ptr,  # of out
    lse_ptr,  # (B, H, Sq) float32
    grad_lse_ptr,  # (B, H, Sq) float32, with LSE_GRAD
    mask_ptr,  # (B, Skv) bool, with PADDED
    extent_ptr,  # (B, 3) int32: start, end, whether a key between them is masked; with PADDED
    grad_query_ptr,
    row_lse_ptr,  # (B, H / KEY_GROUP, Sq, KEY_GROUP) float32, written here: base 2, infinity for rows without keys
    delta_ptr,  # the same shape, written here: rowsum(dO * O) - dLSE
    part_ptr,  # (last tiles of all heads, splits, BLOCK_M, DIM) float32
    counter_ptr,  # (last tiles of all heads) int32, zeros before and after
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
    g_batch,
    g_head,
    g_row,
    gq_batch,
    gq_head,
    gq_row,
    mask_batch,
    q_len,
    kv_len,
    sink,
    window,
    last,
    reach,
    scale,
    last_programs,
    last_tiles,
    splits,
    split_keys,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_GROUP: tl.constexpr,  # GROUP of the key kernel
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr,
    REACH: tl.constexpr,
    LSE_GRAD: tl.constexpr,
    FLOAT32: tl.constexpr,
    STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0: none
):
    """dQ of one tile of rows. Strides are in elements; the last dimension of every tensor is contiguous."""
    ROWS: tl.constexpr = BLOCK_M // GROUP
    HEAD_BLOCKS: tl.constexpr = HEADS // GROUP
    offset = kv_len - q_len
    is_last, tile, split, head_block, batch = work_of(
        tl.program_id(0), last_programs, last_tiles, splits, tl.cdiv(q_len, ROWS), HEAD_BLOCKS
    )

    start, end, holes = valid_range(extent_ptr, batch, kv_len, PADDED)
    last_low, span, sinks, sink_low, first, stop, low, high = walk(
        is_last, tile, split, start, end, offset, kv_len, sink, window, last, reach, split_keys, ROWS, REACH
    )
    empty, blocks, masked_front, full_end = blocks_of(first, stop, span, sinks, low, high, holes, BLOCK_N, PADDED)
    masked = masked_front + blocks - full_end

    position, head, exists = stack(first, stop, head_block, GROUP, BLOCK_M)
    safe_row = (tl.minimum(position, kv_len - 1) - offset).to(tl.int64)
    head64 = head.to(tl.int64)
    batch64 = batch.to(tl.int64)
    mask_row = mask_ptr + batch64 * mask_batch
    kv_head = head_block * GROUP // (HEADS // KV_HEADS)
    query = load_rows(query_ptr + batch64 * q_batch, safe_row * q_row + head64 * q_head, 1, DIM, BLOCK_D, exists)
    grad = load_rows(grad_ptr + batch64 * g_batch, safe_row * g_row + head64 * g_head, 1, DIM_V, BLOCK_DV, exists)
    out = load_rows(out_ptr + batch64 * o_batch, safe_row * o_row + head64 * o_head, 1, DIM_V, BLOCK_DV, exists)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    place_of_row = (batch64 * HEADS + head64) * q_len + safe_row
    lse = tl.load(lse_ptr + place_of_row, mask=exists, other=float("-inf")) * LOG2_E
    # A row without keys: every weight is 0.
    lse = tl.where(lse > float("-inf"), lse, float("inf"))
    if LSE_GRAD:
        delta -= tl.load(grad_lse_ptr + place_of_row, mask=exists, other=0.0)
    # Every row is in a tile of streaming rows, even where that has nothing else to do for it.
    leave = exists & (is_last == 0)
    stacked = ((batch64 * HEADS + head64) // KEY_GROUP * q_len + safe_row) * KEY_GROUP + head64 % KEY_GROUP
    tl.store(row_lse_ptr + stacked, lse, mask=leave)
    tl.store(delta_ptr + stacked, delta, mask=leave)

    key_base = key_ptr + batch64 * k_batch + kv_head.to(tl.int64) * k_head
    value_base = value_ptr + batch64 * v_batch + kv_head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale2 = scale * LOG2_E
    column = tl.arange(0, BLOCK_N)
    for step in tl.range(0, masked, num_stages=STAGES):
        block = tl.where(step < masked_front, step, step - masked_front + full_end)
        wide, used, allowed = masked_keys(
            block, empty, sinks, sink_low, low, mask_row, position, start + sink, span, reach, BLOCK_N, PADDED, REACH
        )
        key = load_rows(key_base, wide * k_row, 1, DIM, BLOCK_D, used)
        value = load_rows(value_base, wide * v_row, 1, DIM_V, BLOCK_DV, used)
        acc = _add_keys(acc, query, grad, lse, delta, key, value, allowed, scale2, FLOAT32, SOFTCAP)

    front_place = low - sinks - empty + masked_front * BLOCK_N
    for step in tl.range(0, full_end - masked_front, num_stages=STAGES):
        wide = (front_place + step * BLOCK_N).to(tl.int64)
        key = load_rows(key_base + wide * k_row, column, k_row, DIM, BLOCK_D, None)
        value = load_rows(value_base + wide * v_row, column, v_row, DIM_V, BLOCK_DV, None)
        acc = _add_keys(acc, query, grad, lse, delta, key, value, None, scale2, FLOAT32, SOFTCAP)

    mine = exists
    if is_last:
        if splits > 1:
            item = (batch64 * HEAD_BLOCKS + head_block) * last_tiles + tile
            parts = part_ptr + item * splits * BLOCK_M * DIM
            store_part(parts, acc, split, DIM, BLOCK_M, BLOCK_D)
            if not all_arrived(counter_ptr, item, splits):
                mine = mine & False
            else:
                acc = sum_parts(parts, splits, DIM, BLOCK_M, BLOCK_D)
    else:
        mine = exists & ((position < last_low) | (position >= end))
    column_d = tl.arange(0, BLOCK_D)
    pointers = grad_query_ptr + batch64 * gq_batch + (safe_row * gq_row + head64 * gq_head)[:, None] + column_d[None, :]
    keep = mine[:, None]
    if DIM != BLOCK_D:
        keep = keep & (column_d < DIM)[None, :]
    tl.store(pointers, (acc * scale).to(grad_query_ptr.dtype.element_ty), mask=keep)
