"""``F.scaled_dot_product_attention`` in a Dynamo graph, with keys and values seen through their repetition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.nodes import op_name, tensor_of, value_of
from tmx_compile.graph.site import AttentionSite
from tmx_compile.report import Reason, Rejected

SDPA_TARGETS = frozenset({torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention})
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_KEYWORDS = frozenset({*_NAMES, "scale", "enable_gqa"})


def find_sdpa(gm: GraphModule) -> Iterator[AttentionSite | Rejected]:
    """Every scaled-dot-product attention node of the graph."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in SDPA_TARGETS:
            yield _site(node)


def _site(node: Node) -> AttentionSite | Rejected:
    arguments = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
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
    scale = _scale(arguments.get("scale"), fakes[0])
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
    if not (_same(k.shape[1], v.shape[1]) and _divides(k.shape[1], q.shape[1])):
        return Rejected(
            Reason.LAYOUT, f"{q.shape[1]} query heads, {k.shape[1]} key heads, {v.shape[1]} value heads", node
        )
    if not (_same(q.shape[0], k.shape[0]) and _same(q.shape[0], v.shape[0])):
        return Rejected(Reason.LAYOUT, "query, key and value are broadcast over the batch", node)
    mask = arguments.get("attn_mask")
    if mask is not None and not isinstance(mask, Node):
        return Rejected(Reason.FORM, "attn_mask is not a tensor of the graph", node)
    return AttentionSite(node, query, key, value, mask, is_causal, scale, "sdpa")


def _scale(arg: Any, query: torch.Tensor | None) -> float | None:
    """The scale as a number. A symbolic one is a model constant that tracing lifted: reading it guards on it."""
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


def unrepeated(node: Node) -> tuple[Node, int]:
    """See through the repetition of key heads: the (B, Hkv, S, D) tensor below ``node`` and the factor, 1 if none.

    Recognised by what the shapes do, not by who wrote it: (B, Hkv, S, D) -> (B, Hkv, 1, S, D) -> (B, Hkv, r, S, D) ->
    (B, Hkv * r, S, D), or ``repeat_interleave`` on the head dimension.
    """
    fake = tensor_of(node)
    if fake is None:
        return node, 1
    if op_name(node) == "repeat_interleave":
        given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | dict(node.kwargs)
        base, factor, dim = (given.get(name) for name in ("input", "repeats", "dim"))
        source = tensor_of(base)
        if isinstance(base, Node) and isinstance(factor, int) and dim in (1, -3) and source is not None:
            return base, factor
        return node, 1
    folded = _through(node, ("reshape", "view", "flatten", "contiguous", "clone"), fake.dim() + 1)
    if folded is None:
        return node, 1
    expanded = _through(folded, ("contiguous", "clone"), 5) if op_name(folded) in ("contiguous", "clone") else folded
    if expanded is None or op_name(expanded) not in ("expand", "broadcast_to"):
        return node, 1
    unit = expanded.args[0]
    base = unit.args[0] if isinstance(unit, Node) and op_name(unit) in ("getitem", "unsqueeze") else None
    source, one, wide = tensor_of(base), tensor_of(unit), tensor_of(expanded)
    if not isinstance(base, Node) or source is None or one is None or wide is None or source.dim() != 4:
        return node, 1
    b, heads, tokens, dim = source.shape
    factor = wide.shape[2]
    adds_unit = _shapes(one, (b, heads, 1, tokens, dim)) and _inserts_axis_2(unit)
    if adds_unit and _shapes(wide, (b, heads, factor, tokens, dim)) and _shapes(fake, (b, heads * factor, tokens, dim)):
        return base, int(factor)
    return node, 1


def _through(node: Node, names: tuple[str, ...], dims: int) -> Node | None:
    source = node.args[0] if op_name(node) in names and node.args else None
    fake = tensor_of(source)
    return source if isinstance(source, Node) and fake is not None and fake.dim() == dims else None


def _inserts_axis_2(node: Any) -> bool:
    """Whether a 4-d to 5-d ``unsqueeze`` or ``x[:, :, None]`` puts its new axis at position 2 and keeps the rest."""
    if op_name(node) == "unsqueeze":
        return node.args[1:2] in ((2,), (-3,)) or node.kwargs.get("dim") in (2, -3)
    index = node.args[1]
    items = index if isinstance(index, tuple) else (index,)
    full = slice(None, None, None)
    return items[:3] == (full, full, None) and all(item in (full, Ellipsis) for item in items[3:])


def _shapes(fake: torch.Tensor, shape: tuple[Any, ...]) -> bool:
    return fake.dim() == len(shape) and all(_same(a, b) for a, b in zip(fake.shape, shape, strict=True))


def _divides(kv_heads: Any, heads: Any) -> bool:
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return kv_heads > 0 and heads % kv_heads == 0
    return _same(heads, kv_heads)


def _same(a: Any, b: Any) -> bool:
    return bool(statically_known_true(a == b))
