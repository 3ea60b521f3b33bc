"""Keys and values seen through their repetition for grouped-query attention, and what finders ask of shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.nodes import op_name, tensor_of

_FOLDS = ("reshape", "view", "_unsafe_view", "flatten", "contiguous", "clone")


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
    folded = _through(node, _FOLDS, fake.dim() + 1)
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
    return fake.dim() == len(shape) and all(same(a, b) for a, b in zip(fake.shape, shape, strict=True))


def divides(kv_heads: Any, heads: Any) -> bool:
    """Whether a number of key heads surely divides one of query heads."""
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return kv_heads > 0 and heads % kv_heads == 0
    return same(heads, kv_heads)


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are surely equal; adds no guard."""
    return bool(statically_known_true(a == b))
