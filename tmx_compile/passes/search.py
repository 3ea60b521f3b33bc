"""Stage 2, find: every attention call with its layer, and those that no later stage has to look at."""

from __future__ import annotations

from dataclasses import replace

from tmx_compile.find import find_attention
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layer import LayerPath, layer_paths
from tmx_compile.graph.transform import transforms
from tmx_compile.lowering.table import Role
from tmx_compile.passes.plan import Plan, SitePlan, Triangle
from tmx_compile.report import Reason, Rejected

# The one transform that takes any operator with a backward.
_GRAD = ("grad",)


def search(plan: Plan) -> Plan:
    """List the sites; one that cannot be read is untouched from here on, the others are to be sparse until refused."""
    assert plan.storages is not None
    found = list(find_attention(plan.gm, plan.storages))
    layers = layer_paths(item.node for item in found)
    around = transforms(plan.gm.graph)
    reshaped = plan.storages.reshaped_input
    wanted = frozenset(plan.config.layers())
    name = plan.config.fingerprint()[:16]

    def listed(item: AttentionSite | Rejected, layer: LayerPath) -> SitePlan:
        node = item.node
        assert node is not None
        if layer.mark is not None and layer.mark.plan != name:
            # Handed over to another backend since.
            layer = replace(layer, mark=None)
        selected = layer.index in wanted if layer.mark is None else layer.mark.sparse
        made = SitePlan(node, layer, selected, Triangle(plan.geometry))
        if isinstance(item, AttentionSite) and around.get(node, _GRAD) != _GRAD:
            # No operand is what it seems: it may be batched.
            return made.untouched(Rejected(Reason.UNDER_TRANSFORM, " in ".join(reversed(around[node])), node))
        if reshaped is not None:
            # Dynamo cannot write down a guard on the sizes of such an input: the graph stays as it is.
            why = f"{reshaped.name} is given other storage or sizes"
            return made.untouched(Rejected(Reason.WRITTEN_IN_PLACE, why, node))
        if isinstance(item, Rejected):
            return made.untouched(item)
        return replace(made, site=item, role=role_of(item, plan))

    return replace(plan, sites=tuple(map(listed, found, layers)))


def role_of(site: AttentionSite, plan: Plan) -> Role:
    """What the rows of a site are."""
    if isinstance(site.q_len, int) and site.q_len == 1:
        if plan.row_of_prompt:
            return Role.ROW_OF_PROMPT
        return Role.STREAM if plan.request.decode == "streaming" else Role.STEP
    return Role.CHUNK if plan.request.chunked_prefill else Role.PROMPT
