"""The kernel for Hopper GPUs: warp-specialised, persistent, keys through the tensor memory accelerator.

The same walk over the same mask as :mod:`kernel`, arranged as FlashAttention-3 is (Shah et al. 2024, sections 3.1
and 3.2): one warp copies, two groups of four warps compute, 64 stacked rows each, and the softmax of one block runs
beside the products of the next. A CTA stays and takes one tile after another, so that the copies for the next tile
start before this one ends. The last rows are work items like the tiles.

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

from tmx_compile.lowering.triton.hopper_walk import Counts, item, layout_slots, schedule
from tmx_compile.lowering.triton.tiles import counter
from tmx_compile.lowering.triton.walk import seen

# Of the threads of one group. Triton 3.6 calls it thread_barrier.
_barrier = getattr(gl, "thread_barrier", None) or gl.barrier

_NO_MAXIMUM = gl.constexpr(-3.0e38)
# Computing groups of a CTA: they share every key block, so that half as many keys go through the caches.
CONSUMERS = gl.constexpr(2)


class Common(NamedTuple):
    """What the copying warp and the computing groups of a CTA have in common."""

    q_desc: Any
    k_desc: Any
    v_desc: Any
    piece_k: Any  # the same keys in pieces of 16 by 64 columns
    piece_v: Any
    q_full: Any  # barriers: two query slots, and STAGES slots of keys and of values
    q_empty: Any
    k_full: Any
    v_full: Any
    kv_empty: Any
    q_bufs: Any
    k_bufs: Any
    v_bufs: Any
    counts: Any
    extent_ptr: Any
    part_ptr: Any
    counter_ptr: Any
    mask_ptr: Any
    out_ptr: Any
    lse_ptr: Any
    o_batch: Any
    o_head: Any
    o_row: Any
    scale: Any
    mask_batch: Any


@gluon.jit
def _copy_pieces(
    desc, first_slot, far, sink_low, shift, batch, kv_head, bar, buf, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr
):
    """A block that holds sinks, in pieces of 16 keys by 64 columns (one swizzle row wide)."""
    HALVES: gl.constexpr = BLOCK_D // 64
    PIECES: gl.constexpr = BLOCK_N // 16
    pieces = buf._reinterpret(desc.dtype, [HALVES * PIECES, 1, 1, 16, 64], desc.layout)
    for piece in gl.static_range(PIECES):
        slot = first_slot + piece * 16
        at = gl.where(slot < far, sink_low + slot, shift + slot)
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                desc, [batch, kv_head, at, half * 64], bar, pieces.index(half * PIECES + piece)
            )


@gluon.jit
def _produce(
    common,
    GROUP: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_BOX: gl.constexpr,
    DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """The copying warp: queries two tiles deep, sinks, and a ring of key and value blocks."""
    q_desc, k_desc, v_desc = common.q_desc, common.k_desc, common.v_desc
    q_full, q_empty, k_full, v_full = common.q_full, common.q_empty, common.k_full, common.v_full
    kv_empty, q_bufs, k_bufs, v_bufs = common.kv_empty, common.q_bufs, common.k_bufs, common.v_bufs
    counts = common.counts
    POSITIONS: gl.constexpr = 64 // HEAD_BOX
    ROWS: gl.constexpr = POSITIONS * CONSUMERS
    offset = counts.kv_len - counts.q_len
    share = schedule(counts)
    loaded = 0
    for index in range(share.items):
        work = item(index, share, counts, common.extent_ptr, GROUP, HEADS, ROWS, PADDED, REACH)
        kv_head = work.head_block * GROUP // (HEADS // KV_HEADS)
        q_slot = index % 2
        mbarrier.wait(q_empty.index(q_slot), (index // 2 & 1) ^ 1)
        mbarrier.expect(q_full.index(q_slot), CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc,
                [work.batch, work.head_block * GROUP, work.first + c * POSITIONS - offset, 0],
                q_full.index(q_slot),
                q_bufs.index(q_slot * CONSUMERS + c),
            )
        far, blocks, shift = layout_slots(work.sinks, work.low, work.high, BLOCK_N)
        for block in range(blocks):
            slot = loaded % STAGES
            first_slot = block * BLOCK_N
            mbarrier.wait(kv_empty.index(slot), (loaded // STAGES & 1) ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            if first_slot < far:
                _copy_pieces(
                    common.piece_k, first_slot, far, work.sink_low, shift, work.batch, kv_head,
                    k_full.index(slot), k_bufs.index(slot), BLOCK_N, BLOCK_D,
                )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    k_desc, [work.batch, kv_head, first_slot + shift, 0], k_full.index(slot), k_bufs.index(slot)
                )
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            if first_slot < far:
                _copy_pieces(
                    common.piece_v, first_slot, far, work.sink_low, shift, work.batch, kv_head,
                    v_full.index(slot), v_bufs.index(slot), BLOCK_N, BLOCK_D,
                )  # fmt: skip
            else:
                tma.async_copy_global_to_shared(
                    v_desc, [work.batch, kv_head, first_slot + shift, 0], v_full.index(slot), v_bufs.index(slot)
                )
            loaded += 1


@gluon.jit
def _softmax(scores, maximum, total, scale):
    """The running softmax (base 2): weights of this block, new maximum and total, and what shrinks the old ones."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_maximum, 1))
    shrink = gl.exp2(maximum - new_maximum)
    total = total * shrink + gl.sum(weights, 1)
    return weights, new_maximum, total, shrink


@gluon.jit
def _mask(
    scores, position, first_slot, far, shift, work, counts, mask_ptr,
    layout: gl.constexpr, BLOCK_N: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr,
):  # fmt: skip
    """Drop what a block holds beyond the mask."""
    sink_end = work.start + counts.sink
    slot = first_slot + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    is_sink = slot < far
    place = gl.where(is_sink, work.sink_low + slot, shift + slot)
    used = gl.where(is_sink, slot - work.sinks, gl.maximum(work.low - place - 1, place - work.high)) < 0
    if PADDED:
        if work.holes != 0:
            used = used & (gl.load(mask_ptr + place, mask=used, other=0) != 0)
    row = gl.expand_dims(position, 1)
    key = gl.expand_dims(place, 0)
    allowed = seen(row, key, sink_end, work.span, counts.reach, REACH) & gl.expand_dims(used, 0)
    return gl.where(allowed, scores, float("-inf"))


@gluon.jit
def _consume(
    c, common,
    GROUP: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_BOX: gl.constexpr,
    DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr, WRITE_LSE: gl.constexpr,
):  # fmt: skip
    """A computing group of four warps: 64 stacked rows of every tile, number ``c`` of the CTA's groups."""
    q_full, q_empty, k_full, v_full = common.q_full, common.q_empty, common.k_full, common.v_full
    kv_empty, q_bufs, k_bufs, v_bufs = common.kv_empty, common.q_bufs, common.k_bufs, common.v_bufs
    counts, scale = common.counts, common.scale
    POSITIONS: gl.constexpr = 64 // HEAD_BOX
    ROWS: gl.constexpr = POSITIONS * CONSUMERS
    HEAD_BLOCKS: gl.constexpr = HEADS // GROUP
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    LANES: gl.constexpr = BLOCK_D // 8 if BLOCK_D < 256 else 32
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    dtype: gl.constexpr = common.k_desc.dtype
    kv_len, splits = counts.kv_len, counts.splits
    offset = kv_len - counts.q_len
    share = schedule(counts)
    taken = 0
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, S))
    for index in range(share.items):
        work = item(index, share, counts, common.extent_ptr, GROUP, HEADS, ROWS, PADDED, REACH)
        mine_first = work.first + c * POSITIONS
        mine_stop = gl.minimum(mine_first + POSITIONS, work.stop)
        position = mine_first + row % POSITIONS
        this_mask = common.mask_ptr
        if PADDED:
            this_mask = common.mask_ptr + work.batch.to(gl.int64) * common.mask_batch
        q_slot = index % 2
        mbarrier.wait(q_full.index(q_slot), index // 2 & 1)
        query = q_bufs.index(q_slot * CONSUMERS + c).reshape([64, BLOCK_D])
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
        total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
        maximum = gl.full([64], _NO_MAXIMUM, gl.float32, gl.SliceLayout(1, S))
        far, blocks, shift = layout_slots(work.sinks, work.low, work.high, BLOCK_N)
        # Slots that need a mask: those before `masked_front`, and from `masked_end` on.
        masked_front = gl.maximum(far, gl.maximum(work.low, mine_stop - 1 - work.span) - shift)
        masked_end = mine_first + 1 - shift
        if work.holes != 0:
            masked_front = blocks * BLOCK_N
        slot = taken % STAGES
        mbarrier.wait(k_full.index(slot), taken // STAGES & 1)
        scores = warpgroup_mma(
            query, k_bufs.index(slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)),
            gl.zeros([64, BLOCK_N], gl.float32, S), use_acc=False,
        )  # fmt: skip
        if (masked_front > 0) | (masked_end < BLOCK_N):
            scores = _mask(scores, position, 0, far, shift, work, counts, this_mask, S, BLOCK_N, PADDED, REACH)
        weights, maximum, total, shrink = _softmax(scores, maximum, total, scale)
        weights = gl.convert_layout(weights.to(dtype), P)
        for block in range(1, blocks):
            next_slot = (taken + 1) % STAGES
            mbarrier.wait(k_full.index(next_slot), (taken + 1) // STAGES & 1)
            pending = warpgroup_mma(
                query, k_bufs.index(next_slot).reshape([BLOCK_N, BLOCK_D]).permute((1, 0)),
                gl.zeros([64, BLOCK_N], gl.float32, S), use_acc=False, is_async=True,
            )  # fmt: skip
            slot = taken % STAGES
            mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
            product = warpgroup_mma(weights, v_bufs.index(slot).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[pending])
            if (block * BLOCK_N < masked_front) | (block * BLOCK_N + BLOCK_N > masked_end):
                scores = _mask(
                    scores, position, block * BLOCK_N, far, shift, work, counts, this_mask, S, BLOCK_N, PADDED, REACH
                )
            next_weights, maximum, total, shrink = _softmax(scores, maximum, total, scale)
            acc, weights = warpgroup_mma_wait(0, deps=[product, weights])
            mbarrier.arrive(kv_empty.index(slot), count=1)
            acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
            weights = gl.convert_layout(next_weights.to(dtype), P)
            taken += 1
        slot = taken % STAGES
        mbarrier.wait(v_full.index(slot), taken // STAGES & 1)
        acc = warpgroup_mma(weights, v_bufs.index(slot).reshape([BLOCK_N, BLOCK_D]), acc)
        mbarrier.arrive(kv_empty.index(slot), count=1)
        taken += 1

        # A row without any key: total is 0, and so is its result.
        some = total > 0
        divisor = gl.where(some, total, 1.0)
        lse = gl.where(some, maximum + gl.log2(divisor), float("-inf"))
        acc = acc / gl.expand_dims(gl.convert_layout(divisor, gl.SliceLayout(1, OUT)), 1)
        # Which rows this item writes; the last split to arrive writes for all.
        wrote = 1
        if work.is_last & (splits > 1):
            number = ((work.batch * HEAD_BLOCKS + work.head_block) * counts.last_tiles + work.tile) * CONSUMERS + c
            o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
            o_c = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OUT))
            inner = gl.expand_dims(o_r * BLOCK_D, 1) + gl.expand_dims(o_c, 0)
            part_at = common.part_ptr + number.to(gl.int64) * splits * (64 * BLOCK_D)
            # The log-sum-exps, base 2, lie behind the parts of all last-row items.
            lse_at = common.part_ptr + counts.last_items.to(gl.int64) * (CONSUMERS * 64 * BLOCK_D)
            lse_at += number.to(gl.int64) * splits * 64
            gl.store(part_at + work.split * (64 * BLOCK_D) + inner, acc)
            gl.store(lse_at + work.split * 64 + row, lse)
            # Every thread's stores before the one thread's release.
            _barrier()
            before = gl.atomic_add(counter(common.counter_ptr, number), 1, sem="acq_rel")
            _barrier()
            wrote = (before == splits - 1).to(gl.int32)
            if before == splits - 1:
                # For the next launch.
                gl.store(counter(common.counter_ptr, number), 0)
                acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
                total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
                maximum = gl.full([64], _NO_MAXIMUM, gl.float32, gl.SliceLayout(1, S))
                for other in range(splits):
                    # Past the first-level cache: other multiprocessors wrote these.
                    its_lse = gl.load(lse_at + other * 64 + row, cache_modifier=".cg")
                    its = gl.load(part_at + other * (64 * BLOCK_D) + inner, cache_modifier=".cg")
                    new_maximum = gl.maximum(maximum, its_lse)
                    shrink = gl.exp2(maximum - new_maximum)
                    weight = gl.exp2(its_lse - new_maximum)
                    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
                    acc = acc + its * gl.expand_dims(gl.convert_layout(weight, gl.SliceLayout(1, OUT)), 1)
                    total = total * shrink + weight
                    maximum = new_maximum
                divisor = gl.where(total > 0, total, 1.0)
                lse = gl.where(total > 0, maximum + gl.log2(divisor), float("-inf"))
                acc = acc / gl.expand_dims(gl.convert_layout(divisor, gl.SliceLayout(1, OUT)), 1)

        if WRITE_LSE:
            # To the natural logarithm, (B, H, Sq).
            lse_row = mine_first + row % POSITIONS
            lse_head = row // POSITIONS
            keep_lse = (lse_head < GROUP) & (lse_row < work.stop) & (wrote != 0)
            if work.is_last == 0:
                keep_lse = keep_lse & ((lse_row < work.last_low) | (lse_row >= work.end))
            first_head = work.batch.to(gl.int64) * HEADS + work.head_block * GROUP
            lse_pointers = common.lse_ptr + (first_head + lse_head) * counts.q_len + (lse_row - offset)
            gl.store(lse_pointers, lse * 0.6931471805599453, mask=keep_lse)

        # Through the query's own buffer, which nobody needs any more, to rows that threads can store whole.
        q_buf = q_bufs.index(q_slot * CONSUMERS + c).reshape([64, BLOCK_D])
        q_buf.store(acc.to(dtype))
        _barrier()
        result = q_buf.load(STORE)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(q_slot), count=1)
        r = gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
        column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STORE))
        at_row = mine_first + r % POSITIONS
        head = r // POSITIONS
        mine = (head < GROUP) & (at_row < work.stop) & (wrote != 0)
        if work.is_last == 0:
            mine = mine & ((at_row < work.last_low) | (at_row >= work.end))
        where_row = (at_row - offset).to(gl.int64) * common.o_row
        where_row += (work.head_block * GROUP + head).to(gl.int64) * common.o_head
        whole = common.out_ptr + work.batch.to(gl.int64) * common.o_batch
        pointers = whole + gl.expand_dims(where_row, 1) + gl.expand_dims(column, 0)
        keep = gl.expand_dims(mine, 1)
        if DIM != BLOCK_D:
            keep = keep & gl.expand_dims(column < DIM, 0)
        gl.store(pointers, result, mask=keep)


@gluon.jit(
    do_not_specialize=[
        "q_len", "kv_len", "sink", "window", "last", "reach", "last_items", "last_tiles", "splits", "split_keys",
        "tiles", "stream_items", "head_start",
    ]
)  # fmt: skip
def hopper_kernel(
    q_desc, k_desc, v_desc, piece_k, piece_v,
    out_ptr, lse_ptr, mask_ptr, extent_ptr, part_ptr, counter_ptr,
    o_batch, o_head, o_row, mask_batch,
    q_len, kv_len, sink, window, last, reach, scale,
    last_items, last_tiles, splits, split_keys, tiles, stream_items, head_start,
    HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_BOX: gl.constexpr, DIM: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PADDED: gl.constexpr, REACH: gl.constexpr, WRITE_LSE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See the module. Strides are in elements."""
    dtype: gl.constexpr = k_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [2 * CONSUMERS] + q_desc.block_type.shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    _barrier()
    counts = Counts(
        q_len, kv_len, sink, window, last, reach, last_items, last_tiles, splits, split_keys, tiles, stream_items,
        head_start,
    )  # fmt: skip
    common = Common(
        q_desc, k_desc, v_desc, piece_k, piece_v, q_full, q_empty, k_full, v_full, kv_empty, q_bufs, k_bufs, v_bufs,
        counts, extent_ptr, part_ptr, counter_ptr, mask_ptr, out_ptr, lse_ptr, o_batch, o_head, o_row, scale,
        mask_batch,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _consume,
                (0, common, GROUP, HEADS, KV_HEADS, HEAD_BOX, DIM, BLOCK_D, BLOCK_N, STAGES, PADDED, REACH, WRITE_LSE),
            ),
            (
                _consume,
                (1, common, GROUP, HEADS, KV_HEADS, HEAD_BOX, DIM, BLOCK_D, BLOCK_N, STAGES, PADDED, REACH, WRITE_LSE),
            ),
            (_produce, (common, GROUP, HEADS, KV_HEADS, HEAD_BOX, DIM, BLOCK_D, BLOCK_N, STAGES, PADDED, REACH)),
        ],
        [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
