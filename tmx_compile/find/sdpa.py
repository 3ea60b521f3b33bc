"""``scaled_dot_product_attention`` in Dynamo graphs and, as ``aten`` operator, in exported programs.

Keys and values are seen through their repetition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.find.repeat import divides, same, unrepeated
from tmx_compile.find.site import AttentionSite, MaskPart, Operand
from tmx_compile.graph.calls import call_of, named
from tmx_compile.graph.nodes import tensor_of, value_of
from tmx_compile.report import Reason, Rejected

SDPA_TARGETS = frozenset(
    {
        torch.nn.functional.scaled_dot_product_attention,
        torch._C._nn.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
_KEYWORDS = frozenset("query key value attn_mask dropout_p is_causal scale enable_gqa".split())  # noqa: SIM905


def find_sdpa(node: Node) -> AttentionSite | Rejected | None:
    """A scaled-dot-product attention node."""
    if node.op != "call_function" or node.target not in SDPA_TARGETS:
        return None
    call = call_of(node)
    if call is None:
        return Rejected(Reason.FORM, "its arguments are not understood", node)
    return site_of(node, call.arguments, "sdpa")


def site_of(node: Node, arguments: Mapping[str, Any], form: str) -> AttentionSite | Rejected:
    """The site whose result is ``node``, from SDPA's arguments by name."""
    unknown = set(arguments) - _KEYWORDS
    if unknown:
        return Rejected(Reason.FORM, f"unknown argument {sorted(unknown)[0]}", node)
    query, key, value = (arguments.get(name) for name in ("query", "key", "value"))
    fakes = [tensor_of(arg) for arg in (query, key, value)]
    if any(fake is None for fake in fakes) or not isinstance(tensor_of(node), torch.Tensor):
        return Rejected(Reason.FORM, "tracing recorded no shape for it", node)
    if any(fake is not None and fake.dim() != 4 for fake in fakes):
        shapes = ", ".join(str(tuple(fake.shape)) for fake in fakes if fake is not None)
        return Rejected(Reason.LAYOUT, f"expected (batch, heads, tokens, head_dim), got {shapes}", node)
    dropout = arguments.get("dropout_p", 0.0)
    if dropout != 0.0:
        return Rejected(Reason.DROPOUT, f"dropout_p={dropout}", node)
    is_causal = arguments.get("is_causal", False)
    if not isinstance(is_causal, bool):
        return Rejected(Reason.FORM, "is_causal is not a constant", node)
    scale = scale_of(arguments.get("scale"), fakes[0])
    if scale is None:
        return Rejected(Reason.SCALE, f"scale={arguments.get('scale')} is not known at compile time", node)
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    base_key, key_factor = unrepeated(key)
    base_value, value_factor = unrepeated(value)
    if key_factor == value_factor:
        key, value = base_key, base_value
    q, k, v = (tensor_of(n) for n in (query, key, value))
    assert q is not None
    assert k is not None
    assert v is not None
    if not (same(k.shape[1], v.shape[1]) and divides(k.shape[1], q.shape[1])):
        return Rejected(
            Reason.LAYOUT, f"{q.shape[1]} query heads, {k.shape[1]} key heads, {v.shape[1]} value heads", node
        )
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        return Rejected(Reason.LAYOUT, "query, key and value are broadcast over the batch", node)
    mask = arguments.get("attn_mask")
    masks: tuple[MaskPart, ...] = ()
    if mask is not None:
        fake = tensor_of(mask)
        if not isinstance(mask, Node) or fake is None:
            return Rejected(Reason.FORM, "attn_mask is not a tensor of the graph", node)
        boolean = fake.dtype == torch.bool
        masks = (MaskPart(mask, "keep", -math.inf) if boolean else MaskPart(mask, "add", 1.0),)
    return AttentionSite(
        node, Operand(query), Operand(key), Operand(value), masks, is_causal, scale, form, effects=_effects(node)
    )


def _effects(node: Node) -> tuple[Node, ...]:
    """The operator itself: for its dropout it counts as random, and dead code of it would stay."""
    taken = named(node, "getitem")
    call = node if taken is None else taken["input"]
    return (call,) if isinstance(call, Node) and isinstance(call.target, torch._ops.OpOverload) else ()


def scale_of(arg: Any, query: torch.Tensor | None) -> float | None:
    """The scale as a number, None where it is not known.

    A symbolic one is a model constant that tracing lifted: reading it guards on it.
    """
    if arg is None:
        assert query is not None
        head_dim = query.shape[-1]
        return 1.0 / math.sqrt(head_dim) if isinstance(head_dim, int) and head_dim > 0 else None
    value = value_of(arg) if isinstance(arg, Node) else arg
    if isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        try:
            return float(value)
        except torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode:
            return None
    return None
