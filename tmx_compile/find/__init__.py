"""Finders: one file per written form of attention, joined here.

A finder looks at one node. It answers None where its form does not end at that node, a site where it does, or why a
call of its form cannot become one. The graph is walked once, whatever the number of finders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from torch._higher_order_ops.flex_attention import flex_attention
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from tmx_compile.find.aten import find_aten
from tmx_compile.find.eager import find_eager
from tmx_compile.find.flex import find_flex
from tmx_compile.find.sdpa import find_sdpa
from tmx_compile.find.site import AttentionSite
from tmx_compile.find.versions import with_versions
from tmx_compile.graph.composite import COMPOSITES
from tmx_compile.graph.nodes import op_name
from tmx_compile.graph.storages import Storages
from tmx_compile.report import Reason, Rejected

__all__ = ["FINDERS", "find_attention"]


def find_hidden(node: Node) -> Rejected | None:
    """A call of child graphs that hold attention, and that are not laid open (``graph/children.py``)."""
    if node.target in COMPOSITES:
        return Rejected(Reason.FORM, f"inside {op_name(node)}", node)
    owner = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or node.target is flex_attention or owner is None:
        return None
    for source in node.all_input_nodes:
        child = getattr(owner, str(source.target), None) if source.op == "get_attr" else None
        if isinstance(child, GraphModule) and next(find_attention(child), None) is not None:
            return Rejected(Reason.FORM, f"inside {node.target}", node)
    return None


FINDERS: tuple[Callable[[Node], AttentionSite | Rejected | None], ...] = (
    find_sdpa,
    find_aten,
    find_flex,
    find_hidden,
    find_eager,
)


def find_attention(gm: GraphModule, storages: Storages | None = None) -> Iterator[AttentionSite | Rejected]:
    """Every attention call of the graph in order: a site, or why it cannot become one.

    Args:
        gm: the graph.
        storages: of the graph; read here where a site is found if not given.
    """
    for node in gm.graph.nodes:
        for find in FINDERS:
            found = find(node)
            if isinstance(found, AttentionSite):
                storages = storages or Storages(gm.graph)
                timed = with_versions(found, storages)
                yield replace(timed, node=node) if isinstance(timed, Rejected) else timed
                break
            if found is not None:
                yield found
                break
