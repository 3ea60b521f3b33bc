"""A live model as graphs whose attention can be switched: find, prove and substitute, then run without a compiler.

Dynamo captures the model, the pass does what it does for ``tmx_backend``, and every proven site becomes a switch
(``switch.py``). The graphs run node by node in eager mode, so that autograd works as usual and capturing costs
seconds. What is measured is thus the model as the pass understands it, and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, Node

from tmx_compile.analysis.capture.running import as_is, unlimited_recompiles
from tmx_compile.analysis.capture.sections import Piece, SectionSums
from tmx_compile.analysis.capture.switch import Switchboard, SwitchedAttention, install
from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.profile import GEOMETRY
from tmx_compile.errors import TriangleMixError
from tmx_compile.find import find_attention
from tmx_compile.graph.children import flatten
from tmx_compile.graph.effects import Effects
from tmx_compile.graph.layer import layer_paths
from tmx_compile.mask.geometry import Geometry
from tmx_compile.passes import pipeline
from tmx_compile.passes.record import records
from tmx_compile.proof.constants import watched
from tmx_compile.report import Rejected, Report
from tmx_compile.request import INDUCTOR, Request


@dataclass(frozen=True)
class Inputs:
    """One call of the model.

    Attributes:
        args: its arguments.
        kwargs: its keyword arguments.

    >>> import torch
    >>> from tmx_compile.analysis import Inputs
    >>> Inputs(kwargs={"input_ids": torch.zeros(1, 60, dtype=torch.int64)}).args
    ()
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A run with what its graph held at each switch: a later run of the same inputs can begin where it differs.

    Memory: the tensors that are alive at each switch, about those between two layers. :meth:`CapturedModel.trace` makes
    one, :meth:`CapturedModel.rerun` takes it.

    Attributes:
        inputs: the call.
        sparse: the layers that were sparse.
        geometry: theirs: sinks, window and last rows, in tokens.
        pieces: as given to :meth:`CapturedModel.pieces`.
        graph: what was run; for :meth:`CapturedModel.rerun` alone.
        states: by layer, the tensors alive at its switch; likewise.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.analysis import CapturedModel, Inputs
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> captured = CapturedModel(model, TriangleMixConfig(2, 6, 5))
    >>> with torch.no_grad():
    ...     dense, trace = captured.trace(Inputs((torch.randint(0, 50, (1, 60)),)))
    ...     sparse = captured.rerun(trace, {2})
    >>> trace.sparse, dense.shape == sparse.shape
    (frozenset(), True)
    """

    inputs: Inputs
    sparse: frozenset[int]
    geometry: Geometry
    pieces: tuple[Piece, ...]
    graph: _Graph
    states: Mapping[int, dict[Node, Any]]


class CapturedModel:
    """A model whose proven attention can be switched between dense and triangle, layer by layer.

    Args:
        model: any module that the pass understands; it is not changed.
        config: the geometry. Which layers it names does not matter, and ``min_seq_len`` does not apply.
        assume_causal: as in :func:`tmx_compile.tmx_backend`.

    Attributes:
        report: every attention site that was found, and why some cannot be switched.

    Raises:
        ValueError: ``model`` is no module.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.analysis import CapturedModel, Inputs
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> captured = CapturedModel(model, TriangleMixConfig(2, 6, 5))
    >>> inputs = Inputs((torch.randint(0, 50, (1, 60)),))
    >>> with torch.no_grad():
    ...     dense, sparse = captured.run(inputs), captured.run(inputs, {1, 2})
    >>> captured.layers
    (1, 2)
    >>> torch.allclose(dense[:, :7], sparse[:, :7], atol=1e-4), torch.allclose(dense, sparse, atol=1e-4)
    (True, False)
    """

    def __init__(self, model: nn.Module, config: TriangleMixConfig, *, assume_causal: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        original = getattr(model, "_orig_mod", model)
        assert isinstance(original, nn.Module)
        self.model = original
        self.config = config.replace(min_seq_len=0)
        self.report = Report()
        self._request = Request(self.config, lowering="operator", assume_causal=assume_causal)
        self._board = Switchboard(config.geometry)
        self._layers: set[int] = set()
        self._replay: _Replay | None = None
        self._compiled = torch.compile(self.model, backend=self._capture)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose attention can be switched, ascending, as far as the model has been captured."""
        return tuple(sorted(self._layers))

    @property
    def geometry(self) -> Geometry:
        """Sinks, window and last rows of the sparse layers (tokens); may be set between runs."""
        return self._board.geometry

    @geometry.setter
    def geometry(self, geometry: Geometry) -> None:
        self.config = self.config.replace(**dict(zip(GEOMETRY, geometry.counts, strict=True)))
        self._board.geometry = self.config.geometry

    @property
    def shapes(self) -> dict[int, list[tuple[int, int, int, int, int | None]]]:
        """By layer, of each attention call in the last run: query heads, key heads, head dims, own window or None.

        The head dims are those of keys and of values. A layer that a :meth:`rerun` skipped is not in it.
        """
        return {layer: list(calls) for layer, calls in self._board.shapes.items()}

    @contextlib.contextmanager
    def pieces(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Inside, a sparse layer sees a call as several prompts, one after the other, not as one.

        Each of ``pieces`` is (end, geometry): rows up to ``end``, over keys before it. A turn of a conversation is one;
        so are decode steps that stream, without last rows. They have to cover the call.
        """
        self._board.pieces = tuple(pieces)
        try:
            yield
        finally:
            self._board.pieces = ()

    def run(self, inputs: Inputs, sparse: Collection[int] = ()) -> Any:
        """The output for ``inputs`` with triangle attention in the layers ``sparse`` and dense attention in the others.

        No gradient is recorded. Nothing is compiled unless the inputs have new shapes.

        Raises:
            ValueError: a layer of ``sparse`` whose attention cannot be switched.
            TriangleMixError: the model has no attention that the pass could prove, or calls something else than before.
        """
        return self._run(inputs, frozenset(sparse), None)[0]

    def trace(self, inputs: Inputs, sparse: Collection[int] = (), since: Trace | None = None) -> tuple[Any, Trace]:
        """:meth:`run` with the same arguments, and a trace of it.

        Args:
            inputs: as for :meth:`run`.
            sparse: likewise.
            since: begin where this trace of the same inputs differs.

        Raises:
            ValueError: as :meth:`run`.
            TriangleMixError: likewise.
        """
        output, replay = self._run(inputs, frozenset(sparse), self._from(since, sparse, keep=True))
        assert replay is not None
        return output, Trace(inputs, frozenset(sparse), self.geometry, self._board.pieces, replay.graph, replay.states)

    def rerun(self, trace: Trace, sparse: Collection[int]) -> Any:
        """The output for the inputs of ``trace`` with the layers ``sparse``: runs what comes after the first change.

        A model of several graphs, and one that writes to tensors in place, runs from its beginning.

        Raises:
            ValueError: as :meth:`run`.
            TriangleMixError: likewise.
        """
        return self._run(trace.inputs, frozenset(sparse), self._from(trace, sparse, keep=False))[0]

    def _from(self, trace: Trace | None, sparse: Collection[int], *, keep: bool) -> _Replay:
        """A run that begins where a trace differs. With another geometry every sparse layer does."""
        changed = frozenset(sparse)
        if trace is not None:
            same = (trace.geometry, trace.pieces) == (self.geometry, self._board.pieces)
            changed = changed ^ trace.sparse if same else changed | trace.sparse
        return _Replay(changed, trace, keep=keep)

    def gradients(
        self, inputs: Inputs, number: Callable[[Any], torch.Tensor], record: Callable[[int, SectionSums], None]
    ) -> Any:
        """Run densely, differentiate a number of the output, and record every layer's Middle section on the way.

        Args:
            inputs: the call.
            number: the scalar tensor to differentiate, from the output. It may be a sum over the batch: the sums are
                kept apart by sequence.
            record: gets (layer, sums), once for every attention call.

        Returns:
            The model's output, without its graph.

        Raises:
            TriangleMixError: as :meth:`run`; or the number carries no gradient of the attention.
        """
        board = self._board
        board.recorder = record
        try:
            output, _ = self._run(inputs, frozenset(), None)
            value = number(output)
            if not value.requires_grad:
                raise TriangleMixError(
                    f"the output of {type(self.model).__name__} carries no gradient of its attention"
                )
            torch.autograd.grad(value, board.gates, allow_unused=True)
        finally:
            board.recorder, board.gates = None, []
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)

    def _run(self, inputs: Inputs, sparse: frozenset[int], replay: _Replay | None) -> tuple[Any, _Replay | None]:
        board = self._board
        board.sparse, board.visited, board.shapes, self._replay = sparse, set(), {}, replay
        before = set(self._layers)
        try:
            with as_is(self.model), unlimited_recompiles():
                output = self._compiled(*inputs.args, **inputs.kwargs)
        finally:
            board.sparse, self._replay = frozenset(), None
        visited = board.visited | (set() if replay is None else replay.skipped)
        if not self._layers:
            raise TriangleMixError(f"the pass proved no attention of {type(self.model).__name__}:\n{self._refusals()}")
        unknown = sorted(sparse - self._layers)
        if unknown:
            raise ValueError(f"sparse must be among the layers {list(self.layers)}, got {unknown}:\n{self._refusals()}")
        if before and visited != before:
            # Dynamo gave up on a graph, say; the numbers would silently be those of another model.
            raise TriangleMixError(f"layers {sorted(before)} were captured first, and this run had {sorted(visited)}")
        return output, replay

    def _refusals(self) -> str:
        found = [f"{site.path or '?'}: {site.reason} {site.detail}" for site in self.report if site.reason]
        return "\n".join(dict.fromkeys(found)) or "it has no attention call"

    def _capture(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend: substitute, install the switches, and hand the graph back to be run as it is."""
        sites = list(find_attention(flatten(gm)))
        paths = layer_paths(site.node for site in sites)
        layers = {
            path.index
            for site, path in zip(sites, paths, strict=True)
            if path.index is not None and not isinstance(site, Rejected)
        }
        config = self.config.replace(triangle_layer_indices=layers)
        outcome = pipeline.compile(gm, replace(self._request, config=config), INDUCTOR, example_inputs)
        plan = outcome.plan
        wanted = frozenset(site.layer.index for site in plan.triangle if site.layer.index is not None)
        switched = install(outcome.graph, self._board, wanted)
        self._layers |= switched
        self.report.add_graph(records(plan, self.report.graphs), plan.notes)
        graph = _Graph(outcome.graph)

        def run(*args: Any) -> Any:
            return graph.forward(args) if self._replay is None else self._replay.run(graph, args)

        return watched(run, plan.known) if plan.known else run


class _Graph:
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


class _Replay:
    """One run that keeps a trace, or begins at the trace of another."""

    def __init__(self, changed: frozenset[int], since: Trace | None, *, keep: bool) -> None:
        self._changed, self._since, self._keep = changed, since, keep
        self._graphs: list[_Graph] = []
        self.states: dict[int, dict[Node, Any]] = {}
        self.skipped: set[int] = set()

    @property
    def graph(self) -> _Graph:
        """The first graph that ran."""
        return self._graphs[0]

    def run(self, graph: _Graph, args: Sequence[Any]) -> Any:
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

    def _resume(self, graph: _Graph, since: Trace) -> tuple[int, Mapping[Node, Any]]:
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
