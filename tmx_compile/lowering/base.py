"""The contract of a lowering, and how one writes graph nodes as plain PyTorch code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.proxy import GraphAppendingTracer

from tmx_compile.graph.layout import Order
from tmx_compile.graph.nodes import value_of, written
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Rejected

Length: TypeAlias = "int | torch.SymInt | Proxy"


@dataclass(frozen=True)
class AttentionCall:
    """One call of the operator as a lowering sees it: fake tensors and constants.

    Shapes are those of :func:`tmx_compile.operator.triangle_attention`. ``needs_grad`` tells that the compiled graph
    will be differentiated. ``dense_up_to`` is set for a graph that serves every length from 1 on and whose guards
    nobody checks: a prompt of at most that many rows is attended densely. ``layout`` is the order of ``out``'s
    dimensions in memory, outermost first, that is made of whatever a lowering writes: writing it so saves a copy.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    geometry: Geometry
    scale: float
    needs_grad: bool
    dense_up_to: int | None = None
    layout: Order | None = None
    sink_logits: Tensor | None = None
    softcap: float | None = None

    @property
    def changes(self) -> str:
        """What the layer does to its scores beside scaling and masking them, in words; "" for nothing."""
        named = (("learned sinks", self.sink_logits is not None), ("a softcap", self.softcap is not None))
        return " and ".join(name for name, there in named if there)

    @property
    def documents(self) -> bool:
        """Whether the key mask numbers packed documents."""
        return self.key_mask is not None and self.key_mask.dtype != torch.bool


class Lowering(Protocol):
    """A target. ``supports`` answers on fakes with a reason; ``emit`` writes ordinary nodes that compute ``out``."""

    @property
    def name(self) -> str:
        """The name users choose it by."""

    def inductor_options(self, call: AttentionCall) -> Mapping[str, Any]:
        """Inductor settings that a graph with this lowering of the call needs: none unless it says so."""
        return {}

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Whether the call can be lowered, or why not."""

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """Write the nodes; returns the proxy of ``out`` (B, H, Sq, Dv)."""


@dataclass(frozen=True)
class Operands:
    """The proxies of one call, typed as what they act as; ``key_mask`` and ``sink_logits`` may be None."""

    query: Any
    key: Any
    value: Any
    key_mask: Any
    sink_logits: Any = None

    @property
    def of_attention(self) -> tuple[Any, Any, Any, Any]:
        """Query, key, value, key mask."""
        return self.query, self.key, self.value, self.key_mask


class _RecordingTracer(GraphAppendingTracer):
    """Appends nodes as code runs on proxies, and runs the same code on their example values."""

    def __init__(self, graph: torch.fx.Graph, fake_mode: Any, origin: Node) -> None:
        super().__init__(graph)
        self._fake_mode, self._origin = fake_mode, origin

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        written(proxy.node, self._origin, self._fake_mode)
        return proxy


@dataclass
class Writer:
    """Writes nodes into a graph before the node being replaced.

    Lowerings are ordinary functions of tensors; run on this writer's proxies they become nodes.
    """

    gm: GraphModule
    fake_mode: Any
    origin: Node
    tracer: _RecordingTracer = field(init=False)

    def __post_init__(self) -> None:
        self.tracer = _RecordingTracer(self.gm.graph, self.fake_mode, self.origin)

    def proxy(self, node: Node) -> Proxy:
        """The proxy of an existing node."""
        return Proxy(node, self.tracer)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Proxy:
        """A call of a function that takes no proxy (``torch.arange``), or that must be one node."""
        proxy: Proxy = self.tracer.create_proxy("call_function", function, args, kwargs)
        return proxy

    def submodule(self, prefix: str, module: GraphModule) -> Proxy:
        """Attach a child graph under a fresh name and return its ``get_attr``."""
        count = 0
        while hasattr(self.gm, f"{prefix}_{count}"):
            count += 1
        name = f"{prefix}_{count}"
        self.gm.register_module(name, module)
        return self.tracer.create_proxy("get_attr", name, (), {})


class Immediate(Writer):
    """Computes what a lowering would write: its calls take real tensors, or those that Dynamo traces."""

    def __init__(self) -> None:
        pass

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The call itself."""
        return function(*args, **kwargs)


def immediate(lowering: Lowering, call: AttentionCall) -> Tensor:
    """Attention (B, H, Sq, Dv) of a call of tensors by a lowering that takes it and needs no graph."""
    operands = Operands(call.query, call.key, call.value, call.key_mask, call.sink_logits)
    out: Any = lowering.emit(Immediate(), call, operands)
    return cast("Tensor", out)


def length(x: Any, dim: int) -> Any:
    """A dimension of a tensor or proxy: an int where it is static, else a symbolic size or its node's proxy."""
    if isinstance(x, Proxy):
        size = value_of(x.node).shape[dim]
        return size if isinstance(size, int) else x.size(dim)
    return x.shape[dim]


def first_position(q: Any, k: Any) -> Any:
    """Absolute position of query row 0, Skv - Sq: a plain 0 where the two are known to be equal."""
    same = statically_known_true(example(q).shape[2] == example(k).shape[2])
    return 0 if same else length(k, 2) - length(q, 2)


def arange(like: Any, *bounds: Any) -> Any:
    """``torch.arange`` in int64 on the device of a tensor or proxy."""
    if isinstance(like, Proxy):
        device = value_of(like.node).device
        return like.tracer.create_proxy("call_function", torch.arange, bounds, {"device": device, "dtype": torch.int64})
    return torch.arange(*bounds, device=like.device, dtype=torch.int64)


def symbol(x: Any) -> Any:
    """A length as a number for static reasoning: the SymInt behind a proxy, else the number itself."""
    return value_of(x.node) if isinstance(x, Proxy) else x


def example(x: Any) -> Tensor:
    """The tensor itself, or the fake tensor behind a proxy: for its dtype and rank."""
    value = value_of(x.node) if isinstance(x, Proxy) else x
    assert isinstance(value, Tensor)
    return value
