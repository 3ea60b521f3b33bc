"""Attention over lists of blocks by FlashAttention-4, where the extra ``[fa4]`` is installed.

Its block sparsity takes lists for each head and block of rows, as FlexAttention's BlockMask has them: of blocks that
need a mask, here a row's own, and of blocks that need none. Its tiles on Hopper are those of our blocks of 128. What it
does not take (padding, fewer rows than keys, other blocks) our own kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tmx_compile.lowering import fa4
from tmx_compile.operator.dynamic import Lists

BLOCK = 128


def serves(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, block: int) -> bool:
    """Whether it is to compute this call: it can, and was measured to be faster."""
    dims = query.shape[3], value.shape[3]
    return (
        key_mask is None
        and block == BLOCK
        and query.shape[2] == key.shape[2] >= fa4.LEAST_TOKENS
        and dims[0] == dims[1]
        and dims[0] in fa4.HEAD_DIMS
        and query.dtype in fa4.DTYPES
        and fa4.missing(query.device) is None
    )


def kernel_of(block: int) -> str:
    """What attends to lists of such blocks in long prompts on this machine's GPU: "fa4" or "triton"."""
    here = block == BLOCK and torch.cuda.is_available() and fa4.missing(torch.device("cuda")) is None
    return "fa4" if here else "triton"


def attend(query: Tensor, key: Tensor, value: Tensor, lists: Lists, scale: float) -> Tensor:
    """As :func:`tmx_compile.operator.dynamic.attend`, for calls that it :func:`serves`.

    A block of rows' own block is the last of its list.
    """
    dense, tensors = functions()
    both = tensors(*split(lists), block_size=(BLOCK, BLOCK))
    operands = fa4.by_tokens(query, key, value)
    return fa4.result_of(dense(*operands, softmax_scale=scale, causal=True, block_sparse_tensors=both)).transpose(1, 2)


def split(lists: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts (B, H, R) and blocks (B, H, R, C), int32: of those that need the mask, and of the others.

    Both lists are as wide: FlexAttention's template takes the strides of one from the other, and FlashAttention-4 reads
    wrong blocks where heads share one.
    """
    blocks = lists.blocks.to(torch.int32)
    own = torch.zeros_like(blocks)
    own[..., 0] = torch.arange(blocks.shape[2], dtype=torch.int32, device=blocks.device)
    return torch.ones_like(lists.counts), own, lists.counts - 1, blocks


def functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention, and what holds the lists."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return flash_attn_func, BlockSparseTensorsTorch
