"""For tests, yours and ours: graphs as Dynamo captures them and as the pass leaves them, rendered stably.

:func:`rewritten_graphs` gives the graphs of a call, :func:`render_graph` text that can be compared with what it was,
:func:`attention_nodes` the part of it that concerns attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tmx_compile.config import TriangleMixConfig
from tmx_compile.find.repeat import unrepeated
from tmx_compile.find.sdpa import SDPA_TARGETS
from tmx_compile.graph.nodes import INSERTED, value_of
from tmx_compile.passes import pipeline
from tmx_compile.request import INDUCTOR, Request

__all__ = ["attention_nodes", "captured_graphs", "render_graph", "rewritten_graphs"]

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
}


def captured_graphs(
    model: Callable[..., Any],
    *args: Any,
    transform: Callable[[GraphModule], GraphModule | None] | None = None,
    dynamic: bool | None = False,
    **kwargs: Any,
) -> list[GraphModule]:
    """The Dynamo graphs of one call, in order; each is run as it is after ``transform``.

    Args:
        model: called once, as ``model(*args, **kwargs)``.
        args: its arguments.
        transform: changes a graph, or returns another one.
        dynamic: as for ``torch.compile``.
        kwargs: its keyword arguments.

    >>> import torch
    >>> from tmx_compile.testing import captured_graphs, render_graph
    >>> graph, = captured_graphs(lambda x: x.relu() + 1, torch.ones(3))
    >>> print(render_graph(graph))
    %0 = placeholder : f32[3]
    %1 = .relu(%0) : f32[3]
    %2 = add(%1, 1) : f32[3]
    return (%2)
    """
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        del example_inputs
        if transform is not None:
            gm = transform(gm) or gm
        graphs.append(gm)
        return gm.forward

    torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    return graphs


def rewritten_graphs(
    model: Callable[..., Any],
    *args: Any,
    config: TriangleMixConfig,
    lowering: str = "operator",
    strict: bool = False,
    dynamic: bool | None = False,
    **kwargs: Any,
) -> list[GraphModule]:
    """The graphs of one call after the pass. ``lowering="operator"`` shows the operator itself, before any lowering.

    The call runs the rewritten graphs uncompiled: keep it small (``flex`` forms all scores when it is not compiled).

    Args:
        model: called once, as ``model(*args, **kwargs)``.
        args: its arguments.
        config: as for :func:`tmx_compile.tmx_backend`.
        lowering: likewise.
        strict: likewise.
        dynamic: as for ``torch.compile``.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: as for :func:`tmx_compile.tmx_backend`.
        LoweringError: likewise.
        StrictModeError: likewise.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.testing import render_graph, rewritten_graphs
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> config = TriangleMixConfig.deepest(1, num_layers=1, min_seq_len=256)
    >>> graph, = rewritten_graphs(torch.nn.Sequential(Layer()), torch.randn(1, 2, 300, 16), config=config)
    >>> print(render_graph(graph))
    %0 = placeholder : f32[1, 2, 300, 16]
    %1 = tmx.triangle_attention.default(%0, %0, %0, None, 4, 32, 64, 0.25)
    %2 = getitem(%1, 0) : f32[1, 2, 300, 16]
    %3 = .contiguous(%2) : f32[1, 2, 300, 16]
    return (%3)
    """
    request = Request.of(config, lowering=lowering, strict=strict)

    def transform(gm: GraphModule) -> GraphModule:
        return pipeline.compile(gm, request, INDUCTOR).graph

    return captured_graphs(model, *args, transform=transform, dynamic=dynamic, **kwargs)


def attention_nodes(gm: GraphModule) -> frozenset[Node]:
    """The nodes of ``gm`` that concern attention: SDPA calls, their mask code and key repetition, all inserted nodes.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile.testing import attention_nodes, captured_graphs
    >>> def model(x):
    ...     x = x.relu()
    ...     return F.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> graph, = captured_graphs(model, torch.randn(1, 2, 30, 16))
    >>> [node.name for node in attention_nodes(graph)]
    ['scaled_dot_product_attention']
    """
    kept = {node for node in gm.graph.nodes if node.meta.get(INSERTED)}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in SDPA_TARGETS:
            continue
        kept.add(node)
        mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
        kept |= _cone(mask, ())
        for repeated in (a for a in node.args[1:3] if isinstance(a, Node)):
            kept |= _cone(repeated, (unrepeated(repeated)[0],))
    return frozenset(kept)


def _cone(node: Any, stop: Collection[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if not isinstance(current, Node) or current in found or current in stop or current.op == "placeholder":
            continue
        found.add(current)
        stack.extend(current.all_input_nodes)
    return found


def render_graph(gm: GraphModule, *, only: Collection[Node] | None = None) -> str:
    """The graph as text that does not change from run to run: nodes numbered, symbols renamed in order of appearance.

    Args:
        gm: a graph with example values (Dynamo's).
        only: nodes to show; others appear where they are used, as their dtype and shape.

    Returns:
        One line a node, ``%3 = le(%1, %2) : b8[1, 1, s0, s0]``; child graphs indented below their first use.

    >>> import torch
    >>> from tmx_compile.testing import captured_graphs, render_graph
    >>> graph, = captured_graphs(lambda x: x * 2, torch.ones(3, 4), dynamic=True)
    >>> print(render_graph(graph))
    %0 = placeholder : s0
    %1 = placeholder : s1
    %2 = placeholder : f32[s0, s1]
    %3 = mul(%2, 2) : f32[s0, s1]
    return (%3)
    """
    symbols: dict[str, str] = {}
    return "\n".join(_lines(gm, only, symbols))


def _lines(gm: GraphModule, only: Collection[Node] | None, symbols: dict[str, str]) -> list[str]:
    names: dict[Node, str] = {}
    lines: list[str] = []
    for node in gm.graph.nodes:
        if only is not None and node not in only:
            continue
        if node.op == "output":
            lines.append(f"return {_argument(node.args[0], names, symbols)}")
            continue
        names[node] = f"%{len(names)}"
        kind = _kind(value_of(node), symbols)
        lines.append(f"{names[node]} = {_call(node, names, symbols)}" + (f" : {kind}" if kind else ""))
        child = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(child, GraphModule):
            lines.extend(f"    {line}" for line in _lines(child, None, symbols))
    return lines


def _call(node: Node, names: dict[Node, str], symbols: dict[str, str]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return node.op
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
    arguments = [_argument(arg, names, symbols) for arg in node.args]
    arguments += [f"{key}={_argument(arg, names, symbols)}" for key, arg in sorted(node.kwargs.items())]
    return f"{'.' if node.op == 'call_method' else ''}{name}({', '.join(arguments)})"


def _argument(arg: Any, names: dict[Node, str], symbols: dict[str, str]) -> str:
    if isinstance(arg, Node):
        return names.get(arg) or _kind(value_of(arg), symbols) or "?"
    if isinstance(arg, (tuple, list)):
        inner = ", ".join(_argument(item, names, symbols) for item in arg)
        return f"({inner})" if isinstance(arg, tuple) else f"[{inner}]"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{k}: {_argument(v, names, symbols)}" for k, v in sorted(arg.items())) + "}"
    if isinstance(arg, slice):
        ends = ["" if end is None else _argument(end, names, symbols) for end in (arg.start, arg.stop)]
        return ":".join(ends)
    if arg is Ellipsis:
        return "..."
    if isinstance(arg, torch.dtype):
        return _DTYPES.get(arg, str(arg))
    return str(arg)


def _kind(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return _size(value, symbols)
    return ""


def _size(size: Any, symbols: dict[str, str]) -> str:
    """A size with its symbols renamed s0, s1, ... as they appear: the tracer's own numbers depend on its history."""
    return re.sub(r"\b[a-z]+\d+\b", lambda m: symbols.setdefault(m[0], f"s{len(symbols)}"), str(size))
