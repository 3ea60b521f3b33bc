"""The memory in which attention leaves its results."""

from __future__ import annotations

from torch import Tensor


def empty_by_tokens(like: Tensor, dim: int) -> Tensor:
    """An empty (B, heads, tokens, dim) in (B, tokens, heads, dim) memory, where models view a result without a copy.

    Args:
        like: (B, heads, tokens, any): its sizes, dtype and device.
        dim: of the last dimension.
    """
    batch, heads, tokens, _ = like.shape
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def strides_by_tokens(heads: int, tokens: int, dim: int) -> tuple[int, int, int, int]:
    """The strides of such a (B, heads, tokens, dim), in elements."""
    return tokens * heads * dim, dim, heads * dim, 1
