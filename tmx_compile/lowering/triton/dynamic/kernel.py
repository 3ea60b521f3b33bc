"""The general kernel of block-sparse attention: one program for each block of rows of a head, along its list.

Blocks of keys before the rows' own need no mask where there is no padding; a row's own block is the last of its list.
Rows far down visit most, so their programs come first. Heads that share keys are neighbours: what one reads, the
others find in the cache.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tmx_compile.lowering.triton.kernel import NO_MAXIMUM, add_keys
from tmx_compile.lowering.triton.tiles import load_rows


@triton.jit(do_not_specialize=["q_len", "kv_len", "rows", "columns"])
def block_sparse_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    mask_ptr,  # (B, Skv) bool, with PADDED
    blocks_ptr,  # (B, H, rows, columns) int16
    counts_ptr,  # (B, H, rows) int32
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
    rows,
    columns,
    scale,  # times log2(e)
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # keys a step, a divisor of BLOCK
    PADDED: tl.constexpr,
    FLOAT32: tl.constexpr,
    STAGES: tl.constexpr,
):
    """See the module. Strides are in elements; the last dimension of every tensor is contiguous."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    PER: tl.constexpr = BLOCK // STEP
    program = tl.program_id(0)
    rest = program // (rows * GROUP)
    kv_head = rest % KV_HEADS
    batch = (rest // KV_HEADS).to(tl.int64)
    inner = program % (rows * GROUP)
    head = (kv_head * GROUP + inner % GROUP).to(tl.int64)
    row_of_blocks = rows - 1 - inner // GROUP
    offset = kv_len - q_len
    own = offset // BLOCK + row_of_blocks

    position = own * BLOCK + tl.arange(0, BLOCK)
    exists = (position >= offset) & (position < kv_len)
    row = tl.minimum(tl.maximum(position - offset, 0), q_len - 1).to(tl.int64)
    query = load_rows(query_ptr + batch * q_batch + head * q_head, row, q_row, DIM, BLOCK_D, exists)
    key_base = key_ptr + batch * k_batch + kv_head.to(tl.int64) * k_head
    value_base = value_ptr + batch * v_batch + kv_head.to(tl.int64) * v_head
    line = (batch * HEADS + head) * rows + row_of_blocks
    count = tl.load(counts_ptr + line)
    list_ptr = blocks_ptr + line * columns
    # Blocks at the end that a mask has to look at: the rows' own; with padding any.
    whole = count
    if PADDED:
        whole = 0
    else:
        final = tl.load(list_ptr + tl.maximum(count - 1, 0)).to(tl.int32)
        whole = tl.where((count > 0) & (final == own), count - 1, count)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    maximum = tl.full([BLOCK], NO_MAXIMUM, tl.float32)
    column = tl.arange(0, STEP)

    for step in tl.range(0, whole * PER, num_stages=STAGES):
        place = tl.load(list_ptr + step // PER).to(tl.int64) * BLOCK + step % PER * STEP
        key = load_rows(key_base + place * k_row, column, k_row, DIM, BLOCK_D, None)
        value = load_rows(value_base + place * v_row, column, v_row, DIM_V, BLOCK_DV, None)
        acc, total, maximum = add_keys(acc, total, maximum, query, key, value, None, scale, FLOAT32, 0.0)

    for step in tl.range(whole * PER, count * PER, num_stages=1):
        place = tl.load(list_ptr + step // PER).to(tl.int64) * BLOCK + step % PER * STEP + column
        used = place < kv_len
        if PADDED:
            used = used & (tl.load(mask_ptr + batch * mask_batch + place, mask=used, other=0) != 0)
        key = load_rows(key_base, place * k_row, 1, DIM, BLOCK_D, used)
        value = load_rows(value_base, place * v_row, 1, DIM_V, BLOCK_DV, used)
        allowed = (place[None, :] <= position[:, None]) & used[None, :]
        acc, total, maximum = add_keys(acc, total, maximum, query, key, value, allowed, scale, FLOAT32, 0.0)

    # A row without any key: total is 0, and so is its result.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    value_column = tl.arange(0, BLOCK_DV)
    out = out_ptr + batch * o_batch + head * o_head + row[:, None] * o_row + value_column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & (value_column < DIM_V)[None, :])
