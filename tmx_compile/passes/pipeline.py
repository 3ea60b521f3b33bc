"""The pass, in order: find -> layer -> prove -> decide by length -> substitute -> lower -> record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.config import TriangleMixConfig
from tmx_compile.errors import StrictModeError
from tmx_compile.find import find_attention
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph import nodes
from tmx_compile.graph.children import flatten, restore
from tmx_compile.graph.layer import LayerPath, layer_paths
from tmx_compile.graph.layout import memory_order, permuted
from tmx_compile.graph.sizes import size_of
from tmx_compile.graph.storages import Storages
from tmx_compile.graph.transform import transforms
from tmx_compile.lowering import table as select
from tmx_compile.lowering.base import AttentionCall, Lowering
from tmx_compile.lowering.worth import least_length
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.passes.judge import of_other_shape, without_layout
from tmx_compile.passes.lengths import (
    LengthInput,
    Prompt,
    all_short,
    decide,
    find_length_input,
    has_fixed_range,
    hint,
    known,
    row_counts,
)
from tmx_compile.passes.lower import Lowerer, merged_options
from tmx_compile.passes.substitute import Substituter, Substitution
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.constants import KnownTensor, known_tensors
from tmx_compile.proof.own_key import own_key
from tmx_compile.proof.prove import Prover
from tmx_compile.report import Reason, Rejected

# The one transform that takes any operator with a backward.
_GRAD = ("grad",)


@dataclass(frozen=True)
class Options:
    """What the user asked of the pass."""

    config: TriangleMixConfig
    lowering: str = "auto"
    strict: bool = False
    assume_causal: bool = False
    decode: str = "dense"
    """What triangle layers do with a single row: "dense", or "streaming" over sinks and window."""
    chunked_prefill: bool = False
    """Calls may be chunks of their prompts: what a row attends is settled when the graph runs."""
    one_row_chunks: bool = False
    """With ``chunked_prefill``, for a graph of one row: it is a chunk rather than a decode step."""
    standalone: bool = False
    """The graph is handed back rather than compiled here: no guard, no choice by length, no Inductor settings."""
    target: str = select.INDUCTOR
    """What compiles the graph: "inductor" or "ascend"."""
    every_length: bool = False
    """One graph serves every length from 1 on and no guard is checked: short prompts are dense inside it."""


@dataclass(frozen=True)
class SitePlan:
    """One attention call with everything known about it. ``verdict`` is None where it may become triangle.

    ``unproven`` is why there is no proof, also where the verdict has an earlier reason.
    """

    node: Node
    layer: LayerPath
    site: AttentionSite | None
    proof: Proof | None
    verdict: Rejected | None
    selected: bool
    lowering: str = ""
    unproven: Rejected | None = None


@dataclass
class GraphPlan:
    """The plan of one graph: what each site becomes, and for which lengths.

    ``limit`` is the length up to which prompts stay dense. ``fixed_length`` is the prompt's length where the user fixed
    its range, so that no guard may narrow it; ``length`` is where the graph's inputs tell it, for a graph that serves
    both sides. ``known`` are the inputs whose values the proofs rest on; ``storages`` tells when the graph writes to
    its tensors. ``gm`` is the graph ``source`` with its child graphs laid open, or ``source`` itself.
    """

    gm: GraphModule
    options: Options
    sites: list[SitePlan]
    prompt: Prompt
    limit: int
    length: LengthInput | None = None
    fixed_length: torch.SymInt | None = None
    notes: list[str] = field(default_factory=list)
    known: tuple[KnownTensor, ...] = ()
    storages: Storages | None = None
    source: GraphModule | None = None

    @property
    def triangle(self) -> list[SitePlan]:
        """The sites to go sparse."""
        return [site for site in self.sites if site.verdict is None]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, the plan with the lowering of each site filled in, and the Inductor settings it needs."""

    gm: GraphModule
    plan: GraphPlan
    inductor_options: Mapping[str, Any]


def plan_graph(
    gm: GraphModule,
    options: Options,
    example_inputs: Sequence[Any] = (),
    constants: Mapping[str, torch.Tensor] | None = None,
) -> GraphPlan:
    """Decide every attention call of a graph. Changes nothing; may guard on which side of the limit the length is.

    ``example_inputs`` tell the values of the model's buffers, where they are real tensors; ``constants`` are inputs of
    the graph, by name, that always have these values.
    """
    source, gm = gm, flatten(gm)
    wanted = frozenset(options.config.layers())
    storages = Storages(gm.graph)
    prover: Prover | None = None
    sites: list[SitePlan] = []
    limit = options.config.min_seq_len
    reshaped = storages.reshaped_input
    around = transforms(gm.graph)
    found_sites = list(find_attention(gm, storages))
    layers = layer_paths(found.node for found in found_sites)
    for found, layer in zip(found_sites, layers, strict=True):
        node = found.node
        assert node is not None
        selected = layer.index in wanted
        if isinstance(found, AttentionSite) and around.get(node, _GRAD) != _GRAD:
            # No operand is what it seems: it may be batched.
            why = Rejected(Reason.UNDER_TRANSFORM, " in ".join(reversed(around[node])), node)
            sites.append(SitePlan(node, layer, None, None, why, selected))
            continue
        if reshaped is not None:
            # Dynamo cannot write down a guard on the sizes of such an input: the graph stays as it is.
            found = Rejected(Reason.WRITTEN_IN_PLACE, f"{reshaped.name} is given other storage or sizes", node)
        if isinstance(found, Rejected):
            sites.append(SitePlan(node, layer, None, None, found, selected))
            continue
        prover = prover or Prover.of(
            found.fake("query"),
            storages,
            assume_causal=options.assume_causal,
            constants=known_tensors(gm, example_inputs, constants or {}),
        )
        device = found.fake("query").device
        limit = least_length(options.lowering, device, options.config.min_seq_len, options.config.geometry)
        own = own_key(found) if selected and streams(found, options) else ""
        proof = prover.prove(found, ordered=selected and _settle_order(found, options), own_key=own)
        verdict = _verdict(found, layer, proof, selected, options, limit)
        proven, unproven = (proof, None) if isinstance(proof, Proof) else (None, proof)
        sites.append(SitePlan(node, layer, found, proven, verdict, selected, unproven=unproven))
    sites = _one_stack(sites)
    plan = GraphPlan(gm, options, sites, Prompt.SHORT, limit, storages=storages, source=source)
    if plan.triangle:
        _decide_length(plan)
    check_strict(plan)
    plan.notes.extend(_layer_notes(sites, options.config))
    if prover is not None:
        positions = {node: i for i, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
        plan.known = tuple(
            KnownTensor(node.name, positions[node], term) for node, term in prover.known.items() if node in positions
        )
    return plan


def _settle_order(site: AttentionSite, options: Options) -> bool:
    """Whether there are no more rows than keys; guards on it where only the hints tell (a static cache is longer)."""
    q_len, kv_len = site.q_len, site.kv_len
    if statically_known_true(q_len <= kv_len):
        return True
    if options.standalone:
        return False
    symbolic = [size for size in (q_len, kv_len) if isinstance(size, torch.SymInt)]
    if any(not size.node.has_hint() or has_fixed_range(size) for size in symbolic):
        return False
    return hint(q_len) <= hint(kv_len) and bool(q_len <= kv_len)


def _verdict(
    site: AttentionSite,
    layer: LayerPath,
    proof: Proof | Rejected,
    selected: bool,
    options: Options,
    limit: int,
) -> Rejected | None:
    config = options.config
    if layer.index is None:
        if layer.indices > 1:
            return Rejected(Reason.LAYER_AMBIGUOUS, layer.path, site.node)
        return Rejected(Reason.LAYER_UNKNOWN, layer.path or "no path", site.node)
    if not selected:
        return Rejected(Reason.NOT_SELECTED, "", site.node)
    if streams(site, options):
        held = config.num_sink_tokens + config.sliding_window_size + 1
        if statically_known_true(site.kv_len <= held):
            return Rejected(Reason.FEW_KEYS, f"{site.kv_len} keys", site.node)
    elif options.chunked_prefill and not _one_row(site):
        if isinstance(proof, Proof) and proof.documents is not None:
            return Rejected(Reason.NO_LOWERING, "chunked prefill of packed documents", site.node)
    elif _one_row(site) and config.min_seq_len == 0:
        return Rejected(Reason.SHORT_PROMPT, "one row: a decode step", site.node)
    elif known(site.q_len, limit) is Prompt.SHORT:
        return _short(site, config.min_seq_len, limit)
    if isinstance(proof, Rejected):
        return proof
    if streams(site, options) and not own_key(site):
        return Rejected(Reason.NOT_CAUSAL, "one row, and its own key is not shown to join the keys", site.node)
    if proof.reach is not None and proof.reach <= config.sliding_window_size:
        return Rejected(Reason.WINDOWED, f"{proof.reach + 1} keys", site.node)
    return of_other_shape(site) or without_layout(site.node)


def _one_row(site: AttentionSite) -> bool:
    return isinstance(site.q_len, int) and site.q_len == 1


def streams(site: AttentionSite, options: Options) -> bool:
    """Whether a site is one row whose own key has to be shown: it is to stream, or to be a chunk of a prompt."""
    return _one_row(site) and (options.decode == "streaming" or options.one_row_chunks)


def _short(site: AttentionSite, min_seq_len: int, limit: int) -> Rejected:
    if hint(site.q_len) <= min_seq_len:
        return Rejected(Reason.SHORT_PROMPT, f"at most {min_seq_len} tokens", site.node)
    return Rejected(Reason.NOT_FASTER, f"up to {limit} tokens", site.node)


def _one_stack(sites: list[SitePlan]) -> list[SitePlan]:
    """Two stacks of layers that both hold accepted sites share their numbers: neither can be meant."""
    stacks = sorted({str(site.layer.stack) for site in sites if site.verdict is None})
    if len(stacks) < 2:
        return sites
    why = f"layers of {' and '.join(stacks)}"
    return [
        replace(site, verdict=Rejected(Reason.LAYER_AMBIGUOUS, why, site.node)) if site.verdict is None else site
        for site in sites
    ]


def _decide_length(plan: GraphPlan) -> None:
    """Settle the lengths: every site of a graph must be on the same side, or say why it stays dense."""
    # Once per length, not per site: each look goes over all inputs of the graph.
    settled: dict[Any, Prompt | Rejected] = {}
    for position, item in enumerate(plan.sites):
        if item.verdict is not None:
            continue
        assert item.site is not None
        length = size_of(item.site.q_len)
        if length not in settled:
            settled[length] = _side(plan, item.site)
        side = settled[length]
        verdict = replace(side, node=item.node) if isinstance(side, Rejected) else None
        plan.sites[position] = replace(item, verdict=verdict)
    sides = {side for side in settled.values() if isinstance(side, Prompt)}
    plan.prompt = Prompt.BOTH if Prompt.BOTH in sides else Prompt.LONG if sides else Prompt.SHORT


def _side(plan: GraphPlan, site: AttentionSite) -> Prompt | Rejected:
    """The side of the plan's limit that sites of one length are on, or why they stay dense."""
    q_len = site.q_len
    if streams(site, plan.options):
        return Prompt.LONG
    if plan.options.chunked_prefill:
        side = Prompt.LONG
    else:
        side = decide(q_len, plan.limit, may_guard=not plan.options.standalone)
    if side is Prompt.SHORT:
        return _short(site, plan.options.config.min_seq_len, plan.limit)
    if side is Prompt.BOTH and plan.options.every_length:
        side = Prompt.LONG
    if side is Prompt.BOTH:
        assert isinstance(q_len, torch.SymInt)
        where = find_length_input(plan.gm, q_len)
        if plan.options.standalone or where is None or plan.length not in (None, where):
            return Rejected(Reason.NO_DISPATCH, f"length {q_len}", site.node)
        plan.length = where
    if isinstance(q_len, torch.SymInt) and has_fixed_range(q_len):
        plan.fixed_length = q_len
    return side


_FINE = (Reason.SHORT_PROMPT, Reason.NOT_FASTER, Reason.NOT_SELECTED, Reason.FEW_KEYS)
"""Dense, and nothing is missed: strict mode takes it. Every other reason is an error in a long prompt."""


def check_strict(plan: GraphPlan) -> None:
    """Strict mode: no layer that the configuration names stays dense for a long prompt, whatever the reason.

    A site whose layer cannot be told may be such a layer, unless it is shown to be none: not causal, an encoder's.

    Raises:
        StrictModeError: a site that does, with its module and reason.
    """
    if not plan.options.strict:
        return
    for item in plan.sites:
        if item.verdict is None or item.verdict.reason in _FINE:
            continue
        named = item.selected
        if item.layer.index is None and plan.options.config.layers():
            named = item.unproven is None or item.unproven.reason is not Reason.NOT_CAUSAL
        if named and not _is_short(item, plan):
            raise StrictModeError(f"{item.layer.path or item.node.name}: {item.verdict}")


def _is_short(item: SitePlan, plan: GraphPlan) -> bool:
    """Whether a site sees short prompts only; one that may be either is settled by a guard where allowed."""
    options = plan.options
    if item.site is not None and streams(item.site, options):
        return False
    lengths = row_counts(item.node) if item.site is None else [item.site.q_len]
    if options.chunked_prefill:
        # A chunk's length tells nothing about its prompt's; a decode step is no prompt.
        return lengths == [1]
    return all_short(lengths, plan.limit, may_guard=not options.standalone)


def _layer_notes(sites: list[SitePlan], config: TriangleMixConfig) -> list[str]:
    """Layers that the configuration names and a whole model does not have."""
    seen = {site.layer.index for site in sites if site.layer.index is not None}
    whole = len(seen) > 1 and seen == set(range(len(seen)))
    missing = [layer for layer in config.layers() if layer >= len(seen)]
    if not whole or not missing:
        return []
    return [f"the configuration names layers {_spans(missing)}, and the graph has layers 0-{len(seen) - 1}"]


def _spans(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]} ({len(numbers)} of them)"


def rewrite_graph(plan: GraphPlan) -> Rewritten:
    """Substitute and lower the planned sites, in the graph itself (``copy_graph`` keeps the original)."""
    gm = plan.gm
    fake_mode = nodes.fake_mode_of(gm)
    around = transforms(gm.graph)
    needs_grad = torch.is_grad_enabled() and any(
        isinstance(value := nodes.value_of(node), torch.Tensor) and value.requires_grad
        for node in gm.graph.nodes
        if node.op in ("placeholder", "get_attr")
    )
    assert plan.storages is not None
    substituter = Substituter(gm, fake_mode, plan.storages)
    chosen: list[tuple[Node, AttentionCall, Lowering]] = []
    sites: list[SitePlan] = []
    replaced: list[AttentionSite] = []
    for item in plan.sites:
        target = _target(item, plan.options)
        if target is None:
            sites.append(item)
            continue
        site = item.site
        assert site is not None
        assert item.proof is not None
        planned = _call(site, item.proof, target, needs_grad or site.node in around, fake_mode, plan.options)
        lowering = _lowering(planned, plan, stays_dense=item.verdict is not None)
        if isinstance(lowering, Rejected):
            sites.append(_refused(item, lowering, plan.options))
            continue
        if lowering is None:
            sites.append(item)
            continue
        both = substituter.substitute(Substitution(site, item.proof, *target, item.layer.index))
        chosen.append((both, _as_substituted(planned, both), lowering))
        replaced.append(site)
        sites.append(replace(item, lowering=lowering.name))
    substituter.clean(replaced)
    lowerer = Lowerer(gm, fake_mode)
    for node, call, lowering in chosen:
        if lowering is not select.OPERATOR:
            lowerer.lower(node, call, lowering)
    lowerer.settle()
    restore(gm)
    gm.graph.lint()
    gm.recompile()
    return Rewritten(gm, replace(plan, sites=sites), merged_options((call, low) for _, call, low in chosen))


def _refused(item: SitePlan, why: Rejected, options: Options) -> SitePlan:
    """A site that no lowering of the target takes: it stays as it is written."""
    if options.strict:
        raise StrictModeError(f"{item.layer.path or item.node.name}: {why}")
    return replace(item, verdict=replace(why, node=item.node))


def _target(item: SitePlan, options: Options) -> tuple[int, int, int] | None:
    """The geometry of a site: triangle, dense without its mask, or None to leave it exactly as it is."""
    if item.site is not None and streams(item.site, options):
        # Layers that stay dense keep their numbers to the last bit.
        sink, window, last = options.config.geometry
        return None if item.verdict is not None else (sink, window, last if options.one_row_chunks else 0)
    if item.verdict is None:
        return options.config.geometry
    # A FlexAttention call with a block plan forms no mask: it stays the user's choice. On NPUs SDPA has no graph form.
    if item.site is None or of_other_shape(item.site) or without_layout(item.site.node):
        return None
    written = item.site.masks or options.target == select.ASCEND.name
    if item.proof is not None and item.proof.plain and written:
        return (0, 0, ALL_ROWS) if item.site.block_plan is None else None
    return None


def _lowering(call: AttentionCall, plan: GraphPlan, *, stays_dense: bool) -> Lowering | Rejected | None:
    options = plan.options
    one_row = isinstance(call.query.shape[2], int) and call.query.shape[2] == 1
    if options.chunked_prefill and not stays_dense and (options.one_row_chunks or not one_row):
        return select.chunked(options.lowering, call, plan.limit, streaming=options.decode == "streaming")
    if one_row and call.geometry.last == 0:
        return select.decode(options.lowering, call)
    choose = select.dense if stays_dense else select.select
    return choose(options.lowering, call, portable=options.standalone, target=options.target)


def _call(
    site: AttentionSite,
    proof: Proof,
    target: tuple[int, int, int],
    needs_grad: bool,
    fake_mode: Any,
    options: Options,
) -> AttentionCall:
    query, key, value = (site.fake(name) for name in ("query", "key", "value"))
    out = nodes.tensor_of(site.node)
    assert out is not None
    key_mask = None
    with nodes.on_fakes(fake_mode):
        query, key, value = (x.to(out.dtype) for x in (query, key, value))
        # What is moved to the end leaves places without a key.
        moved = proof.promised or proof.positions or (proof.offset and proof.offset.atoms)
        if proof.valid or moved or proof.documents is not None:
            dtype = torch.bool if proof.documents is None else torch.int64
            key_mask = key.new_empty(query.shape[0], key.shape[2], dtype=dtype)
    dense_up_to = options.config.min_seq_len if options.every_length else None
    order = memory_order(site.node)
    layout = None if order is None else permuted(order, site.result_order)
    geometry = Geometry(*target, proof.reach)
    return AttentionCall(query, key, value, key_mask, geometry, site.scale, needs_grad, dense_up_to, layout)


def _as_substituted(planned: AttentionCall, both: Node) -> AttentionCall:
    """The call with the operands that its node has."""
    query, key, value, key_mask = (nodes.tensor_of(arg) for arg in both.args[:4])
    assert query is not None
    assert key is not None
    assert value is not None
    return replace(planned, query=query, key=key, value=value, key_mask=key_mask)
