"""Stage 6, choose: what writes each site anew. After it the plan is complete, and nothing has been changed yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from tmx_compile.errors import LoweringError, StrictModeError
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph import nodes
from tmx_compile.graph.layout import memory_order, permuted
from tmx_compile.graph.transform import transforms
from tmx_compile.lowering import fa4
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import Role, Wish
from tmx_compile.lowering.table import choose as choose_lowering
from tmx_compile.mask.geometry import Geometry
from tmx_compile.passes.judge import of_other_shape, without_layout
from tmx_compile.passes.plan import Dynamic, Maskless, Plan, SitePlan, Triangle, Untouched
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.pieces import by_place
from tmx_compile.report import Rejected
from tmx_compile.request import Short


def choose(plan: Plan) -> Plan:
    """Give every site that is to be written anew its lowering, and every site its final decision."""
    around = transforms(plan.gm.graph)
    needs_grad = plan.needs_grad
    sites = tuple(_chosen(item, plan, needs_grad or item.node in around) for item in plan.sites)
    if plan.request.context_parallel is not None:
        _check_every_one(sites)
    return replace(plan, sites=sites)


def _check_every_one(sites: Iterable[SitePlan]) -> None:
    """As it is written, a call attends within its process's piece of the prompt: none may stay so.

    Raises:
        LoweringError: one has to.
    """
    for item in sites:
        more = item.proof is not None and not _is_causal(item.proof)
        if item.lowering is None or more:
            why = None if more else item.unproven or item.why
            raise LoweringError(
                f"context_parallel cannot split {item.layer.path or item.node.name}: "
                f"{why or 'its mask is more than causal and a padding mask'}"
            )


def _is_causal(proof: Proof) -> bool:
    """Whether a mask is causal, within a reach or not, and one over keys: what it is in a piece, it is in all."""
    return replace(proof, reach=None).plain and not any(map(by_place, proof.valid))


def _chosen(item: SitePlan, plan: Plan, needs_grad: bool) -> SitePlan:
    site, proof, request = item.site, item.proof, plan.request
    if site is None or proof is None:
        return item
    match item.decision:
        case Triangle(geometry):
            # A streaming step is no last row: it sees its sinks and its window.
            role = item.role
            geometry = replace(geometry, last=0) if role is Role.STREAM else geometry
        case Dynamic(_):
            # The operator's own form of it is dense: every row a last row.
            role, geometry = Role.DYNAMIC, plan.geometry.as_dense()
        case Untouched(why) if (dense := _dense_role(item, site, proof, plan)) is not None:
            item, role, geometry = replace(item, decision=Maskless(why)), dense, plan.geometry.as_dense()
        case _:
            return item
    call = _call(site, proof, geometry, needs_grad, plan)
    selection = item.decision.selection if isinstance(item.decision, Dynamic) else None
    wish = Wish(request.lowering, plan.limit, request.decode == "streaming", selection, request.ranks)
    lowering = choose_lowering(plan.host.place(call.query.device), role, call, wish)
    if not isinstance(lowering, Rejected):
        decision = Triangle(geometry) if isinstance(item.decision, Triangle) else item.decision
        return replace(item, decision=decision, call=call, lowering=lowering)
    if isinstance(item.decision, Maskless):
        return item.untouched(item.decision.why)
    if request.strict:
        raise StrictModeError(f"{item.layer.path or item.node.name}: {lowering}")
    return item.untouched(replace(lowering, node=item.node))


def _dense_role(item: SitePlan, site: AttentionSite, proof: Proof, plan: Plan) -> Role | None:
    """What a site that stays dense could do without: its mask, or SDPA where there is a faster kernel; or nothing."""
    # Layers that stay dense beside streaming ones keep their numbers to the last bit.
    if item.role.shows_own_key or of_other_shape(site) or without_layout(site.node):
        return None
    if plan.request.context_parallel is not None:
        return Role.MASKLESS if _is_causal(proof) else None
    # A FlexAttention call with a block plan forms no mask: it stays the user's choice.
    if not proof.plain or site.block_plan is not None:
        return None
    # On NPUs SDPA has no graph form.
    if site.masks or plan.host.compiler == "torchair":
        return Role.MASKLESS
    return Role.FASTER if fa4.missing(site.fake("query").device) is None else None


def _call(site: AttentionSite, proof: Proof, geometry: Geometry, needs_grad: bool, plan: Plan) -> AttentionCall:
    query, key, value = (site.fake(name) for name in ("query", "key", "value"))
    out = nodes.tensor_of(site.node)
    assert out is not None
    key_mask = None
    with nodes.on_fakes(nodes.fake_mode_of(plan.gm)):
        query, key, value = (x.to(out.dtype) for x in (query, key, value))
        # What is moved to the end leaves places without a key.
        moved = proof.promised or proof.positions or (proof.offset and proof.offset.atoms)
        if proof.valid or moved or proof.documents is not None:
            dtype = torch.bool if proof.documents is None else torch.int64
            key_mask = key.new_empty(query.shape[0], key.shape[2], dtype=dtype)
    order = memory_order(site.node)
    return AttentionCall(
        query,
        key,
        value,
        key_mask,
        replace(geometry, reach=proof.reach),
        site.scale,
        needs_grad,
        dense_up_to=plan.config.min_seq_len if plan.host.short is Short.INSIDE else None,
        layout=None if order is None else permuted(order, site.result_order),
        sink_logits=None if site.sink_logits is None else site.sink_logits.fake,
        softcap=site.softcap,
    )
