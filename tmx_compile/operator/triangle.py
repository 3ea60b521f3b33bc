"""``tmx::triangle_attention``: schema, checks, fake kernel, autograd.

The operator is functional and returns fresh tensors. Its eager body is in :mod:`tmx_compile.operator.kernel`; lowerings
replace the node in a compiled graph by something faster with the same numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator import documents, kernel
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.scores import check_scores, sink_gradient
from tmx_compile.operator.sharding import shard_by_batch_and_heads

COUNTS = "int sink, int window, int last, float scale, int? reach=None"
"""How schemas have a geometry and the scale: see :meth:`Geometry.arguments`."""

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor? key_mask"
_SCORES = "Tensor? sink_logits=None, float? softcap=None"
_SCHEMA = f"({_OPERANDS}, {COUNTS}, {_SCORES}) -> (Tensor out, Tensor lse)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, Tensor? grad_lse, {_OPERANDS}, Tensor out, {COUNTS}, {_SCORES})"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


class Arguments(NamedTuple):
    """What a call of the operator was given, its counts as one value: see :func:`triangle_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    geometry: Geometry
    scale: float
    sink_logits: Tensor | None
    softcap: float | None


def read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> Arguments:
    """A call of the operator, as its schema has it."""
    geometry = Geometry(sink, window, last, reach)
    return Arguments(query, key, value, key_mask, geometry, scale, sink_logits, softcap)


def checked(*arguments: Any) -> Arguments:
    """A call of the operator.

    Raises:
        ValueError: something in it does not fit: see :func:`triangle_attention`.
    """
    found = read(*arguments)
    query, key, value, key_mask, geometry, _, sink_logits, softcap = found
    check_alike(query, key, value, "batch, heads, tokens, head_dim")
    if key.shape[0] != query.shape[0] or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            "query, key and value must share the batch, key and value the heads and tokens: got shapes "
            f"{_shape(query)}, {_shape(key)}, {_shape(value)}"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"key must have query's head_dim {query.shape[3]}, got {key.shape[3]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"key heads must divide query heads, got {key.shape[1]} and {query.shape[1]}")
    if query.shape[2] > key.shape[2]:
        raise ValueError(f"query must not have more tokens than key, got {query.shape[2]} and {key.shape[2]}")
    if key_mask is not None:
        if key_mask.dtype not in (torch.bool, torch.int32, torch.int64):
            raise ValueError(
                "key_mask must be bool (True = may be attended), or int32 or int64 numbers of documents, got "
                f"{key_mask.dtype}"
            )
        if key_mask.device != query.device:
            raise ValueError(f"key_mask must be on query's device {query.device}, got {key_mask.device}")
        if key_mask.dim() != 2 or key_mask.shape[0] != key.shape[0] or key_mask.shape[1] != key.shape[2]:
            raise ValueError(
                f"key_mask must be (batch, kv tokens) = ({key.shape[0]}, {key.shape[2]}), got {_shape(key_mask)}"
            )
    for name, count in (*zip(("sink", "window", "last"), geometry.counts, strict=True), ("reach", geometry.reach or 0)):
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    check_scores(query, sink_logits, softcap)
    return found


def check_alike(query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    """Raise ``ValueError`` unless all have four dimensions, those of ``layout``, one floating dtype, one device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be ({layout}), got shape {_shape(tensor)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _form(key_mask: Tensor | None) -> Any:
    """Of one sequence a row of the batch, or of several documents."""
    return kernel if key_mask is None or key_mask.dtype == torch.bool else documents


def plain_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch, on any device."""
    given = checked(*arguments)
    # The caller's autocast reaches in here, and would round the float32 products to bfloat16.
    with torch.autocast(given.query.device.type, enabled=False):
        out: tuple[Tensor, Tensor] = _form(given.key_mask).forward(*given)
    return out


_forward = torch.library.custom_op("tmx::triangle_attention", plain_forward, mutates_args=(), schema=_SCHEMA)


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    query, _, value, *_ = checked(*arguments)
    return empty_by_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def plain_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    *counts: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`plain_forward`, but for that of the sink logits (:func:`sink_gradient`)."""
    *operands, geometry, scale, sink_logits, softcap = read(query, key, value, key_mask, *counts)
    # The caller's autocast reaches in here, and would round the float32 products to bfloat16.
    with torch.autocast(query.device.type, enabled=False):
        grads: tuple[Tensor, Tensor, Tensor] = _form(key_mask).backward(
            grad_out, grad_lse, *operands, out, geometry, scale, sink_logits, softcap
        )
    return grads


_backward = torch.library.custom_op(
    "tmx::triangle_attention_backward", plain_backward, mutates_args=(), schema=_BACKWARD_SCHEMA
)


@_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_mask, *ctx.geometry, sink_logits, ctx.softcap = inputs
    # The log-sum-exp has no gradient unless somebody uses it, and zeros that autograd made up would be no DTensor.
    ctx.set_materialize_grads(False)
    out, lse = output
    ctx.save_for_backward(query, key, value, key_mask, out, *(() if sink_logits is None else (sink_logits, lse)))


def _autograd(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, key_mask, out, *learned = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    sink_logits = learned[0] if learned else None
    grads = torch.ops.tmx.triangle_attention_backward(
        grad_out, grad_lse, query, key, value, key_mask, out, *ctx.geometry, sink_logits, ctx.softcap
    )
    of_sinks = None
    if sink_logits is not None and ctx.needs_input_grad[9]:
        of_sinks = sink_gradient(grad_out, grad_lse, out, learned[1], sink_logits)
    return (*grads, None, None, None, None, None, None, of_sinks, None)


_forward.register_autograd(_autograd, setup_context=_setup_context)

__all__ = ["ALL_ROWS", "OPERATOR", "triangle_attention"]

OPERATOR = torch.ops.tmx.triangle_attention.default
"""The operator as a node target."""

shard_by_batch_and_heads(OPERATOR, torch.ops.tmx.triangle_attention_backward.default)


def triangle_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    sink: int,
    window: int,
    last: int,
    scale: float | None = None,
    reach: int | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under the TriangleMix mask (arXiv 2507.21526), differentiable, O(N) in memory.

    Row i stands at absolute position p = Skv - Sq + i. With valid keys in [start, end) (all keys where there is no
    ``key_mask``) it attends to a valid key j exactly when ``j <= p`` and one of ``j < start + sink``,
    ``p - j <= window``, ``end - last <= p < end`` holds; and ``p - j <= reach`` where there is a reach. Whether its own
    key is valid plays no part: a row before ``start`` has no key, one from ``end`` on is no last row (unless all are:
    ``last=ALL_ROWS``).

    Args:
        query: (B, H, Sq, D), any floating dtype; Sq <= Skv.
        key: (B, Hkv, Skv, D) with Hkv dividing H; never expanded in memory.
        value: (B, Hkv, Skv, Dv).
        key_mask: (B, Skv) bool, True where a key may be attended, or None. ``start`` is its first True, ``end`` one
            past its last; a False between them is never attended. Or int32 or int64 numbers of packed documents, 0
            where there is no document: a row attends keys of its own document, which has its own start and end. -n is
            a key of document n that may not be attended; the row there belongs to n.
        sink: number of leading keys every row attends to.
        window: how far back a row sees: ``window + 1`` keys, its own included.
        last: number of final rows that attend to all keys.
        scale: factor on the scores; ``1 / sqrt(D)`` when None.
        reach: how far back any row sees, sinks and last rows included: a layer's own sliding window. None: all keys.
        sink_logits: (H,), any floating dtype, differentiable: the learned sink of each head, one more logit in the
            softmax of every row, without a value (gpt-oss). It has nothing to do with ``sink``.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask (Gemma 2); positive.

    Returns:
        out (B, H, Sq, Dv) in query's dtype, (B, Sq, H, Dv) in memory, 0 on a row that attends to nothing; lse
        (B, H, Sq) float32, the natural log of the sum of exponentials, that of the sink logit among them; without one,
        -inf on such a row.

    Raises:
        ValueError: shapes, dtypes, devices or counts that do not fit, naming the argument and its value.

    Where sinks and window hold every key it is causal attention:

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import triangle_attention
    >>> query, key = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16)  # two query heads share a key head
    >>> out, lse = triangle_attention(query, key, key, sink=4, window=8, last=10)
    >>> out.shape, lse.shape
    (torch.Size([1, 4, 50, 16]), torch.Size([1, 4, 50]))
    >>> dense = F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    >>> torch.allclose(triangle_attention(query, key, key, sink=0, window=49, last=0)[0], dense, atol=1e-5)
    True
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    out: tuple[Tensor, Tensor] = torch.ops.tmx.triangle_attention(
        query, key, value, key_mask, *Geometry(sink, window, last, reach).arguments(scale, sink_logits, softcap)
    )
    return out
