"""Stage 2, find: every attention call with its layer, and those that no later stage has to look at."""

from __future__ import annotations

from dataclasses import replace

from tmx_compile.find import find_attention
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layer import LayerPath, layer_paths
from tmx_compile.graph.transform import transforms
from tmx_compile.layers import plan_of
from tmx_compile.lowering.table import Role
from tmx_compile.passes.plan import Decision, Dynamic, Plan, SitePlan, Triangle
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
    marked = any(layer.mark is not None for layer in layers)
    wanted, dynamic = frozenset(plan.config.layers()), frozenset(plan.config.dynamic_layers())
    name = plan_of(plan.config)

    def listed(item: AttentionSite | Rejected, layer: LayerPath) -> SitePlan:
        node = item.node
        assert node is not None
        layer = _own(layer, plan.request.handed_over, name)
        selected = layer.index in wanted | dynamic if layer.mark is None else layer.mark.sparse
        decision: Decision = Triangle(plan.geometry)
        if layer.mark is None and layer.index is not None and layer.index in dynamic:
            decision = Dynamic(plan.config.selection(layer.index))
        # Where nothing of the graph is the model's, something went wrong: that is told, or an error if strict.
        made = SitePlan(node, layer, selected and not (layer.outside and marked), decision)
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


def _own(layer: LayerPath, handed_over: bool, plan: str) -> LayerPath:
    """The layer as a backend sees it: marks of another plan are not its own, and the path may name another stack's."""
    if layer.mark is not None and layer.mark.plan != plan:
        layer = replace(layer, mark=None)
        if handed_over:
            return replace(layer, index=None, indices=0, outside="the model was handed to another backend since")
    if handed_over and layer.mark is None and layer.index is not None and not layer.is_shared:
        return replace(layer, outside="not in the model that was handed over")
    return layer


def role_of(site: AttentionSite, plan: Plan) -> Role:
    """What the rows of a site are."""
    if isinstance(site.q_len, int) and site.q_len == 1:
        if plan.row_of_prompt:
            return Role.ROW_OF_PROMPT
        return Role.STREAM if plan.request.decode == "streaming" else Role.STEP
    return Role.CHUNK if plan.request.chunked_prefill else Role.PROMPT
