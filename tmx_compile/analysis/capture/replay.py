"""A captured graph that is run node by node, from its beginning or from where it first differs from an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Interpreter, Node

from tmx_compile.analysis.capture.switch import SwitchedAttention
from tmx_compile.graph.effects import Effects


class CapturedGraph:
    """A captured graph that can be run from one of its switches on."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.order = list(gm.graph.nodes)
        self.switches: dict[int, int] = {}
        for place, node in enumerate(self.order):
            module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, SwitchedAttention):
                # A layer with two calls begins at the first.
                self.switches.setdefault(module.layer, place)
        nested = any(child is not gm and isinstance(child, GraphModule) for child in gm.modules())
        self.can_skip = bool(self.switches) and not nested and not self._writes()
        last_use = {source: node for node in self.order for source in node.all_input_nodes}
        self._dies: dict[Node, list[Node]] = {}
        for source, node in last_use.items():
            self._dies.setdefault(node, []).append(source)

    def _writes(self) -> bool:
        """Whether anything but a switch may write to a tensor."""
        effects = Effects()
        return any(effects.of(node).writes for node in self.order if node.op != "call_module")

    def forward(self, args: Sequence[Any]) -> Any:
        """The whole graph."""
        return self.gm.forward(*args)

    def steps(
        self, args: Sequence[Any], start: int, env: Mapping[Node, Any], states: dict[int, dict[Node, Any]]
    ) -> Any:
        """Node by node from ``start`` with the values ``env``; fills ``states`` with the values at each switch."""
        interpreter = Interpreter(self.gm, garbage_collect_values=False)
        interpreter.env = dict(env)
        interpreter.args_iter = iter(args)
        at = {place: layer for layer, place in self.switches.items()}
        result: Any = None
        for place in range(start, len(self.order)):
            if place in at:
                states[at[place]] = dict(interpreter.env)
            node = self.order[place]
            interpreter.env[node] = result = interpreter.run_node(node)
            for dead in self._dies.get(node, ()):
                del interpreter.env[dead]
        return result


@dataclass(frozen=True)
class Reached:
    """What a graph held at each switch in a run.

    Attributes:
        graph: what was run.
        states: by layer, the tensors alive at its switch.
    """

    graph: CapturedGraph
    states: Mapping[int, dict[Node, Any]]


class Replay:
    """One run that keeps a trace, or begins at the trace of another."""

    def __init__(self, changed: frozenset[int], since: Reached | None, *, keep: bool) -> None:
        self._changed, self._since, self._keep = changed, since, keep
        self._graphs: list[CapturedGraph] = []
        self.states: dict[int, dict[Node, Any]] = {}
        self.skipped: set[int] = set()

    @property
    def graph(self) -> CapturedGraph:
        """The first graph that ran."""
        return self._graphs[0]

    def run(self, graph: CapturedGraph, args: Sequence[Any]) -> Any:
        """One graph of the run."""
        self._graphs.append(graph)
        since = self._since
        if len(self._graphs) > 1:
            # What one graph holds says nothing about the others.
            self.states.clear()
            return graph.forward(args)
        if not graph.can_skip:
            return graph.forward(args)
        states: dict[int, dict[Node, Any]] = {}
        start = 0
        env: Mapping[Node, Any] = {}
        if since is not None and since.graph is graph and since.states:
            start, env = self._resume(graph, since)
        result = graph.steps(args, start, env, states if self._keep else _Forget())
        if self._keep:
            self.states.update(states)
        return result

    def _resume(self, graph: CapturedGraph, since: Reached) -> tuple[int, Mapping[Node, Any]]:
        """Where the run first differs from the trace: at the last switch if nowhere, since a graph has to end."""
        order = sorted(since.states, key=graph.switches.__getitem__)
        first = next((layer for layer in order if layer in self._changed), order[-1])
        before = order[: order.index(first)]
        self.skipped.update(before)
        if self._keep:
            self.states.update({layer: since.states[layer] for layer in before})
        return graph.switches[first], since.states[first]


class _Forget(dict[int, Any]):
    """Takes states and keeps none."""

    def __setitem__(self, layer: int, state: Any) -> None:
        pass
