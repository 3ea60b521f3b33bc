"""The kernels as PyTorch operators, so that a compiled graph can hold a call of them. Imports without Triton.

A call takes the host about as long as a small kernel runs, so an operator is registered by hand, which costs a quarter
of ``torch.library.custom_op``: nothing stands between the dispatcher and the launch where no gradient is wanted.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.scores import sink_gradient
from tmx_compile.operator.sharding import shard_by_batch_and_heads
from tmx_compile.operator.triangle import COUNTS

_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? extent"
_SCORES = "Tensor? sink_logits=None, float? softcap=None"
_LIBRARY: Any = torch.library.Library("tmx", "FRAGMENT")  # type: ignore[no-untyped-call]

# Of arguments that are tensors and nothing else: no subclass, mode or transform watches, and autograd may.
_PLAIN = frozenset(
    (DispatchKeySet(backend) | DispatchKeySet(autograd)).raw_repr()
    for backend, autograd in (
        (DispatchKey.CUDA, DispatchKey.AutogradCUDA),
        (DispatchKey.CPU, DispatchKey.AutogradCPU),
    )
)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator ``tmx::name``, which ``run`` computes on every device."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tmx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.tmx, name).default


def _differentiate(operator: Any, run: Callable[..., Any], function: Any) -> None:
    """Let ``function`` compute ``operator`` where a gradient is wanted; its first argument computes it without one."""

    def with_keys(keys: DispatchKeySet, *args: Any) -> Any:
        plain = keys.raw_repr() in _PLAIN
        if plain and not _is_grad_enabled():
            # The next kernel is ours, and needs no dispatcher to be found.
            return run(*args)
        below = run if plain else functools.partial(_below_autograd, operator, keys & torch._C._after_autograd_keyset)
        if _is_grad_enabled() and any(x.requires_grad for x in (*args[:3], *_sink_logits(args))):
            return function.apply(below, *args)
        return below(*args)

    _LIBRARY.impl(operator._schema.name.split("::")[1], with_keys, "Autograd", with_keyset=True)


def _below_autograd(operator: Any, below: DispatchKeySet, *args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(below, *args)


_geometry = functools.lru_cache(maxsize=1024)(Geometry)


_is_grad_enabled = torch.is_grad_enabled
_NOTHING: Any = contextlib.nullcontext()


def on_device_of(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


# The modules that need Triton: an import statement would cost every call as much as the dispatcher.
@functools.cache
def _launch() -> Any:
    return importlib.import_module("tmx_compile.lowering.triton.launch")


@functools.cache
def _forward() -> Any:
    return _launch().forward


@functools.cache
def _backward_launch() -> Any:
    return importlib.import_module("tmx_compile.lowering.triton.backward_launch")


def _run_training(
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
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    made: tuple[Tensor, Tensor] = _forward()(
        query, key, value, key_mask, extent, sink, window, last, scale, reach, sink_logits, softcap, True
    )
    return made


def _run_forward(*arguments: Any) -> Tensor:
    made: Tensor = _forward()(*arguments)[0]
    return made


def attend_into(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, scale: float, out: Tensor) -> None:
    """The kernels at once, outside of any graph, in a step of a serving engine: nothing is allocated for the result.

    Args:
        query, key, value, scale: as for :func:`tmx_compile.operator.triangle_attention`.
        geometry: the mask.
        out: (B, H, Sq, Dv) of query's dtype: the memory to write into.
    """
    _launch().attend(query, key, value, None, None, geometry, scale, out=out)


def _run_backward(
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
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients, geometry = _backward_launch().gradients, _geometry(sink, window, last, reach)
    with on_device_of(query):
        made: tuple[Tensor, Tensor, Tensor] = gradients(
            grad_out, grad_lse, query, key, value, key_mask, extent, out, lse, geometry, scale, softcap=softcap
        )
    return made


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_by_tokens(query, value.shape[3])


def _fake_training(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_by_tokens(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty_by_tokens(x, x.shape[3]) for x in (query, key, value))  # type: ignore[return-value]


TRITON_OPERATOR = _define(
    "triangle_attention_triton", f"({_INPUTS}, {COUNTS}, {_SCORES}) -> Tensor", _run_forward, _fake_forward
)
"""The operator as a node target."""

TRAINING_OPERATOR = _define(
    "triangle_attention_triton_training",
    f"({_INPUTS}, {COUNTS}, {_SCORES}) -> (Tensor out, Tensor lse)",
    _run_training,
    _fake_training,
)
"""The same for a graph that is differentiated: ``(out, lse)``, the log-sum-exp (B, H, Sq) being for the backward."""

_BACKWARD_OPERATOR = _define(
    "triangle_attention_triton_backward",
    f"(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {COUNTS}, float? softcap=None)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    _run_backward,
    _fake_backward,
)


def _sink_logits(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Those of a forward operator's arguments: one tensor, or none."""
    return tuple(x for x in args[10:11] if x is not None)


def _saved(ctx: Any, inputs: tuple[Any, ...], *results: Tensor) -> None:
    """Keep for the backward what :func:`_gradients` asks for."""
    ctx.counts, ctx.softcap = inputs[5:10], inputs[11] if len(inputs) > 11 else None
    ctx.given = len(inputs)
    ctx.save_for_backward(*inputs[:5], *results, *_sink_logits(inputs))


def _kept(ctx: Any, results: int) -> tuple[Any, ...]:
    """What :func:`_saved` kept, the sinks as one list; read once, since a checkpoint refuses to unpack twice."""
    kept = ctx.saved_tensors
    return (*kept[: 5 + results], kept[5 + results :])


def _gradients(
    ctx: Any, grad_out: Tensor, grad_lse: Tensor | None, inputs: Any, out: Tensor, lse: Tensor, sinks: Any
) -> tuple[Tensor | None, ...]:
    """One for each argument of a function's ``forward``: the first is no argument of the operator."""
    counts = ctx.counts if ctx.softcap is None else (*ctx.counts, *[None] * (5 - len(ctx.counts)), ctx.softcap)
    found = _BACKWARD_OPERATOR(grad_out, grad_lse, *inputs, out, lse, *counts)
    of_sinks = None
    if sinks and ctx.needs_input_grad[11]:
        of_sinks = sink_gradient(grad_out, grad_lse, out, lse, *sinks)
    return (None, *found, *[None] * 7, of_sinks, None)[: 1 + ctx.given]


class _Training(torch.autograd.Function):
    """The gradients of :data:`TRAINING_OPERATOR`, from its results."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *inputs: Any) -> Any:
        out, lse = below(*inputs)
        _saved(ctx, inputs, out, lse)
        # The log-sum-exp has no gradient unless somebody uses it.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *inputs, out, lse, sinks = _kept(ctx, 2)
        grad_out, grad_lse = grads
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        return _gradients(ctx, grad_out, grad_lse, inputs, out, lse, sinks)


class _Forward(torch.autograd.Function):
    """Those of :data:`TRITON_OPERATOR`, where nobody foresaw a gradient: it runs again for its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Any], *inputs: Any) -> Any:
        _saved(ctx, inputs)
        return below(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *inputs, sinks = _kept(ctx, 0)
        learned: tuple[Any, ...] = ()
        if sinks or ctx.softcap is not None:
            learned = (*[None] * (5 - len(ctx.counts)), *(sinks or [None]), ctx.softcap)
        out, lse = TRAINING_OPERATOR(*inputs, *ctx.counts, *learned)
        return _gradients(ctx, grads[0], None, inputs, out, lse, sinks)


_differentiate(TRAINING_OPERATOR, _run_training, _Training)
_differentiate(TRITON_OPERATOR, _run_forward, _Forward)

shard_by_batch_and_heads(TRITON_OPERATOR, TRAINING_OPERATOR, _BACKWARD_OPERATOR)
