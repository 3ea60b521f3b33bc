"""The kernel that looks at a few rows of each block of rows, against every key that they see.

It computes what :mod:`tmx_compile.operator.dynamic.sampled` does, up to the softmax: of each sampled row the
log-sum-exp over each block of keys. The heads that share a key head, and several blocks of rows, make one tile: few
blocks of keys are near enough to it to need a mask.

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
    scale,  # positive, times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    TOGETHER: tl.constexpr,  # heads of a program, which share a key head
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
    OF_HEAD: tl.constexpr = ROWS // TOGETHER
    place = tl.program_id(2)
    head_block = place % (HEADS // TOGETHER)
    batch = (place // (HEADS // TOGETHER)).to(tl.int64)
    first_number = tl.program_id(0) * OF_HEAD
    lowest = (first_group + first_number) * STRIDE
    first = tl.program_id(1) * SPAN
    stop = tl.minimum(tl.minimum(first + SPAN, (lowest + OF_HEAD * STRIDE - 1) // BLOCK + 1), columns)
    if first >= stop:
        return
    tile = tl.arange(0, ROWS)
    head = (head_block * TOGETHER + tile // OF_HEAD).to(tl.int64)
    number = first_number + tile % OF_HEAD
    used_row = (tile < TOGETHER * OF_HEAD) & (number < groups)
    group = first_group + number
    # As in place_in_group; of a group with few rows the nearest one that exists.
    wanted = group * STRIDE + (5 * group + STRIDE // 2) % STRIDE
    position = tl.minimum(tl.maximum(wanted, row_offset), kv_len - 1)
    exists = used_row & (position // STRIDE == group)
    row = (position - row_offset).to(tl.int64)
    query = load_rows(query_ptr + batch * q_batch, head * q_head + row * q_row, 1, DIM, BLOCK_D, exists)
    key_head = head_block * TOGETHER // (HEADS // KV_HEADS)
    key_base = key_ptr + batch * k_batch + key_head.to(tl.int64) * k_head
    line = local_ptr + ((batch * HEADS + head) * groups + number) * columns
    # Blocks before every row of the tile need no mask where there is no padding.
    whole = first
    if not PADDED:
        whole = tl.minimum(tl.maximum(lowest // BLOCK, first), stop)
    inside = tl.arange(0, BLOCK)
    span_base = key_base + first.to(tl.int64) * BLOCK * k_row
    for column in tl.range(first, whole, num_stages=STAGES):
        key = load_rows(span_base + (column - first) * BLOCK * k_row, inside, k_row, DIM, BLOCK_D, None)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3" if FLOAT32 else "tf32")
        largest = tl.max(scores, 1) * scale
        total = tl.sum(tl.exp2(scores * scale - largest[:, None]), 1)
        tl.store(line + column, (largest + tl.log2(total)) * 0.6931471805599453, mask=used_row)
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
        tl.store(line + column, local, mask=used_row)
