"""Stage 4, judge: which sites may go sparse, whatever the length, and the first reason against it for the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.config import TriangleMixConfig
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layout import memory_order
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.graph.sizes import size_of
from tmx_compile.lowering.table import Role
from tmx_compile.lowering.worth import least_length
from tmx_compile.passes.lengths import Prompt, hint, known
from tmx_compile.passes.plan import Plan, SitePlan
from tmx_compile.report import Reason, Rejected


def judge(plan: Plan) -> Plan:
    """Refuse what has a reason, and note layers that the configuration names and the model does not have."""
    first = next((item.site for item in plan.sites if item.site is not None), None)
    if first is not None:
        device = first.fake("query").device
        limit = least_length(plan.request.lowering, device, plan.config.min_seq_len, plan.geometry)
        plan = replace(plan, limit=limit)
    sites = []
    for item in plan.sites:
        why = None if item.site is None else _against(item, item.site, plan)
        sites.append(item if why is None else item.untouched(why))
    return replace(plan, sites=_one_stack(sites), notes=(*plan.notes, *_notes(sites, plan.config)))


def _against(item: SitePlan, site: AttentionSite, plan: Plan) -> Rejected | None:
    config, layer, role = plan.config, item.layer, item.role
    if layer.outside:
        return Rejected(Reason.LAYER_UNKNOWN, layer.outside, site.node)
    if not layer.is_known:
        if layer.indices > 1:
            return Rejected(Reason.LAYER_AMBIGUOUS, layer.path, site.node)
        return Rejected(Reason.LAYER_UNKNOWN, layer.path or "no path", site.node)
    if not item.selected:
        return Rejected(Reason.NOT_SELECTED, "", site.node)
    if role.shows_own_key:
        held = config.num_sink_tokens + config.sliding_window_size + 1
        if statically_known_true(site.kv_len <= held):
            return Rejected(Reason.FEW_KEYS, f"{site.kv_len} keys", site.node)
    elif role is Role.CHUNK:
        if item.proof is not None and item.proof.documents is not None:
            return Rejected(Reason.NO_LOWERING, "chunked prefill of packed documents", site.node)
    elif role is Role.STEP and config.min_seq_len == 0:
        return Rejected(Reason.SHORT_PROMPT, "one row: a decode step", site.node)
    elif known(site.q_len, plan.limit) is Prompt.SHORT:
        return short(site, plan)
    if item.proof is None:
        return item.unproven
    if role.shows_own_key and item.own_key is None:
        return Rejected(Reason.NOT_CAUSAL, "one row, and its own key is not shown to join the keys", site.node)
    if item.proof.reach is not None and item.proof.reach <= config.sliding_window_size:
        return Rejected(Reason.WINDOWED, f"{item.proof.reach + 1} keys", site.node)
    return of_other_shape(site) or without_layout(site.node)


def short(site: AttentionSite, plan: Plan) -> Rejected:
    """Why a prompt on the short side of the limit stays dense."""
    if hint(site.q_len) <= plan.config.min_seq_len:
        return Rejected(Reason.SHORT_PROMPT, f"at most {plan.config.min_seq_len} tokens", site.node)
    return Rejected(Reason.NOT_FASTER, f"up to {plan.limit} tokens", site.node)


def of_other_shape(site: AttentionSite) -> Rejected | None:
    """Why the result of a site is not shown to have the shape of the operator's, if so."""
    out, query, value = tensor_of(site.node), site.fake("query"), site.fake("value")
    assert out is not None
    wanted = [*query.shape[:3], value.shape[3]]
    if site.result_order is not None:
        wanted = [wanted[dim] for dim in site.result_order]
    if tuple(map(size_of, out.shape)) == tuple(map(size_of, wanted)):
        return None
    return Rejected(Reason.LAYOUT, f"a result of {tuple(out.shape)} for queries of {tuple(query.shape)}", site.node)


def without_layout(node: Node) -> Rejected | None:
    """Why nothing can take the place of a node in memory, if so."""
    if memory_order(node) is not None:
        return None
    out = tensor_of(node)
    return Rejected(Reason.LAYOUT, f"the result has strides {None if out is None else out.stride()}", node)


def _one_stack(sites: Sequence[SitePlan]) -> tuple[SitePlan, ...]:
    """Two stacks of layers that both hold accepted sites share their numbers: neither can be meant."""
    stacks = sorted({str(item.layer.stack) for item in sites if item.is_triangle and item.layer.mark is None})
    if len(stacks) < 2:
        return tuple(sites)
    why = f"layers of {' and '.join(stacks)}"
    return tuple(
        item.untouched(Rejected(Reason.LAYER_AMBIGUOUS, why, item.node)) if item.is_triangle else item for item in sites
    )


def _notes(sites: Sequence[SitePlan], config: TriangleMixConfig) -> list[str]:
    """Layers that the configuration names and a whole model does not have."""
    seen = {item.layer.index for item in sites if item.layer.index is not None}
    whole = len(seen) > 1 and seen == set(range(len(seen)))
    missing = [layer for layer in config.layers() if layer >= len(seen)]
    if not whole or not missing:
        return []
    return [f"the configuration names layers {_spans(missing)}, and the graph has layers 0-{len(seen) - 1}"]


def _spans(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]} ({len(numbers)} of them)"
