"""What is decided about a graph: frozen values that every stage of the pass reads, and replaces by the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from tmx_compile.config import TriangleMixConfig
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layer import LayerPath
from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.sizes import SizeInput
from tmx_compile.graph.storages import Storages
from tmx_compile.lowering.base import AttentionCall, Lowering
from tmx_compile.lowering.context_parallel import ContextParallel
from tmx_compile.lowering.table import Role
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.passes.lengths import Prompt
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.constants import KnownTensor
from tmx_compile.proof.own_key import OwnKey
from tmx_compile.report import Rejected
from tmx_compile.request import Host, Request


@dataclass(frozen=True)
class Triangle:
    """The site goes sparse."""

    geometry: Geometry


@dataclass(frozen=True)
class Dynamic:
    """The site attends to blocks of keys that are chosen while it runs."""

    selection: Selection


@dataclass(frozen=True)
class Maskless:
    """The site stays dense for a reason, but without forming its mask, or by a faster kernel."""

    why: Rejected


@dataclass(frozen=True)
class Untouched:
    """The site stays exactly as it is written."""

    why: Rejected


Decision: TypeAlias = "Triangle | Dynamic | Maskless | Untouched"


@dataclass(frozen=True)
class SitePlan:
    """One attention call with everything known about it.

    Attributes:
        node: the call.
        layer: where the trace says that it belongs.
        selected: whether the configuration names its layer.
        decision: its fate.
        site: the call as it was found, None where it could not be read.
        role: what its rows are.
        own_key: where a single row's own key was shown to be.
        proof: what its mask was proven to be, None where nothing was.
        unproven: why there is no proof, also where the decision has an earlier reason.
        lowering: what writes it anew, None where it is left alone.
        call: it as a lowering sees it, with ``lowering``.
        operator: the operator's node in its place, once it is substituted.
    """

    node: Node
    layer: LayerPath
    selected: bool
    decision: Decision
    site: AttentionSite | None = None
    role: Role = Role.PROMPT
    own_key: OwnKey | None = None
    proof: Proof | None = None
    unproven: Rejected | None = None
    lowering: Lowering | None = None
    call: AttentionCall | None = None
    operator: Node | None = None

    @property
    def is_triangle(self) -> bool:
        """Whether it is to have the triangle's mask."""
        return isinstance(self.decision, Triangle)

    @property
    def is_dynamic(self) -> bool:
        """Whether its blocks are to be chosen while it runs."""
        return isinstance(self.decision, Dynamic)

    @property
    def is_sparse(self) -> bool:
        """Whether it goes sparse, in either way."""
        return self.is_triangle or self.is_dynamic

    @property
    def why(self) -> Rejected | None:
        """Why it stays dense; None where it does not."""
        return None if isinstance(self.decision, (Triangle, Dynamic)) else self.decision.why

    def untouched(self, why: Rejected) -> SitePlan:
        """The same site, left as it is."""
        return replace(self, decision=Untouched(why))


@dataclass(frozen=True)
class Plan:
    """The plan of one graph: what each site becomes, for which lengths, and what that rests on.

    Attributes:
        gm: the graph to be rewritten: a copy, its child graphs laid open.
        request: what the user asked.
        host: who runs the result.
        example_inputs: of the graph; they tell the values of the model's buffers where they are real tensors.
        constants: inputs of the graph, by name, that always have these values.
        row_of_prompt: whether a graph of one row is planned as a chunk of a prompt, not as a decode step.
        storages: when the graph writes to its tensors.
        sites: every attention call, in order.
        limit: the length up to which prompts stay dense.
        prompt: the lengths that the graph serves.
        length: where the graph's inputs tell the prompt's length, for a graph that serves both sides of the limit.
        fixed_length: the prompt's length where the user fixed its range, so that no guard may narrow it.
        known: the inputs whose values the proofs rest on.
        notes: remarks for the report.
        seconds: the time that each stage took.
        visited: where the graph counts the blocks of its dynamic sites, (sites, 2) int64; None: it has none.
    """

    gm: GraphModule
    request: Request
    host: Host
    example_inputs: Sequence[Any] = ()
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    row_of_prompt: bool = False
    storages: Storages | None = None
    sites: tuple[SitePlan, ...] = ()
    limit: int = 0
    prompt: Prompt = Prompt.SHORT
    length: SizeInput | None = None
    fixed_length: torch.SymInt | None = None
    known: tuple[KnownTensor, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    visited: torch.Tensor | None = None

    @property
    def config(self) -> TriangleMixConfig:
        """The configuration, which is there: without one nothing is planned."""
        assert self.request.config is not None
        return self.request.config

    @property
    def geometry(self) -> Geometry:
        """The configuration's geometry."""
        return self.config.geometry

    @property
    def needs_grad(self) -> bool:
        """Whether what the graph computes is differentiated."""
        return torch.is_grad_enabled() and any(
            isinstance(value := value_of(node), torch.Tensor) and value.requires_grad
            for node in self.gm.graph.nodes
            if node.op in ("placeholder", "get_attr")
        )

    @property
    def as_given(self) -> bool:
        """Whether the graph is to stay as it came: no prompt is long enough, and each holds all of its tokens."""
        return self.prompt is Prompt.SHORT and self.request.context_parallel is None

    @property
    def triangle(self) -> list[SitePlan]:
        """The sites with the triangle's mask."""
        return [item for item in self.sites if item.is_triangle]

    @property
    def sparse(self) -> list[SitePlan]:
        """The sites that go sparse."""
        return [item for item in self.sites if item.is_sparse]

    def described(self) -> tuple[str, str]:
        """A graph of a split prompt: its name, and what the other processes' has to have in common with it."""
        names = [item.layer.path or item.node.name for item in self.sites]
        name = f"the graph of {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
        decisions = []
        for layer, item in zip(names, self.sites, strict=True):
            assert isinstance(item.lowering, ContextParallel)
            assert item.call is not None
            decisions.append(f"{layer}: {item.why or 'triangle'}, by {item.lowering.form(item.call)}")
        return name, f"{self.config!r}, lowering={self.request.lowering!r}, {'; '.join(decisions)}"
