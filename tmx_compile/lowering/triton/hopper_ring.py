"""The copying warp of the Hopper kernel: queries, and a ring of key and value blocks, into shared memory.

Importing this module needs Triton with Gluon for Hopper.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tmx_compile.lowering.triton.hopper_walk import item, layout_slots, schedule

# Computing groups of a CTA: they share every key block, so that half as many keys go through the caches.
CONSUMERS = gl.constexpr(2)


class Common(NamedTuple):
    """What the copying warp and the computing groups of a CTA have in common."""

    q_desc: Any
    k_desc: Any
    v_desc: Any
    piece_k: Any  # the same keys in pieces of 16 by 64 columns
    piece_v: Any
    o_desc: Any
    q_full: Any  # barriers: QUERIES slots of queries, and STAGES slots of keys and of values
    q_empty: Any
    k_full: Any
    v_full: Any
    kv_empty: Any  # one step of the groups frees the keys of a block and the values of the one before
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
def keys_of(buf, KEYS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """The (KEYS, BLOCK_D) matrix at the start of a slot of the ring."""
    if KEYS == BLOCK_N:
        matrix = buf.reshape([BLOCK_N, BLOCK_D])
    else:
        matrix = buf._reinterpret(buf.dtype, [BLOCK_N // KEYS, 1, 1, KEYS, BLOCK_D], buf.layout)
        matrix = matrix.index(0).reshape([KEYS, BLOCK_D])
    return matrix


@gluon.jit
def _copy_pieces(desc, first_slot, far, work, shift, kv_head, bar, buf, KEYS: gl.constexpr, BLOCK_D: gl.constexpr):
    """A block that may hold sinks, in pieces of 16 keys by 64 columns (one swizzle row wide)."""
    HALVES: gl.constexpr = BLOCK_D // 64
    PIECES: gl.constexpr = KEYS // 16
    pieces = buf._reinterpret(desc.dtype, [HALVES * PIECES, 1, 1, 16, 64], desc.layout)
    for piece in gl.static_range(PIECES):
        slot = first_slot + piece * 16
        at = gl.where(slot < far, work.sink_low + slot, shift + slot)
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                desc, [work.batch, kv_head, at, half * 64], bar, pieces.index(half * PIECES + piece)
            )


@gluon.jit
def _copy(
    common, desc, piece, full, bufs, loaded, free, first_slot, far, work, shift, kv_head,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A block of ``KEYS`` keys or values into the ring, as block ``loaded`` of all of the CTA's.

    Their slot is free once the groups have gone through block ``free - STAGES``.
    """
    mbarrier.wait(common.kv_empty.index(free % STAGES), (free // STAGES & 1) ^ 1)
    bar = full.index(loaded % STAGES)
    buf = bufs.index(loaded % STAGES)
    mbarrier.expect(bar, desc.block_type.nbytes * KEYS // BLOCK_N)
    if KEYS == BLOCK_N:
        if first_slot < far:
            _copy_pieces(piece, first_slot, far, work, shift, kv_head, bar, buf, KEYS, BLOCK_D)
        else:
            tma.async_copy_global_to_shared(desc, [work.batch, kv_head, first_slot + shift, 0], bar, buf)
    else:
        _copy_pieces(piece, first_slot, far, work, shift, kv_head, bar, buf, KEYS, BLOCK_D)


@gluon.jit
def _copy_keys(
    common, loaded, first_slot, far, work, shift, kv_head,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _copy(
        common, common.k_desc, common.piece_k, common.k_full, common.k_bufs, loaded, loaded,
        first_slot, far, work, shift, kv_head, KEYS, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip


@gluon.jit
def _copy_values(
    common, loaded, first_slot, far, work, shift, kv_head,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Of the same block: the groups are through with its values one step later than with its keys."""
    _copy(
        common, common.v_desc, common.piece_v, common.v_full, common.v_bufs, loaded, loaded + 1,
        first_slot, far, work, shift, kv_head, KEYS, BLOCK_N, BLOCK_D, STAGES,
    )  # fmt: skip


@gluon.jit
def produce(
    common,
    GROUP: gl.constexpr, HEADS: gl.constexpr, KV_HEADS: gl.constexpr, HEAD_BOX: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, FIRST: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr, PADDED: gl.constexpr,
    REACH: gl.constexpr,
):  # fmt: skip
    """The copying warp: queries ``QUERIES`` tiles deep, sinks, and a ring of key and value blocks.

    After the last item come queries and keys of one more, whose scores the groups start before that item's end.
    """
    q_desc = common.q_desc
    counts = common.counts
    POSITIONS: gl.constexpr = 64 // HEAD_BOX
    ROWS: gl.constexpr = POSITIONS * CONSUMERS
    offset = counts.kv_len - counts.q_len
    share = schedule(counts)
    loaded = 0
    for index in range(share.items + 1):
        work = item(index, share, counts, common.extent_ptr, GROUP, HEADS, ROWS, PADDED, REACH)
        kv_head = work.head_block * GROUP // (HEADS // KV_HEADS)
        q_slot = index % QUERIES
        mbarrier.wait(common.q_empty.index(q_slot), (index // QUERIES & 1) ^ 1)
        mbarrier.expect(common.q_full.index(q_slot), CONSUMERS * q_desc.block_type.nbytes)
        for c in gl.static_range(CONSUMERS):
            tma.async_copy_global_to_shared(
                q_desc,
                [work.batch, work.head_block * GROUP, work.first + c * POSITIONS - offset, 0],
                common.q_full.index(q_slot),
                common.q_bufs.index(q_slot * CONSUMERS + c),
            )
        far, blocks, shift = layout_slots(work.sinks, work.low, work.high, FIRST, BLOCK_N)
        _copy_keys(common, loaded, 0, far, work, shift, kv_head, FIRST, BLOCK_N, BLOCK_D, STAGES)
        if index < share.items:
            _copy_values(common, loaded, 0, far, work, shift, kv_head, FIRST, BLOCK_N, BLOCK_D, STAGES)
            loaded += 1
            for block in range(1, blocks):
                first_slot = FIRST + (block - 1) * BLOCK_N
                _copy_keys(common, loaded, first_slot, far, work, shift, kv_head, BLOCK_N, BLOCK_N, BLOCK_D, STAGES)
                _copy_values(common, loaded, first_slot, far, work, shift, kv_head, BLOCK_N, BLOCK_N, BLOCK_D, STAGES)
                loaded += 1
