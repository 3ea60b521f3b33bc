"""What became of the sites of a compiled graph, as rows of the report."""

from __future__ import annotations

from dataclasses import replace

import torch

from tmx_compile.graph.layer import LayerPath
from tmx_compile.lowering.table import Role
from tmx_compile.mask import pair_counts
from tmx_compile.passes.lengths import hint
from tmx_compile.passes.plan import Plan, SitePlan
from tmx_compile.report import SiteRecord


def records(plan: Plan, graph: int) -> list[SiteRecord]:
    """The report's rows for one compiled graph."""
    return [_record(item, plan, graph) for item in plan.sites]


def _layers(layer: LayerPath) -> tuple[int, ...]:
    if layer.index is None and layer.mark is not None:
        return layer.mark.layers
    return () if layer.index is None else (layer.index,)


def _record(item: SitePlan, plan: Plan, graph: int) -> SiteRecord:
    site = item.site
    is_streaming = item.role is Role.STREAM
    geometry = replace(plan.geometry, last=0) if is_streaming else plan.geometry
    tensors = [] if site is None else [site.fake(name) for name in ("query", "key", "value")]
    shapes = [tuple(hint(size) for size in x.shape) for x in tensors] or [(), (), ()]
    attended = causal = 0
    is_triangle = item.is_triangle
    if site is not None:
        reach = None if item.proof is None else item.proof.reach
        attended, causal = pair_counts(replace(geometry, reach=reach), shapes[0][2], shapes[1][2])
    return SiteRecord(
        graph=graph,
        path=item.layer.path,
        layer=item.layer.index,
        layers=_layers(item.layer),
        query=shapes[0],
        key=shapes[1],
        value=shapes[2],
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        dynamic=any(isinstance(size, torch.SymInt) for x in tensors for size in x.shape),
        decision="dense" if not is_triangle else "streaming" if is_streaming else "triangle",
        reason="" if item.why is None else item.why.reason.name,
        detail="" if item.why is None else item.why.detail,
        lowering="as written" if item.lowering is None else item.lowering.name,
        attended_pairs=attended if is_triangle else causal,
        causal_pairs=causal,
    )
