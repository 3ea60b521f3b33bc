"""What becomes of a site."""

from __future__ import annotations

from torch.fx import Node

from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.layout import memory_order
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.graph.sizes import size_of
from tmx_compile.report import Reason, Rejected


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
