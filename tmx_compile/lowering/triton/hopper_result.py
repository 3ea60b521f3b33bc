"""What the Hopper kernel does with an item's result: merge the splits of last rows, and write rows.

Importing this module needs Triton with Gluon for Hopper.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from tmx_compile.lowering.triton.hopper_ring import CONSUMERS
from tmx_compile.lowering.triton.tiles import counter

# Of the threads of one group. Triton 3.6 calls it thread_barrier.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier

NO_MAXIMUM = gl.constexpr(-3.0e38)


@gluon.jit
def finish(acc, maximum, total, OUT: gl.constexpr):
    """(result, log-sum-exp base 2) of a softmax over all keys. A row without any: its total is 0, and its result."""
    some = total > 0
    divisor = gl.where(some, total, 1.0)
    lse = gl.where(some, maximum + gl.log2(divisor), float("-inf"))
    return acc * gl.expand_dims(gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, OUT)), 1), lse


@gluon.jit
def merge(
    acc, lse, c, work, common,
    HEAD_BLOCKS: gl.constexpr, BLOCK_D: gl.constexpr, ROW: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """(result, log-sum-exp, whether to write them) of a group's 64 rows; the last split to arrive writes for all."""
    wrote = 1
    counts, part_ptr = common.counts, common.part_ptr
    splits = counts.splits
    if work.is_last & (splits > 1):
        number = ((work.batch * HEAD_BLOCKS + work.head_block) * counts.last_tiles + work.tile) * CONSUMERS + c
        row = gl.arange(0, 64, layout=ROW)
        o_r = gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
        o_c = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OUT))
        inner = gl.expand_dims(o_r * BLOCK_D, 1) + gl.expand_dims(o_c, 0)
        part_at = part_ptr + number.to(gl.int64) * splits * (64 * BLOCK_D)
        # The log-sum-exps, base 2, lie behind the parts of all last-row items.
        lse_at = part_ptr + counts.last_items.to(gl.int64) * (CONSUMERS * 64 * BLOCK_D)
        lse_at += number.to(gl.int64) * splits * 64
        gl.store(part_at + work.split * (64 * BLOCK_D) + inner, acc)
        gl.store(lse_at + work.split * 64 + row, lse)
        # Every thread's stores before the one thread's release.
        barrier()
        before = gl.atomic_add(counter(common.counter_ptr, number), 1, sem="acq_rel")
        barrier()
        wrote = (before == splits - 1).to(gl.int32)
        if before == splits - 1:
            # For the next launch.
            gl.store(counter(common.counter_ptr, number), 0)
            acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
            total = gl.zeros([64], gl.float32, ROW)
            maximum = gl.full([64], NO_MAXIMUM, gl.float32, ROW)
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
            acc, lse = finish(acc, maximum, total, OUT)
    return acc, lse, wrote


@gluon.jit
def store_lse(
    common, lse, work, first, wrote,
    HEADS: gl.constexpr, GROUP: gl.constexpr, POSITIONS: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp, (B, H, Sq), as a natural logarithm."""
    row = gl.arange(0, 64, layout=ROW)
    position = first + row % POSITIONS
    head = row // POSITIONS
    keep = (head < GROUP) & (position < work.stop) & (wrote != 0)
    if work.is_last == 0:
        keep = keep & ((position < work.last_low) | (position >= work.end))
    counts = common.counts
    first_head = work.batch.to(gl.int64) * HEADS + work.head_block * GROUP
    place = (first_head + head) * counts.q_len + (position - (counts.kv_len - counts.q_len))
    gl.store(common.lse_ptr + place, lse * 0.6931471805599453, mask=keep)


@gluon.jit
def _store_rows(
    common, buf, work, first, wrote,
    GROUP: gl.constexpr, POSITIONS: gl.constexpr, DIM: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Write the rows that are the item's own from a buffer, in pieces of 16 bytes."""
    LANES: gl.constexpr = BLOCK_D // 8
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    barrier()
    result = buf.load(STORE)
    fence_async_shared()
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, STORE))
    column = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, STORE))
    position = first + r % POSITIONS
    head = r // POSITIONS
    mine = (head < GROUP) & (position < work.stop) & (wrote != 0)
    if work.is_last == 0:
        mine = mine & ((position < work.last_low) | (position >= work.end))
    where_row = (position - (common.counts.kv_len - common.counts.q_len)).to(gl.int64) * common.o_row
    where_row += (work.head_block * GROUP + head).to(gl.int64) * common.o_head
    whole = common.out_ptr + work.batch.to(gl.int64) * common.o_batch
    pointers = whole + gl.expand_dims(where_row, 1) + gl.expand_dims(column, 0)
    keep = gl.expand_dims(mine, 1)
    if DIM != BLOCK_D:
        keep = keep & gl.expand_dims(column < DIM, 0)
    gl.store(pointers, result, mask=keep)


@gluon.jit
def store(
    common, acc, work, first, wrote, slot,
    GROUP: gl.constexpr, POSITIONS: gl.constexpr, DIM: gl.constexpr, BLOCK_D: gl.constexpr, COPY_OUT: gl.constexpr,
):  # fmt: skip
    """Write 64 rows through the buffer of their queries, number ``slot``, which nobody needs any more.

    With ``COPY_OUT`` the copy engine writes tiles that are wholly the item's own, and may still read the buffer after.
    """
    buf = common.q_bufs.index(slot)
    rows = buf.reshape([64, BLOCK_D])
    rows.store(acc.to(common.k_desc.dtype))
    if COPY_OUT:
        if (work.is_last == 0) & ((first + POSITIONS <= work.last_low) | (first >= work.end)):
            fence_async_shared()
            barrier()
            row = first - (common.counts.kv_len - common.counts.q_len)
            tma.async_copy_shared_to_global(common.o_desc, [work.batch, work.head_block * GROUP, row, 0], buf)
        else:
            _store_rows(common, rows, work, first, wrote, GROUP, POSITIONS, DIM, BLOCK_D)
    else:
        _store_rows(common, rows, work, first, wrote, GROUP, POSITIONS, DIM, BLOCK_D)
