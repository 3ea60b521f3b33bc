"""The kernel for Hopper GPUs: warp-specialised, persistent, keys through the tensor memory accelerator.

The same walk over the same mask as :mod:`kernel`, arranged as FlashAttention-3 is (Shah et al. 2024, sections 3.1
and 3.2): one warp copies, two groups of four warps compute, 64 stacked rows each. The softmax of a block runs beside
products of the other group and the group's own with the values before. A CTA stays and takes one tile after another: a
tile's last product runs beside the next one's first softmax. The last rows are work items like the tiles.

Tried without gain: groups that start their products in turn, barriers waited for a step ahead, a softmax in pieces that
sums without shuffles. What pays most is told where it stands: in ``_end``, ``hopper_scores`` and ``tuning``.

Importing this module needs Triton with Gluon for Hopper (``triton.experimental.gluon``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tmx_compile.lowering.triton.hopper_result import NO_MAXIMUM, barrier, finish, merge, store, store_lse
from tmx_compile.lowering.triton.hopper_ring import CONSUMERS, Common, keys_of, produce
from tmx_compile.lowering.triton.hopper_scores import mask_end, mask_front, softmax
from tmx_compile.lowering.triton.hopper_walk import Counts, item, layout_slots, masked_slots, schedule


class Rows(NamedTuple):
    """A group's 64 stacked rows of an item."""

    index: Any  # the item's number in the CTA's share
    work: Any
    first: Any  # position
    query: Any
    shift: Any
    masked_front: Any
    masked_end: Any
    mask_ptr: Any  # of the sequence


@gluon.jit
def _start(
    common, acc, weights, taken, query, S: gl.constexpr,
    KEYS: gl.constexpr, NEXT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start two products: of queries and the next ``NEXT`` keys, of weights and the ``KEYS`` values before them."""
    slot = taken % STAGES
    next_slot = (taken + 1) % STAGES
    mbarrier.wait(common.k_full.index(next_slot), (taken + 1) // STAGES & 1)
    mbarrier.wait(common.v_full.index(slot), taken // STAGES & 1)
    keys = keys_of(common.k_bufs.index(next_slot), NEXT, BLOCK_N, BLOCK_D).permute((1, 0))
    scores = warpgroup_mma(query, keys, gl.zeros([64, NEXT], gl.float32, S), use_acc=False, is_async=True)
    values = keys_of(common.v_bufs.index(slot), KEYS, BLOCK_N, BLOCK_D)
    product = warpgroup_mma(weights, values, acc, is_async=True)
    return scores, product


@gluon.jit
def _end(common, product, weights, taken, STAGES: gl.constexpr):
    """Wait for the second product of :func:`_start`, and free what both read."""
    next_slot = (taken + 1) % STAGES
    # Already there. It is a jump, and the softmax stays before it; ptxas would move the softmax behind the next wait.
    mbarrier.wait(common.k_full.index(next_slot), (taken + 1) // STAGES & 1)
    acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
    mbarrier.arrive(common.kv_empty.index(next_slot), count=1)
    return acc


@gluon.jit
def _release(common, index, QUERIES: gl.constexpr):
    """Free the query slot of the item before, once its result was copied from there."""
    tma.store_wait(0)
    mbarrier.arrive(common.q_empty.index((index + QUERIES - 1) % QUERIES), count=1, pred=index > 0)


@gluon.jit
def _step(
    common, rows, acc, weights, maximum, total, taken, block, RELEASE: gl.constexpr, POSITIONS: gl.constexpr,
    S: gl.constexpr, P: gl.constexpr, OUT: gl.constexpr, KEYS: gl.constexpr, FIRST: gl.constexpr,
    MANY_SINKS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """One block of keys, and the values of the block before, which has ``KEYS`` of them."""
    pending, product = _start(common, acc, weights, taken, rows.query, S, KEYS, BLOCK_N, BLOCK_N, BLOCK_D, STAGES)
    if RELEASE:
        _release(common, rows.index, QUERIES)
    scores = warpgroup_mma_wait(1, deps=[pending])
    first_slot = FIRST + (block - 1) * BLOCK_N
    if first_slot < rows.masked_front:
        scores = mask_front(
            scores, rows.first, first_slot, rows.shift, rows.work, common.counts, rows.mask_ptr, POSITIONS, S,
            BLOCK_N, MANY_SINKS, PADDED, REACH,
        )  # fmt: skip
    if first_slot + BLOCK_N > rows.masked_end:
        scores = mask_end(scores, rows.first, first_slot, rows.shift, POSITIONS, S, BLOCK_N)
    next_weights, more, maximum, shrink = softmax(scores, maximum, common.scale)
    total = total * shrink + more
    acc = _end(common, product, weights, taken, STAGES)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return acc, gl.convert_layout(next_weights.to(common.k_desc.dtype), P), maximum, total, taken + 1


@gluon.jit
def _begin(
    scores, c, work, common, POSITIONS: gl.constexpr, S: gl.constexpr,
    FIRST: gl.constexpr, BLOCK_N: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """(weights, maximum, total) of an item's first block."""
    first = work.first + c * POSITIONS
    far, blocks, shift = layout_slots(work.sinks, work.low, work.high, FIRST, BLOCK_N)
    masked_front, masked_end = masked_slots(work, first, far, blocks, shift, POSITIONS, FIRST, BLOCK_N)
    if masked_front > 0:
        mask_ptr = common.mask_ptr
        if PADDED:
            mask_ptr = common.mask_ptr + work.batch.to(gl.int64) * common.mask_batch
        scores = mask_front(
            scores, first, 0, shift, work, common.counts, mask_ptr, POSITIONS, S, FIRST, True, PADDED, REACH
        )
    # A smaller first block is never an item's last one.
    if FIRST == BLOCK_N:
        if masked_end < FIRST:
            scores = mask_end(scores, first, 0, shift, POSITIONS, S, FIRST)
    none = gl.full([64], NO_MAXIMUM, gl.float32, gl.SliceLayout(1, S))
    weights, total, maximum, _none = softmax(scores, none, common.scale)
    return weights, maximum, total


@gluon.jit
def _consume(
    c, common,
    GROUP: gl.constexpr, HEADS: gl.constexpr, HEAD_BOX: gl.constexpr, DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, FIRST: gl.constexpr, MANY_SINKS: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr, WRITE_LSE: gl.constexpr, COPY_OUT: gl.constexpr,
):  # fmt: skip
    """A computing group of four warps: 64 stacked rows of every tile, number ``c`` of the CTA's groups."""
    counts, q_bufs = common.counts, common.q_bufs
    POSITIONS: gl.constexpr = 64 // HEAD_BOX
    ROWS: gl.constexpr = POSITIONS * CONSUMERS
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    S_FIRST: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, FIRST, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    dtype: gl.constexpr = common.k_desc.dtype
    share = schedule(counts)

    # The first block of the first item: of each other one it is computed at the end of the item before.
    work = item(0, share, counts, common.extent_ptr, GROUP, HEADS, ROWS, PADDED, REACH)
    mbarrier.wait(common.q_full.index(0), 0)
    mbarrier.wait(common.k_full.index(0), 0)
    keys = keys_of(common.k_bufs.index(0), FIRST, BLOCK_N, BLOCK_D).permute((1, 0))
    scores = warpgroup_mma(
        q_bufs.index(c).reshape([64, BLOCK_D]), keys, gl.zeros([64, FIRST], gl.float32, S_FIRST), use_acc=False
    )
    mbarrier.arrive(common.kv_empty.index(0), count=1)
    next_weights, next_maximum, next_total = _begin(
        scores, c, work, common, POSITIONS, S_FIRST, FIRST, BLOCK_N, PADDED, REACH
    )
    weights = gl.convert_layout(next_weights.to(dtype), P)
    maximum, total = gl.convert_layout(next_maximum, ROW), gl.convert_layout(next_total, ROW)
    taken = 0
    for index in range(share.items):
        first = work.first + c * POSITIONS
        mask_ptr = common.mask_ptr
        if PADDED:
            mask_ptr = common.mask_ptr + work.batch.to(gl.int64) * common.mask_batch
        slot = index % QUERIES * CONSUMERS + c
        far, blocks, shift = layout_slots(work.sinks, work.low, work.high, FIRST, BLOCK_N)
        masked_front, masked_end = masked_slots(work, first, far, blocks, shift, POSITIONS, FIRST, BLOCK_N)
        query = q_bufs.index(slot).reshape([64, BLOCK_D])
        rows = Rows(index, work, first, query, shift, masked_front, masked_end, mask_ptr)
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
        if FIRST == BLOCK_N:
            if COPY_OUT:
                _release(common, index, QUERIES)
            wide = weights
            START: gl.constexpr = 1
        else:
            # Of the first block the weights have another shape.
            acc, wide, maximum, total, taken = _step(
                common, rows, acc, weights, maximum, total, taken, 1, COPY_OUT, POSITIONS, S, P, OUT, FIRST, FIRST,
                MANY_SINKS, BLOCK_N, BLOCK_D, STAGES, QUERIES, PADDED, REACH,
            )  # fmt: skip
            START: gl.constexpr = 2
        for block in range(START, blocks):
            acc, wide, maximum, total, taken = _step(
                common, rows, acc, wide, maximum, total, taken, block, False, POSITIONS, S, P, OUT, BLOCK_N, FIRST,
                MANY_SINKS, BLOCK_N, BLOCK_D, STAGES, QUERIES, PADDED, REACH,
            )  # fmt: skip

        # The last values, beside the first block of the next item.
        following = item(index + 1, share, counts, common.extent_ptr, GROUP, HEADS, ROWS, PADDED, REACH)
        next_q = (index + 1) % QUERIES
        mbarrier.wait(common.q_full.index(next_q), (index + 1) // QUERIES & 1)
        next_query = q_bufs.index(next_q * CONSUMERS + c).reshape([64, BLOCK_D])
        pending, product = _start(
            common, acc, wide, taken, next_query, S_FIRST, BLOCK_N, FIRST, BLOCK_N, BLOCK_D, STAGES
        )
        scores = warpgroup_mma_wait(1, deps=[pending])
        next_weights, next_maximum, next_total = _begin(
            scores, c, following, common, POSITIONS, S_FIRST, FIRST, BLOCK_N, PADDED, REACH
        )
        acc = _end(common, product, wide, taken, STAGES)
        taken += 1
        weights = gl.convert_layout(next_weights.to(dtype), P)

        acc, lse = finish(acc, maximum, total, OUT)
        acc, lse, wrote = merge(acc, lse, c, work, common, HEADS // GROUP, BLOCK_D, ROW, OUT)
        if WRITE_LSE:
            store_lse(common, lse, work, first, wrote, HEADS, GROUP, POSITIONS, ROW)
        store(common, acc, work, first, wrote, slot, GROUP, POSITIONS, DIM, BLOCK_D, COPY_OUT)
        if not COPY_OUT:
            mbarrier.arrive(common.q_empty.index(index % QUERIES), count=1)
        work = following
        maximum, total = gl.convert_layout(next_maximum, ROW), gl.convert_layout(next_total, ROW)
    if COPY_OUT:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "sink", "window", "last", "reach", "last_items", "last_tiles", "splits", "split_keys",
        "tiles", "stream_items", "head_start",
    ]
)  # fmt: skip
def hopper_kernel(
    q_desc, k_desc, v_desc, piece_k, piece_v, o_desc,
    out_ptr, lse_ptr, mask_ptr, extent_ptr, part_ptr, counter_ptr,
    o_batch, o_head, o_row, mask_batch,
    q_len, kv_len, sink, window, last, reach, scale,
    last_items, last_tiles, splits, split_keys, tiles, stream_items, head_start,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_BOX: gl.constexpr, DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, FIRST: gl.constexpr, MANY_SINKS: gl.constexpr,
    STAGES: gl.constexpr, QUERIES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr, WRITE_LSE: gl.constexpr,
    COPY_OUT: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See the module. Strides are in elements.

    An item's first block has ``FIRST`` keys, the others ``BLOCK_N``. ``MANY_SINKS``: there are more than ``FIRST``.
    ``COPY_OUT``: the copy engine can write the result, for a head's rows in a group of heads that is a power of two.
    """
    dtype: gl.constexpr = k_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [QUERIES * CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    barrier()
    counts = Counts(
        q_len, kv_len, sink, window, last, reach, last_items, last_tiles, splits, split_keys, tiles, stream_items,
        head_start,
    )  # fmt: skip
    common = Common(
        q_desc, k_desc, v_desc, piece_k, piece_v, o_desc, q_full, q_empty, k_full, v_full, kv_empty, q_bufs,
        k_bufs, v_bufs, counts, extent_ptr, part_ptr, counter_ptr, mask_ptr, out_ptr, lse_ptr, o_batch, o_head, o_row,
        scale, mask_batch,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, common, GROUP, HEADS, HEAD_BOX, DIM, BLOCK_D, BLOCK_N, FIRST, MANY_SINKS, STAGES, QUERIES,
                    PADDED, REACH, WRITE_LSE, COPY_OUT,
                ),
            ),
            (
                _consume,
                (
                    1, common, GROUP, HEADS, HEAD_BOX, DIM, BLOCK_D, BLOCK_N, FIRST, MANY_SINKS, STAGES, QUERIES,
                    PADDED, REACH, WRITE_LSE, COPY_OUT,
                ),
            ),
            (
                produce,
                (common, GROUP, HEADS, KV_HEADS, HEAD_BOX, BLOCK_D, BLOCK_N, FIRST, STAGES, QUERIES, PADDED, REACH),
            ),
        ],
        [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
