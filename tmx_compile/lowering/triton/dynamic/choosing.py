"""The kernels that choose blocks: means of groups of tokens, scores between groups, and the lists that follow.

They compute what :mod:`tmx_compile.operator.dynamic.estimate` and :mod:`~tmx_compile.operator.dynamic.choice` do. The
scores are never stored: of each group of rows the log-sum-exp over each block of keys is.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tmx_compile.lowering.triton.tiles import load_rows


@triton.jit(do_not_specialize=["front", "length", "groups"])
def mean_kernel(
    x_ptr,  # (B, H, N, DIM), rows or keys
    mask_ptr,  # (B, N) bool, with PADDED
    mean_ptr,  # (B, H, groups, DIM): what is computed, contiguous
    count_ptr,  # (B, groups) int32: how many of a group exist, contiguous
    x_batch,
    x_head,
    x_row,
    mask_batch,
    front,  # positions of the first group before the first of x
    length,  # N
    groups,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
    PADDED: tl.constexpr,
):
    """Means of groups of one head; 0 of a group of which nothing exists."""
    program = tl.program_id(1).to(tl.int64)
    head = program % HEADS
    batch = program // HEADS
    place = tl.program_id(0) * GROUPS * STRIDE + tl.arange(0, GROUPS * STRIDE) - front
    exists = (place >= 0) & (place < length)
    if PADDED:
        exists = exists & (tl.load(mask_ptr + batch * mask_batch + place, mask=exists, other=0) != 0)
    x = load_rows(x_ptr + batch * x_batch + head * x_head, place.to(tl.int64) * x_row, 1, DIM, BLOCK_D, exists)
    sums = tl.sum(tl.reshape(x.to(tl.float32), [GROUPS, STRIDE, BLOCK_D]), 1)
    count = tl.sum(tl.reshape(exists.to(tl.int32), [GROUPS, STRIDE]), 1)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK_D)
    mean = sums / tl.maximum(count, 1).to(tl.float32)[:, None]
    at = mean_ptr + (program * groups + group[:, None]) * DIM + column[None, :]
    tl.store(at, mean.to(mean_ptr.dtype.element_ty), mask=(group < groups)[:, None] & (column < DIM)[None, :])
    tl.store(count_ptr + batch * groups + group, count, mask=(group < groups) & (head == 0))


@triton.jit(do_not_specialize=["first_group", "groups", "q_offset", "q_len", "kv_len", "key_groups", "columns",
                               "row_offset", "row_end"])  # fmt: skip
def estimate_kernel(
    query_ptr,  # rows, or means of groups of rows where STEPS is 1
    key_ptr,
    keys_of_ptr,  # (B or 1, key groups) int32: valid keys of a group
    mask_ptr,  # (B, Skv) bool, with PADDED and more than one step
    local_ptr,  # (B, H, groups, columns) float32: what is computed
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    keys_of_batch,
    mask_batch,
    first_group,  # of rows, by its place among all groups
    groups,  # of rows
    q_offset,  # what to take from a row's, or group's, place
    q_len,
    kv_len,
    key_groups,
    columns,
    row_offset,  # the position of row 0
    row_end,  # one past that of the last row
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr,
    STEPS: tl.constexpr,  # 1, or STRIDE for antidiagonals
    OF_BLOCK: tl.constexpr,  # groups of a block
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    FLOAT32: tl.constexpr,
):
    """One tile of ROWS groups of rows and KEYS groups of keys. Strides are in elements."""
    place = tl.program_id(2).to(tl.int64)
    head = place % HEADS
    batch = place // HEADS
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = first_group + number
    key_group = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    if tl.program_id(1) * KEYS > first_group + tl.program_id(0) * ROWS + ROWS - 1:
        return
    query_base = query_ptr + batch * q_batch + head * q_head
    key_base = key_ptr + batch * k_batch + head // (HEADS // KV_HEADS) * k_head
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for step in range(STEPS):
        row = group * STEPS + STEPS - 1 - step - q_offset
        key_row = key_group * STEPS + step
        used = key_row < kv_len
        if PADDED:
            if STEPS > 1:
                used = used & (tl.load(mask_ptr + batch * mask_batch + key_row, mask=used, other=0) != 0)
        query = load_rows(query_base, row.to(tl.int64) * q_row, 1, DIM, BLOCK_D, (row >= 0) & (row < q_len))
        key = load_rows(key_base, key_row.to(tl.int64) * k_row, 1, DIM, BLOCK_D, used)
        scores = tl.dot(query, tl.trans(key), scores, input_precision="tf32x3" if FLOAT32 else "tf32")
    exists = key_group < key_groups
    keys_of = tl.load(keys_of_ptr + batch * keys_of_batch + key_group, mask=exists, other=0).to(tl.float32)
    scores = scores * scale
    if STEPS > 1:
        # A mean over all pairs of a full group: what is missing is made up for.
        rows_of = tl.minimum(row_end, (group + 1) * STRIDE) - tl.maximum(row_offset, group * STRIDE)
        missing = STRIDE / tl.maximum(rows_of, 1).to(tl.float32)
        scores = scores * missing[:, None] / tl.maximum(keys_of, 1.0)[None, :]
    allowed = (key_group[None, :] <= group[:, None]) & (keys_of > 0)[None, :]
    # As many keys as a group has, each with the group's score.
    scores = tl.where(allowed, scores + tl.log(tl.maximum(keys_of, 1.0))[None, :], float("-inf"))
    BLOCKS: tl.constexpr = KEYS // OF_BLOCK
    parts = tl.reshape(scores, [ROWS, BLOCKS, OF_BLOCK])
    largest = tl.max(parts, 2)
    some = largest > float("-inf")
    safe = tl.where(some, largest, 0.0)
    local = tl.where(some, safe + tl.log(tl.sum(tl.exp(parts - safe[:, :, None]), 2)), float("-inf"))
    column = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = local_ptr + (place * groups + number[:, None]) * columns + column[None, :]
    tl.store(at, local, mask=(number < groups)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["start", "end", "sink_end", "last_low", "first_block", "first_row", "rows", "groups",
                               "columns", "row_offset", "row_end"])  # fmt: skip
def choose_kernel(
    local_ptr,  # (B, H, groups, columns) float32 of some rows of blocks
    bounds_ptr,  # (B, 4) int32: start, end, sink_end, last_low, in blocks; with PADDED
    blocks_ptr,  # (B, H, rows, columns) int16
    counts_ptr,  # (B, H, rows) int32
    start,  # those bounds of every sequence, without
    end,
    sink_end,
    last_low,
    first_block,  # the block of the first row of blocks here
    first_row,  # its place among all rows of blocks
    rows,
    groups,
    columns,
    row_offset,
    row_end,
    share,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    OF_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,  # groups that are looked at at once
    COLUMNS: tl.constexpr,  # a power of two
    WHOLE: tl.constexpr,  # whether everything possible is kept
    PEAK: tl.constexpr,  # a block's mass is that of the group which pays it most, not the sum
    PADDED: tl.constexpr,
):
    """The list of one row of blocks of one head."""
    here = tl.program_id(0)
    place = tl.program_id(1).to(tl.int64)
    own = first_block + here
    if PADDED:
        bounds = bounds_ptr + place // HEADS * 4
        start, end = tl.load(bounds), tl.load(bounds + 1)
        sink_end, last_low = tl.load(bounds + 2), tl.load(bounds + 3)
    column = tl.arange(0, COLUMNS)
    possible = (column <= own) & (column >= start) & (column < end)
    always = possible & ((column >= own - 1) | (column < sink_end))
    is_whole = (own >= last_low) & (own < end)
    if WHOLE:
        is_whole = own >= 0
    chosen = possible
    if is_whole == 0:
        masses = tl.zeros([COLUMNS], tl.float32)
        for step in range(OF_BLOCK // PARTS):
            part = step * PARTS + tl.arange(0, PARTS)
            at = local_ptr + (place * groups + here * OF_BLOCK + part)[:, None] * columns + column[None, :]
            local = tl.load(at, mask=possible[None, :], other=float("-inf"))
            largest = tl.max(local, 1)
            weights = tl.exp(local - tl.where(largest > float("-inf"), largest, 0.0)[:, None])
            total = tl.sum(weights, 1)
            first = (own * OF_BLOCK + part) * STRIDE
            exists = (first + STRIDE > row_offset) & (first < row_end) & (total > 0)
            shares = tl.where(exists[:, None], weights / tl.where(total > 0, total, 1.0)[:, None], 0.0)
            masses = tl.maximum(masses, tl.max(shares, 0)) if PEAK else masses + tl.sum(shares, 0)
        wanted = tl.sum(masses, 0) * share - tl.sum(tl.where(always, masses, 0.0), 0)
        others = tl.where(always, 0.0, masses)
        # The largest threshold above which the others hold what is wanted: masses are not negative, and ordered as
        # their bits are.
        bits = others.to(tl.int32, bitcast=True)
        low = tl.sum(tl.zeros([COLUMNS], tl.int32), 0)
        high = tl.max(bits, 0) + 1
        while high - low > 1:
            middle = low + (high - low) // 2
            holds = tl.sum(tl.where(bits >= middle, others, 0.0), 0) >= wanted
            low = tl.where(holds, middle, low)
            high = tl.where(holds, high, middle)
        low = tl.where(wanted > 0, tl.maximum(low, 1), high)
        chosen = always | (possible & (bits >= low))
    ones = chosen.to(tl.int32)
    slot = tl.cumsum(ones, 0) - 1
    line = place * rows + first_row + here
    tl.store(blocks_ptr + line * columns + slot, column.to(tl.int16), mask=chosen)
    tl.store(counts_ptr + line, tl.sum(ones, 0))
