"""Stage 3, prove: what the mask of each site is, and the input tensors that this was read from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.find.site import AttentionSite
from tmx_compile.lowering.table import Role
from tmx_compile.passes.lengths import has_fixed_range, hint
from tmx_compile.passes.plan import Plan, SitePlan
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.constants import KnownTensor, known_tensors
from tmx_compile.proof.own_key import own_key
from tmx_compile.proof.prove import Prover


def prove(plan: Plan) -> Plan:
    """Prove every site that could be read, of all layers: one that stays dense may still do without its mask."""
    first = next((item.site for item in plan.sites if item.site is not None), None)
    if first is None:
        return plan
    assert plan.storages is not None
    constants = known_tensors(plan.gm, plan.example_inputs, plan.constants)
    assume = plan.request.assume_causal
    split = plan.request.context_parallel is not None
    prover = Prover.of(first.fake("query"), plan.storages, assume_causal=assume, constants=constants, piece=split)

    def proven(item: SitePlan) -> SitePlan:
        if item.site is None:
            return item
        # Over a split cache a step is written anew in every layer.
        step = split and item.role is Role.STEP
        own = own_key(item.site) if step or (item.selected and item.role.shows_own_key) else None
        ordered = item.selected and _settle_order(item.site, may_guard=plan.host.guards)
        proof = prover.prove(item.site, ordered=ordered, own_key=own)
        if isinstance(proof, Proof):
            return replace(item, own_key=own, proof=proof)
        return replace(item, own_key=own, unproven=proof)

    sites = tuple(map(proven, plan.sites))
    positions = {node: i for i, node in enumerate(plan.gm.graph.find_nodes(op="placeholder"))}
    known = tuple(
        KnownTensor(node.name, positions[node], term) for node, term in prover.known.items() if node in positions
    )
    return replace(plan, sites=sites, known=known)


def _settle_order(site: AttentionSite, *, may_guard: bool) -> bool:
    """Whether there are no more rows than keys; guards on it where only the hints tell (a static cache is longer)."""
    q_len, kv_len = site.q_len, site.kv_len
    if statically_known_true(q_len <= kv_len):
        return True
    if not may_guard:
        return False
    symbolic = [size for size in (q_len, kv_len) if isinstance(size, torch.SymInt)]
    if any(not size.node.has_hint() or has_fixed_range(size) for size in symbolic):
        return False
    return hint(q_len) <= hint(kv_len) and bool(q_len <= kv_len)
