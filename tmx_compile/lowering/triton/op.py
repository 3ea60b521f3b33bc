"""The kernels as PyTorch operators, so that a compiled graph can hold a call of them. Imports without Triton."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.sharding import shard_by_batch_and_heads

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? extent"
_COUNTS = "int sink, int window, int last, float scale, int? reach=None"


def _on_device_of(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("tmx::triangle_attention_triton", mutates_args=(), schema=f"({_INPUTS}, {_COUNTS}) -> Tensor")
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

    with _on_device_of(query):
        return attend(query, key, value, key_mask, extent, Geometry(sink, window, last, reach), scale)[0]


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_by_tokens(query, value.shape[3])


def attend_into(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, scale: float, out: Tensor) -> None:
    """The kernels at once, outside of any graph, in a step of a serving engine: nothing is allocated for the result.

    Args:
        query, key, value, scale: as for :func:`tmx_compile.operator.triangle_attention`.
        geometry: the mask.
        out: (B, H, Sq, Dv) of query's dtype: the memory to write into.
    """
    from tmx_compile.lowering.triton.launch import attend
    from tmx_compile.lowering.triton.tuning import HOPPER_FROM_ROWS_IN_STEPS

    with _on_device_of(query):
        attend(query, key, value, None, None, geometry, scale, out=out, hopper_from=HOPPER_FROM_ROWS_IN_STEPS)


@torch.library.custom_op(
    "tmx::triangle_attention_triton_training",
    mutates_args=(),
    schema=f"({_INPUTS}, {_COUNTS}) -> (Tensor out, Tensor lse)",
)
def _training(
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
) -> tuple[Tensor, Tensor]:
    from tmx_compile.lowering.triton.launch import attend

    geometry = Geometry(sink, window, last, reach)
    with _on_device_of(query):
        out, lse = attend(query, key, value, key_mask, extent, geometry, scale, with_lse=True)
    assert lse is not None
    return out, lse


@_training.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_by_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "tmx::triangle_attention_triton_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_COUNTS})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
)
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    out: Tensor,
    lse: Tensor,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    from tmx_compile.lowering.triton.backward_launch import gradients

    geometry = Geometry(sink, window, last, reach)
    with _on_device_of(query):
        return gradients(grad_out, grad_lse, query, key, value, key_mask, extent, out, lse, geometry, scale)


@_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty_by_tokens(x, x.shape[3]) for x in (query, key, value))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.geometry = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    # The log-sum-exp has no gradient unless somebody uses it.
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = torch.ops.tmx.triangle_attention_triton_backward(grad_out, grad_lse, *inputs, out, lse, *ctx.geometry)
    return (*grads, *[None] * (2 + len(ctx.geometry)))


def _save_for_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _autograd_again(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Where nobody foresaw a gradient, the forward runs again for its log-sum-exp."""
    inputs = ctx.saved_tensors
    out, lse = torch.ops.tmx.triangle_attention_triton_training(*inputs, *ctx.geometry)
    grads = torch.ops.tmx.triangle_attention_triton_backward(grad_out, None, *inputs, out, lse, *ctx.geometry)
    return (*grads, *[None] * (2 + len(ctx.geometry)))


_training.register_autograd(_autograd, setup_context=_save)
_forward.register_autograd(_autograd_again, setup_context=_save_for_forward)

TRITON_OPERATOR = torch.ops.tmx.triangle_attention_triton.default
"""The operator as a node target."""

TRAINING_OPERATOR = torch.ops.tmx.triangle_attention_triton_training.default
"""The same for a graph that is differentiated: ``(out, lse)``, the log-sum-exp (B, H, Sq) being for the backward."""

shard_by_batch_and_heads(TRITON_OPERATOR, TRAINING_OPERATOR, torch.ops.tmx.triangle_attention_triton_backward.default)
