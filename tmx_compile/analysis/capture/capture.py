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
from torch.fx import GraphModule

from tmx_compile.analysis.capture.replay import CapturedGraph, Reached, Replay
from tmx_compile.analysis.capture.running import as_is, unlimited_recompiles
from tmx_compile.analysis.capture.sections import Piece, SectionSums
from tmx_compile.analysis.capture.switch import Switchboard, install
from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.profile import GEOMETRY
from tmx_compile.errors import TriangleMixError
from tmx_compile.find import find_attention
from tmx_compile.graph.children import flatten
from tmx_compile.graph.layer import layer_paths
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection
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
        dynamic: how the dynamic layers chose their blocks, by layer.
        reached: what its graph held; for :meth:`CapturedModel.rerun` alone.

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
    dynamic: Mapping[int, Selection]
    reached: Reached


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
        self.config = config.replace(min_seq_len=0, dynamic_layer_indices=None, dynamic_share=Selection.share)
        self.report = Report()
        self._request = Request(self.config, lowering="operator", assume_causal=assume_causal)
        self._board = Switchboard(config.geometry)
        self._layers: set[int] = set()
        self._replay: Replay | None = None
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

    @property
    def dynamic_layers(self) -> tuple[int, ...]:
        """Of :attr:`layers` those that can choose blocks while they run, as far as the model has been run."""
        return tuple(layer for layer in self.layers if layer not in self._board.not_dynamic)

    @property
    def densities(self) -> dict[int, float]:
        """By dynamic layer, the share of blocks that it visited in the last run."""
        sums = {layer: torch.stack(calls).sum(0).tolist() for layer, calls in self._board.blocks.items()}
        return {layer: visited / possible for layer, (visited, possible) in sums.items()}

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

    def run(self, inputs: Inputs, sparse: Collection[int] = (), dynamic: Mapping[int, Selection] | None = None) -> Any:
        """The output for ``inputs`` with triangle attention in the layers ``sparse`` and dense in the others.

        ``dynamic`` layers, none of them in ``sparse``, choose blocks as told; pieces do not apply to them. No gradient
        is recorded. Nothing is compiled unless the inputs have new shapes.

        Raises:
            ValueError: a layer of ``sparse`` or ``dynamic`` whose attention cannot be switched so.
            TriangleMixError: the model has no attention that the pass could prove, or calls something else than before.
        """
        return self._run(inputs, frozenset(sparse), dynamic or {}, None)[0]

    def trace(
        self,
        inputs: Inputs,
        sparse: Collection[int] = (),
        since: Trace | None = None,
        dynamic: Mapping[int, Selection] | None = None,
    ) -> tuple[Any, Trace]:
        """:meth:`run` with the same arguments, and a trace of it.

        Args:
            inputs: as for :meth:`run`.
            sparse: likewise.
            since: begin where this trace of the same inputs differs.
            dynamic: as for :meth:`run`.

        Raises:
            ValueError: as :meth:`run`.
            TriangleMixError: likewise.
        """
        ways = dict(dynamic or {})
        output, replay = self._run(inputs, frozenset(sparse), ways, self._from(since, sparse, ways, keep=True))
        assert replay is not None
        reached = Reached(replay.graph, replay.states)
        return output, Trace(inputs, frozenset(sparse), self.geometry, self._board.pieces, ways, reached)

    def rerun(self, trace: Trace, sparse: Collection[int], dynamic: Mapping[int, Selection] | None = None) -> Any:
        """The output for the inputs of ``trace`` with the layers ``sparse`` and ``dynamic``, as :meth:`run` gives it.

        Only what comes after the first change is run. A model of several graphs, and one that writes to tensors in
        place, runs from its beginning.

        Raises:
            ValueError: as :meth:`run`.
            TriangleMixError: likewise.
        """
        ways = dynamic or {}
        replay = self._from(trace, sparse, ways, keep=False)
        return self._run(trace.inputs, frozenset(sparse), ways, replay)[0]

    def _from(
        self, trace: Trace | None, sparse: Collection[int], dynamic: Mapping[int, Selection], *, keep: bool
    ) -> Replay:
        """A run that begins where a trace differs. With another geometry every sparse layer does."""
        changed = frozenset(sparse)
        if trace is None:
            return Replay(changed, None, keep=keep)
        same = (trace.geometry, trace.pieces) == (self.geometry, self._board.pieces)
        changed = changed ^ trace.sparse if same else changed | trace.sparse
        other = {x for x in {*dynamic, *trace.dynamic} if dynamic.get(x) != trace.dynamic.get(x)}
        return Replay(changed | other, trace.reached, keep=keep)

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
            output, _ = self._run(inputs, frozenset(), {}, None)
            value = number(output)
            if not value.requires_grad:
                raise TriangleMixError(
                    f"the output of {type(self.model).__name__} carries no gradient of its attention"
                )
            torch.autograd.grad(value, board.gates, allow_unused=True)
        finally:
            board.recorder, board.gates = None, []
        return torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)

    def _run(
        self, inputs: Inputs, sparse: frozenset[int], dynamic: Mapping[int, Selection], replay: Replay | None
    ) -> tuple[Any, Replay | None]:
        board = self._board
        both = sorted(sparse & dynamic.keys())
        if both:
            raise ValueError(f"dynamic must name no layer of sparse, got {both}")
        board.sparse, board.dynamic, self._replay = sparse, dynamic, replay
        board.visited, board.shapes, board.blocks = set(), {}, {}
        before = set(self._layers)
        try:
            with as_is(self.model), unlimited_recompiles():
                output = self._compiled(*inputs.args, **inputs.kwargs)
        finally:
            board.sparse, board.dynamic, self._replay = frozenset(), {}, None
        visited = board.visited | (set() if replay is None else replay.skipped)
        if not self._layers:
            raise TriangleMixError(f"the pass proved no attention of {type(self.model).__name__}:\n{self._refusals()}")
        for name, layers in (("sparse", sparse), ("dynamic", dynamic.keys())):
            unknown = sorted(layers - self._layers)
            if unknown:
                known = list(self.layers)
                raise ValueError(f"{name} must be among the layers {known}, got {unknown}:\n{self._refusals()}")
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
        graph = CapturedGraph(outcome.graph)

        def run(*args: Any) -> Any:
            return graph.forward(args) if self._replay is None else self._replay.run(graph, args)

        return watched(run, plan.known) if plan.known else run
