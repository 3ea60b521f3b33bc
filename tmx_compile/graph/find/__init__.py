"""Finders: one file per written form of attention, joined here."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import GraphModule

from tmx_compile.graph.find.sdpa import find_sdpa
from tmx_compile.graph.site import AttentionSite
from tmx_compile.report import Rejected

__all__ = ["find_attention"]


def find_attention(gm: GraphModule) -> Iterator[AttentionSite | Rejected]:
    """Every attention call of the graph in order: a site, or why it cannot become one."""
    yield from find_sdpa(gm)
