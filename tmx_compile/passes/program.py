"""Stages of a graph that is handed back rather than compiled: a GraphModule, or an exported program's.

Nothing will check a guard for such a graph, and nothing will choose between two graphs: what comes out is right for
every length that goes in, or the site stays dense. A graph of ``aten`` operators stays one: what the pass inserted is
traced into them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only

from tmx_compile.errors import VerificationError
from tmx_compile.graph import nodes
from tmx_compile.graph.copies import keep_names, with_graph
from tmx_compile.graph.layout import NAME
from tmx_compile.graph.nodes import INSERTED, value_of
from tmx_compile.passes.plan import Plan

_ORIGINAL = "tmx_original"


def refresh(plan: Plan) -> Plan:
    """Give every node an example value of its own: a tensor that was asked once would not ask for a guard again."""
    _refresh(plan.gm.graph)
    return plan


def retrace(plan: Plan) -> Plan:
    """Write what was inserted as operators, in a graph of operators, and put the original example values back."""
    gm = plan.gm
    if any("val" in node.meta for node in gm.graph.nodes):
        composite = any(item.node.target is torch.ops.aten.scaled_dot_product_attention.default for item in plan.sites)
        gm = _Retracer(gm, composite).run()
    _restore(gm.graph)
    gm.recompile()
    return replace(plan, gm=gm)


def _refresh(graph: Graph) -> None:
    """Give every node an example value of its own, of one fake mode; :func:`_restore` puts the original ones back.

    A tensor remembers what it was asked (is it contiguous?), and would not ask for a guard again. ``make_fx`` on real
    tensors records each with a mode of its own.
    """
    values = [x for node in graph.nodes for x in tree_leaves(value_of(node)) if isinstance(x, Tensor)]
    modes = {id(x.fake_mode) if isinstance(x, FakeTensor) else None for x in values}
    shared = values[0].fake_mode if len(modes) == 1 and isinstance(values[0], FakeTensor) else None
    mode = shared or FakeTensorMode()

    def fresh(x: Tensor) -> Tensor:
        if x.layout != torch.strided:
            return x
        if shared is None and any(isinstance(size, torch.SymInt) for size in (*x.shape, *x.stride())):
            raise ValueError("rewrite needs example values of one fake tensor mode where lengths are symbolic")
        with nodes.on_fakes(mode):
            made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        return made.requires_grad_(x.requires_grad)

    for node in graph.nodes:
        key = _value_key(node)
        if key in node.meta:
            node.meta[_ORIGINAL] = node.meta[key]
            node.meta[key] = tree_map_only(Tensor, fresh, node.meta[key])


def _value_key(node: Node) -> str:
    return "val" if "val" in node.meta else "example_value"


def _restore(graph: Graph) -> None:
    for node in graph.nodes:
        if _ORIGINAL in node.meta:
            node.meta[_value_key(node)] = node.meta.pop(_ORIGINAL)


@dataclass
class _Run:
    """Inserted nodes in a row, and the nodes of the original graph that they read."""

    nodes: list[Node]

    @property
    def inputs(self) -> list[Node]:
        inside = set(self.nodes)
        read = (x for node in self.nodes for x in node.all_input_nodes)
        return list(dict.fromkeys(x for x in read if x not in inside))

    @property
    def outputs(self) -> list[Node]:
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


class _Retracer:
    """Copies a graph; what the pass inserted is run on the example values and recorded as operators.

    Args:
        gm: the rewritten graph.
        composite: keep composite operators (``scaled_dot_product_attention``, ``reshape``), as the graph itself does.
    """

    def __init__(self, gm: GraphModule, composite: bool) -> None:
        self._gm = gm
        self._composite = composite
        self._fake_mode = nodes.fake_mode_of(gm)
        self._graph = Graph()
        self._moved: dict[Node, Node] = {}

    def run(self) -> GraphModule:
        """The copy."""
        run: list[Node] = []
        for node in self._gm.graph.nodes:
            if INSERTED in node.meta:
                run.append(node)
            if run and (INSERTED not in node.meta or NAME in node.meta):
                self._retrace(_Run(run))
                run = []
            if INSERTED not in node.meta:
                self._moved[node] = self._copied(node)
        keep_names(self._gm.graph, self._graph)
        return with_graph(self._gm, self._graph)

    def _copied(self, node: Node) -> Node:
        if node.op != "output":
            return self._graph.node_copy(node, self._moved.__getitem__)
        made: Node = self._graph.output(torch.fx.node.map_arg(node.args[0], self._moved.__getitem__))
        made.meta = dict(node.meta)
        return made

    def _retrace(self, run: _Run) -> None:
        inputs, outputs = run.inputs, run.outputs

        def body(*values: Any) -> list[Any]:
            known = dict(zip(inputs, values, strict=True))
            for node in run.nodes:
                known[node] = self._call(node, known)
            return [known[node] for node in outputs]

        with nodes.on_fakes(self._fake_mode):
            traced = make_fx(body, pre_dispatch=self._composite)(*map(value_of, inputs))
        names = {id(node): node.meta[NAME] for node in outputs if NAME in node.meta}
        self._inline(traced, run, names)

    def _call(self, node: Node, known: dict[Node, Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self._gm, str(node.target))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _inline(self, traced: GraphModule, run: _Run, names: dict[int, str]) -> None:
        """Copy the traced nodes; the site's result gets the name that the call had, the graph's output may be it."""
        results = traced.graph.output_node().args[0]
        assert isinstance(results, (list, tuple))
        named = {made: names[id(node)] for made, node in zip(results, run.outputs, strict=True) if id(node) in names}
        origin = {key: run.nodes[0].meta[key] for key in ("nn_module_stack", "stack_trace") if key in run.nodes[0].meta}
        values = iter(run.inputs)
        inner: dict[Node, Node] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                inner[node] = self._moved[next(values)]
            elif node.op != "output":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), inner.__getitem__)
                target = self._adopt(getattr(traced, str(node.target))) if node.op == "get_attr" else node.target
                # Names of its own: those of the original nodes are names of the program's results.
                name = named.get(node, f"tmx_{node.name}")
                inner[node] = made = self._graph.create_node(node.op, target, args, kwargs, name)
                made.meta = dict(origin) | {"val": node.meta.get("val"), INSERTED: True}
        self._moved.update({old: inner[new] for old, new in zip(run.outputs, results, strict=True)})

    def _adopt(self, child: Any) -> str:
        if not isinstance(child, GraphModule):
            raise VerificationError(f"tracing what was inserted left a constant: {child!r}")
        count = 0
        while hasattr(self._gm, name := f"tmx_graph_{count}"):
            count += 1
        self._gm.register_module(name, child)
        return name
