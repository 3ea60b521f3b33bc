"""A decode step without a mask: whether its one row stands at the last key."""

from __future__ import annotations

import torch
from torch.fx import Node

from tmx_compile.graph.nodes import op_name, tensor_of
from tmx_compile.graph.site import AttentionSite, Operand

_SAME_TOKENS = ("contiguous", "to", "clone")


def own_key_is_last(site: AttentionSite) -> bool:
    """Whether an unmasked site of one row appends that row's own key and value to those that it holds.

    A cross-attention's step looks the same but for this: its keys are an encoder's. So keys and values have to be a
    concatenation along the tokens that ends with a single one.
    """
    alone = site.q_len == 1 and not site.masks and not site.is_causal
    return alone and _ends_with_one(site.key) and _ends_with_one(site.value)


def _ends_with_one(operand: Operand) -> bool:
    node = operand.node
    while op_name(node).split(".")[0] in _SAME_TOKENS and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.ops.aten.cat.default):
        return False
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or not isinstance(parts[-1], Node):
        return False
    tokens = 2 if operand.order is None else operand.order[2]
    last = tensor_of(parts[-1])
    return last is not None and last.dim() == 4 and dim % 4 == tokens and last.shape[tokens] == 1
