"""Keys and values of one chunk from a serving engine's pages and from the chunk itself, side by side in one launch.

Importing this module needs Triton.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

_ROWS = 32  # of one program: a key and a value of one head each


# One kernel for every chunk of every request: nothing is looked at that differs between them, as where a row of the
# block table begins.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["tokens", "before", "sinks", "low", "size"], do_not_specialize_on_alignment=["table_ptr"]
)
def together_kernel(  # type: ignore[no-untyped-def]
    cache_ptr, table_ptr, key_ptr, value_ptr, keys_ptr, values_ptr,
    c_block, c_head, c_slot, k_row, k_head, v_row, v_head,
    tokens, before, sinks, low, size,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """See :func:`put_together`. Strides are in elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // HEADS
    head = row % HEADS
    cached = token < before
    place = tl.where(token < sinks, token, token - sinks + low)
    block = tl.load(table_ptr + place // size, mask=cached, other=0).to(tl.int64)
    page = cache_ptr + block * c_block + head * c_head + (place % size) * c_slot
    own = tl.where(cached, 0, token - before)
    # One load for both: which of them a row needs, its pointer says.
    key_at = tl.where(cached, page, key_ptr + own * k_row + head * k_head)
    value_at = tl.where(cached, page + DIM, value_ptr + own * v_row + head * v_head)
    column = tl.arange(0, BLOCK_D)[None, :]
    there = (token < tokens)[:, None] & (column < DIM)
    key = tl.load(key_at[:, None] + column, mask=there)
    value = tl.load(value_at[:, None] + column, mask=there)
    to = row[:, None] * DIM + column
    tl.store(keys_ptr + to, key, mask=there)
    tl.store(values_ptr + to, value, mask=there)


def put_together(
    cache: Tensor,
    table: Tensor,
    spans: tuple[int, int, int],
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Write earlier tokens and then a chunk's own into ``keys`` and ``values`` (n, Hkv, D), which are contiguous.

    Args:
        cache: (blocks, Hkv, size, 2 D), a token's key and value side by side, contiguous along the last dimension.
        table: (blocks of the sequence,) int32, where they lie in the cache.
        spans: how many earlier tokens there are, how many of these are the sequence's first, and where the others
            begin in it.
        key, value: (rows, Hkv, D) of the chunk, contiguous along the last dimension; n is the earlier tokens and these.
        keys, values: where to write.
    """
    before, sinks, low = spans
    heads, dim = key.shape[1:]
    tokens = before + key.shape[0]
    together_kernel[(triton.cdiv(tokens * heads, _ROWS),)](
        cache, table, key, value, keys, values,
        *cache.stride()[:3], *key.stride()[:2], *value.stride()[:2],
        tokens, before, sinks, low, cache.shape[2],
        HEADS=heads, DIM=dim, BLOCK_D=triton.next_power_of_2(dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
