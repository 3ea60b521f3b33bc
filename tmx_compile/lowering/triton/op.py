"""The kernels as a PyTorch operator, so that a compiled graph can hold a call of them. Imports without Triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tmx_compile.mask.geometry import Geometry


@torch.library.custom_op(
    "tmx::triangle_attention_triton",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? extent, int sink, int window, int last,"
    " float scale, int? reach=None) -> Tensor",
)
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None = None,
) -> Tensor:
    from tmx_compile.lowering.triton.launch import attend

    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        return attend(query, key, value, key_mask, extent, Geometry(sink, window, last, reach), scale)[0]


@_forward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None = None,
) -> Tensor:
    batch, heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, heads, value.shape[3]).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, key_mask, _, *ctx.geometry = inputs
    ctx.save_for_backward(query, key, value, key_mask, output)


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, key_mask, out = ctx.saved_tensors
    grad_lse = query.new_zeros(query.shape[:3], dtype=torch.float32)
    grads = torch.ops.tmx.triangle_attention_backward(
        grad_out, grad_lse, query, key, value, key_mask, out, *ctx.geometry
    )
    return (*grads, None, None, None, None, None, None, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)

TRITON_OPERATOR = torch.ops.tmx.triangle_attention_triton.default
"""The operator as a node target."""
