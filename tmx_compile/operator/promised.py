"""What a promised mask shows only when it runs: a window of the layer's own, and-ed with causality.

``tmx::keep_window`` stands behind an operator that was compiled for the window of the proof (usually none). Where the
mask of a call has another one, the call is computed again with it, by the operator's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from tmx_compile.operator.triangle import COUNTS, plain_backward, plain_forward, read


def _operator(name: str, first: str, results: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Makes a function the operator ``tmx::name`` of ``first``, a call's tensors, what its mask showed, and counts."""
    schema = f"({first}, Tensor query, Tensor key, Tensor value, Tensor key_mask, Tensor shown, {COUNTS}) -> {results}"
    tags = (torch.Tag.cudagraph_unsafe,)
    return torch.library.custom_op(f"tmx::{name}", mutates_args=(), schema=schema, tags=tags)


def _other(shown: Tensor, kv_len: int, reach: int | None) -> int | None:
    """The reach that a mask shows, where it is not the one that was compiled; None where nothing is to be done."""
    far, limited = shown.tolist()
    compiled = kv_len if reach is None else reach
    if not limited:
        return None if compiled >= far else kv_len
    return None if compiled == far else int(far)


@_operator("keep_window", "Tensor out", "Tensor")
def _keep_window(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor, shown: Tensor, *counts: Any
) -> Tensor:
    given = read(query, key, value, key_mask, *counts)
    other = _other(shown, key.shape[2], given.geometry.reach)
    if other is None:
        return out.clone()
    again = plain_forward(query, key, value, key_mask, *given.geometry.counts, given.scale, other)[0]
    return torch.empty_like(out).copy_(again)


@_keep_window.register_fake
def _(out: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(out)


@_operator("keep_window_backward", "Tensor grad, Tensor result", "(Tensor, Tensor, Tensor, Tensor)")
def _backward(
    grad: Tensor,
    result: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor,
    shown: Tensor,
    *counts: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = read(query, key, value, key_mask, *counts)
    other = _other(shown, key.shape[2], given.geometry.reach)
    if other is None:
        return grad.clone(), query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    counts = (*given.geometry.counts, given.scale, other)
    d_query, d_key, d_value = plain_backward(grad, None, query, key, value, key_mask, result, *counts)
    return torch.zeros_like(grad), d_query.contiguous(), d_key, d_value


@_backward.register_fake
def _(
    grad: Tensor, result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors = inputs[:6]
    ctx.geometry = inputs[6:]
    ctx.save_for_backward(output, *tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.tmx.keep_window_backward(grad, *ctx.saved_tensors, *ctx.geometry)
    return (*grads, None, None, None, None, None, None, None)


_keep_window.register_autograd(_autograd, setup_context=_setup_context)

KEEP_WINDOW = torch.ops.tmx.keep_window.default
"""``(out, query, key, value, key mask, what CHECK_MASK showed, sink, window, last, scale, reach?) -> out``: the
operator's result, computed again where the mask's window is not ``reach``. Differentiable."""
