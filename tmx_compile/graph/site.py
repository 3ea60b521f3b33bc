"""One attention call of a graph, as the finders describe it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from tmx_compile.graph.nodes import value_of


@dataclass(frozen=True)
class AttentionSite:
    """``softmax(query @ key^T * scale + mask) @ value`` as it stands in a graph.

    ``key`` and ``value`` are the tensors before any repetition for grouped-query attention, (B, Hkv, Skv, D); query is
    (B, H, Sq, D) and H a multiple of Hkv. ``mask`` is the node of the additive or boolean mask, or None.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool
    scale: float
    form: str

    def fake(self, name: str) -> Tensor:
        """The fake tensor of ``query``, ``key`` or ``value``."""
        value = value_of(getattr(self, name))
        assert isinstance(value, Tensor)
        return value

    @property
    def q_len(self) -> int | torch.SymInt:
        """Number of query rows, possibly symbolic."""
        return self.fake("query").shape[2]

    @property
    def kv_len(self) -> int | torch.SymInt:
        """Number of keys, possibly symbolic."""
        return self.fake("key").shape[2]
