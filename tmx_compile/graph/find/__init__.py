"""Finders: one file per written form of attention, joined here.

A finder looks at one node. It answers None where its form does not end at that node, a site where it does, or why a
call of its form cannot become one. The graph is walked once, whatever the number of finders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch.fx import GraphModule, Node

from tmx_compile.graph.find.sdpa import find_sdpa
from tmx_compile.graph.site import AttentionSite
from tmx_compile.report import Rejected

__all__ = ["FINDERS", "find_attention"]

FINDERS: tuple[Callable[[Node], AttentionSite | Rejected | None], ...] = (find_sdpa,)


def find_attention(gm: GraphModule) -> Iterator[AttentionSite | Rejected]:
    """Every attention call of the graph in order: a site, or why it cannot become one."""
    for node in gm.graph.nodes:
        for find in FINDERS:
            found = find(node)
            if found is not None:
                yield found
                break
