"""The kernel that looks at a few rows of each block of rows, against every key that they see.

It computes what :mod:`tmx_compile.operator.dynamic.sampled` does, up to the softmax: of each sampled row the
log-sum-exp over each block of keys. Sampled rows of several blocks of rows make one tile.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tmx_compile.lowering.triton.tiles import load_rows


@triton.jit(do_not_specialize=["first_group", "groups", "kv_len", "columns", "row_offset"])
def sampled_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,  # (B, Skv) bool, with PADDED
    local_ptr,  # (B, H, groups, columns) float32: what is computed
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    mask_batch,
    first_group,  # of rows, by its place among all groups
    groups,
    kv_len,
    columns,
    row_offset,  # the position of row 0
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # sampled rows of a program
    SPAN: tl.constexpr,  # blocks of keys of a program
    PADDED: tl.constexpr,
    FLOAT32: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of ROWS sampled rows along SPAN blocks of keys. Strides are in elements."""
    place = tl.program_id(2).to(tl.int64)
    head = place % HEADS
    batch = place // HEADS
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = first_group + number
    # As in place_in_group; of a group with few rows the nearest one that exists.
    wanted = group * STRIDE + (5 * group + STRIDE // 2) % STRIDE
    position = tl.minimum(tl.maximum(wanted, row_offset), kv_len - 1)
    exists = (number < groups) & (position // STRIDE == group)
    row = (position - row_offset).to(tl.int64)
    query = load_rows(query_ptr + batch * q_batch + head * q_head, row * q_row, 1, DIM, BLOCK_D, exists)
    key_base = key_ptr + batch * k_batch + head // (HEADS // KV_HEADS) * k_head
    line = local_ptr + (place * groups + number) * columns
    lowest = (first_group + tl.program_id(0) * ROWS) * STRIDE
    first = tl.program_id(1) * SPAN
    stop = tl.minimum(tl.minimum(first + SPAN, (lowest + ROWS * STRIDE - 1) // BLOCK + 1), columns)
    # Blocks before every row of the tile need no mask where there is no padding.
    whole = first
    if not PADDED:
        whole = tl.minimum(tl.maximum(lowest // BLOCK, first), stop)
    inside = tl.arange(0, BLOCK)
    span_base = key_base + first.to(tl.int64) * BLOCK * k_row
    for column in tl.range(first, whole, num_stages=STAGES):
        key = load_rows(span_base + (column - first) * BLOCK * k_row, inside, k_row, DIM, BLOCK_D, None)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3" if FLOAT32 else "tf32") * scale
        largest = tl.max(scores, 1)
        total = tl.sum(tl.exp2(scores - largest[:, None]), 1)
        tl.store(line + column, (largest + tl.log2(total)) * 0.6931471805599453, mask=number < groups)
    for column in tl.range(whole, stop, num_stages=1):
        key_place = column * BLOCK + inside
        used = key_place < kv_len
        if PADDED:
            used = used & (tl.load(mask_ptr + batch * mask_batch + key_place, mask=used, other=0) != 0)
        key = load_rows(key_base, key_place.to(tl.int64) * k_row, 1, DIM, BLOCK_D, used)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3" if FLOAT32 else "tf32") * scale
        allowed = (key_place[None, :] <= position[:, None]) & used[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        largest = tl.max(scores, 1)
        some = largest > float("-inf")
        safe = tl.where(some, largest, 0.0)
        total = tl.sum(tl.exp2(scores - safe[:, None]), 1)
        local = tl.where(some, (safe + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(line + column, local, mask=number < groups)
