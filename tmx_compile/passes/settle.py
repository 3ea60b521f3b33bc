"""Stage 5, settle: for which lengths the graph is, and what strict mode says to that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from tmx_compile.errors import StrictModeError
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.sizes import size_inputs, size_of
from tmx_compile.lowering.table import Role
from tmx_compile.passes.judge import short
from tmx_compile.passes.lengths import Prompt, all_short, decide, has_fixed_range, hint, row_counts
from tmx_compile.passes.plan import Plan, SitePlan
from tmx_compile.report import NOTHING_MISSED, Reason, Rejected
from tmx_compile.request import Short


def settle(plan: Plan) -> Plan:
    """Every site of a graph must be on the same side of the limit, or say why it stays dense."""
    # Once per length, not per site: each look goes over all inputs of the graph.
    settled: dict[Any, Prompt | Rejected] = {}
    sites = list(plan.sites)
    for position, item in enumerate(sites):
        if not item.is_triangle:
            continue
        assert item.site is not None
        length = size_of(item.site.q_len)
        if length not in settled:
            settled[length], plan = _side(plan, item.site, item.role)
        side = settled[length]
        if isinstance(side, Rejected):
            sites[position] = item.untouched(replace(side, node=item.node))
    sides = {side for side in settled.values() if isinstance(side, Prompt)}
    prompt = Prompt.BOTH if Prompt.BOTH in sides else Prompt.LONG if sides else Prompt.SHORT
    plan = replace(plan, sites=tuple(sites), prompt=prompt)
    check_strict(plan)
    return plan


def _side(plan: Plan, site: AttentionSite, role: Role) -> tuple[Prompt | Rejected, Plan]:
    """The side of the limit that sites of one length are on, or why they stay dense; and the plan that knows it."""
    if role.shows_own_key:
        return Prompt.LONG, plan
    q_len, host = site.q_len, plan.host
    side = Prompt.LONG if role is Role.CHUNK else decide(q_len, plan.limit, may_guard=host.guards)
    if side is Prompt.SHORT:
        return short(site, plan), plan
    if side is Prompt.BOTH and host.short is Short.INSIDE:
        side = Prompt.LONG
    if side is Prompt.BOTH:
        assert isinstance(q_len, torch.SymInt)
        where = size_inputs(plan.gm.graph).get(q_len.node.expr)
        if host.short is Short.LEFT_DENSE or where is None or plan.length not in (None, where):
            return Rejected(Reason.NO_DISPATCH, f"length {q_len}", site.node), plan
        plan = replace(plan, length=where)
    if isinstance(q_len, torch.SymInt) and has_fixed_range(q_len):
        plan = replace(plan, fixed_length=q_len)
    return side, plan


def check_strict(plan: Plan) -> None:
    """Strict mode: no layer that the configuration names stays dense for a long prompt, whatever the reason.

    Raises:
        StrictModeError: a site that does, with its module and reason.
    """
    if plan.request.strict:
        for item in missed(plan):
            raise StrictModeError(f"{item.layer.path or item.node.name}: {item.why}")


def missed(plan: Plan, *, by_hint: bool = False) -> Iterator[SitePlan]:
    """The sites that stay dense for a long prompt in layers that the configuration names.

    A site whose layer cannot be told may be such a layer, unless it is shown to be none: not causal, an encoder's. A
    length that may be on either side is settled by a guard where allowed, or with ``by_hint`` is the one that
    compilation saw.
    """
    for item in plan.sites:
        why = item.why
        if why is None or why.reason in NOTHING_MISSED:
            continue
        named = item.selected
        if not item.layer.is_known and plan.config.layers():
            named = item.unproven is None or item.unproven.reason is not Reason.NOT_CAUSAL
        if named and not _is_short(item, plan, by_hint):
            yield item


def _is_short(item: SitePlan, plan: Plan, by_hint: bool) -> bool:
    """Whether a site sees short prompts only."""
    if item.site is not None and item.role.shows_own_key:
        return False
    lengths = row_counts(item.node) if item.site is None else [item.site.q_len]
    if plan.request.chunked_prefill:
        # A chunk's length tells nothing about its prompt's; a decode step is no prompt.
        return lengths == [1]
    if by_hint:
        lengths = [hint(length) or plan.limit + 1 for length in lengths]
    return all_short(lengths, plan.limit, may_guard=plan.host.guards)
