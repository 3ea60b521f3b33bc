"""Keys and values seen through their repetition for grouped-query attention, and what finders ask of shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.calls import Call, named
from tmx_compile.graph.nodes import tensor_of

_COPIES = ("contiguous", "clone")
_FOLDS = ("reshape", "view", "_unsafe_view", "flatten", *_COPIES)


def unrepeated(node: Node) -> tuple[Node, int]:
    """See through the repetition of key heads: the (B, Hkv, S, D) tensor below ``node`` and the factor, 1 if none.

    Recognised by what the shapes do, not by who wrote it: (B, Hkv, S, D) -> (B, Hkv, 1, S, D) -> (B, Hkv, r, S, D) ->
    (B, Hkv * r, S, D), or ``repeat_interleave`` on the head dimension.
    """
    fake = tensor_of(node)
    if fake is None:
        return node, 1
    repeated = named(node, "repeat_interleave")
    if repeated is not None:
        base, factor, source = repeated["input"], repeated["repeats"], tensor_of(repeated["input"])
        if isinstance(base, Node) and isinstance(factor, int) and repeated["dim"] in (1, -3) and source is not None:
            return base, factor
        return node, 1
    folded = _through(node, _FOLDS, fake.dim() + 1)
    if folded is None:
        return node, 1
    copied = named(folded, *_COPIES)
    expanded = named(folded if copied is None else _through(folded, _COPIES, 5), "expand", "broadcast_to")
    inserted = None if expanded is None else named(expanded["input"], "getitem", "unsqueeze")
    if expanded is None or inserted is None:
        return node, 1
    base = inserted["input"]
    source, one, wide = tensor_of(base), tensor_of(inserted.node), tensor_of(expanded.node)
    if not isinstance(base, Node) or source is None or one is None or wide is None or source.dim() != 4:
        return node, 1
    b, heads, tokens, dim = source.shape
    factor = wide.shape[2]
    adds_unit = _shapes(one, (b, heads, 1, tokens, dim)) and _inserts_axis_2(inserted)
    if adds_unit and _shapes(wide, (b, heads, factor, tokens, dim)) and _shapes(fake, (b, heads * factor, tokens, dim)):
        return base, int(factor)
    return node, 1


def _through(node: Node, names: tuple[str, ...], dims: int) -> Node | None:
    call = named(node, *names)
    source = None if call is None else call["input"]
    fake = tensor_of(source)
    return source if isinstance(source, Node) and fake is not None and fake.dim() == dims else None


def _inserts_axis_2(call: Call) -> bool:
    """Whether a 4-d to 5-d ``unsqueeze`` or ``x[:, :, None]`` puts its new axis at position 2 and keeps the rest."""
    if call.name == "unsqueeze":
        return call["dim"] in (2, -3)
    index = call["index"]
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
