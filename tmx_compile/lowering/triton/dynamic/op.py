"""The kernels as a PyTorch operator, so that a compiled graph can hold a call of them. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.lowering import fa4_lists
from tmx_compile.lowering.triton.op import on_device_of
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.operator import SCHEMA
from tmx_compile.operator.layout import empty_by_tokens


@torch.library.custom_op("tmx::block_sparse_attention_triton", mutates_args=(), schema=SCHEMA)
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
    from tmx_compile.lowering.triton.dynamic.launch import attend, select

    selection = Selection(method, share, block, stride, sink, last)
    with on_device_of(query):
        lists = select(query, key, key_mask, selection, scale)
        if fa4_lists.serves(query, key, value, key_mask, block):
            return fa4_lists.attend(query, key, value, lists, scale), lists.visited
        return attend(query, key, value, key_mask, lists, block, scale), lists.visited


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_by_tokens(query, value.shape[3]), query.new_empty(2, dtype=torch.int64)


TRITON_BLOCK_SPARSE = torch.ops.tmx.block_sparse_attention_triton.default
"""The operator as a node target."""
