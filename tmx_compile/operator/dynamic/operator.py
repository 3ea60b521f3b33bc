"""The operator's schema, checks and fake kernel, and the function that calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.mask.geometry import ALL_ROWS
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.choice import grid_of, select
from tmx_compile.operator.dynamic.listed import attend
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.triangle import checked

ARGUMENTS = "str method, float share, int block, int stride, int sink, int last, float scale"
SCHEMA = f"(Tensor query, Tensor key, Tensor value, Tensor? key_mask, {ARGUMENTS}) -> (Tensor out, Tensor visited)"


def check(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> None:
    """Raise ``ValueError`` naming the argument and its value, before any work."""
    checked(query, key, value, key_mask, 0, 0, ALL_ROWS, 1.0)
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"key_mask must be bool (True = may be attended), got {key_mask.dtype}")


@torch.library.custom_op("tmx::block_sparse_attention", mutates_args=(), schema=SCHEMA)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    method: str,
    share: float,
    block: int,
    stride: int,
    sink: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check(query, key, value, key_mask)
    selection = Selection(method, share, block, stride, sink, last)
    if 0 in query.shape:
        return empty_by_tokens(query, value.shape[3]), _nothing_visited(query)
    # The caller's autocast reaches in here, and would round the float32 products to bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        lists = select(query, key, key_mask, selection, scale)
        return attend(query, key, value, key_mask, lists, block, scale), lists.visited


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    method: str,
    share: float,
    block: int,
    stride: int,
    sink: int,
    last: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check(query, key, value, key_mask)
    Selection(method, share, block, stride, sink, last)
    return empty_by_tokens(query, value.shape[3]), query.new_empty(2, dtype=torch.int64)


def _nothing_visited(like: Tensor) -> Tensor:
    return like.new_zeros(2, dtype=torch.int64)


BLOCK_SPARSE = torch.ops.tmx.block_sparse_attention.default
"""The operator as a node target."""


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    selection: Selection,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over the blocks of keys that hold most of the estimated mass. Inference only.

    Positions fall into blocks, counted from key 0. Of the blocks up to its own, a block of rows visits its own and the
    one before, those with a sink, and then the heaviest until they hold the share of the estimated mass; every one
    where one of the last rows is in it. In a visited block each row attends to the valid keys up to its own. No tensor
    of rows x keys is formed; see :class:`tmx_compile.operator.dynamic.Lists` for what is.

    Args:
        query: (B, H, Sq, D), any floating dtype; Sq <= Skv, row i at position Skv - Sq + i.
        key: (B, Hkv, Skv, D) with Hkv dividing H.
        value: (B, Hkv, Skv, Dv).
        key_mask: (B, Skv) bool, True where a key may be attended, or None.
        selection: how blocks are chosen.
        scale: factor on the scores; ``1 / sqrt(D)`` when None.

    Returns:
        out (B, H, Sq, Dv) in query's dtype, (B, Sq, H, Dv) in memory, 0 on a row that attends to nothing; visited (2,)
        int64: blocks visited, and blocks that dense causal attention would visit, over all heads and sequences.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, naming the argument and its value.

    With the whole mass it is causal attention:

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile.mask.selection import Selection
    >>> from tmx_compile.operator.dynamic import block_sparse_attention
    >>> query, key = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    >>> out, visited = block_sparse_attention(query, key, key, selection=Selection(share=1.0, block=32))
    >>> visited.tolist()
    [112, 112]
    >>> dense = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    >>> torch.allclose(out, dense, atol=1e-5)
    True
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    grid_of(query, key, selection)
    both: tuple[Tensor, Tensor] = torch.ops.tmx.block_sparse_attention(
        query, key, value, key_mask, *selection.arguments, scale
    )
    return both
