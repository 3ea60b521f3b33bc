"""A decode step: where the one row's own key is.

A cross-attention's step looks the same but for this: its keys are an encoder's, and no mask of one row over keys tells
the two apart. So the graph has to show that the row's own key and value join those that are held.
"""

from __future__ import annotations

import enum

from torch.fx import Node

from tmx_compile.find.site import AttentionSite, Operand
from tmx_compile.graph.calls import named
from tmx_compile.graph.nodes import tensor_of

_SAME_TOKENS = ("contiguous", "to", "clone")


class OwnKey(enum.Enum):
    """Where the own key of a single row is."""

    LAST = "the last, after a concatenation along the tokens"
    WRITTEN = "written by the graph into the tensors of keys and values, at a place that the mask tells"


def own_key(site: AttentionSite) -> OwnKey | None:
    """Where a site of one row has its own key and value; None where neither place is shown."""
    if not isinstance(site.q_len, int) or site.q_len != 1 or site.is_causal:
        return None
    for where, shown in ((OwnKey.LAST, _ends_with_one), (OwnKey.WRITTEN, _takes_one)):
        if shown(site.key, site.node) and shown(site.value, site.node):
            return where
    return None


def _source(operand: Operand) -> Node:
    node = operand.node
    while (same := named(node, *_SAME_TOKENS)) is not None and isinstance(same["input"], Node):
        node = same["input"]
    return node


def _ends_with_one(operand: Operand, site: Node) -> bool:
    """The result of a concatenation along the tokens whose last part is one token."""
    del site
    joined = named(_source(operand), "cat")
    if joined is None:
        return False
    parts, dim = joined["tensors"], joined["dim"]
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or not isinstance(parts[-1], Node):
        return False
    return _is_token(parts[-1], dim, operand)


def _takes_one(operand: Operand, site: Node) -> bool:
    """A tensor that one token is copied into (``index_copy_``) before the site."""
    held = _source(operand)
    written = named(held, "index_copy_")
    calls = [written] if written is not None else [named(user, "index_copy_") for user in held.users]
    for call in calls:
        if call is not None and call.node < site and (written is not None or call["input"] is held):
            dim, new = call["dim"], call["source"]
            if isinstance(dim, int) and isinstance(new, Node) and _is_token(new, dim, operand):
                return True
    return False


def _is_token(node: Node, dim: int, operand: Operand) -> bool:
    """Whether a part along ``dim`` is one token."""
    tokens = 2 if operand.order is None else operand.order[2]
    part = tensor_of(node)
    return part is not None and part.dim() == 4 and dim % 4 == tokens and part.shape[tokens] == 1
