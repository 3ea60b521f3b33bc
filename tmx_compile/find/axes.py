"""What each axis of a tensor stands for, followed through permutations and reshapes.

An axis is a string of letters: ``b`` batch, ``h`` heads (key heads, where ``g`` query heads share one), ``g`` group,
``q`` rows, ``k`` keys, ``d`` head dimension, ``e`` the values' head dimension, ``r`` repeats of a key head. ``hg`` is
both merged, row-major; ``*`` is batch and heads merged, before it is known how; an empty string is an axis of size 1
without a meaning. Everything is read off the recorded shapes: a reshape keeps the row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from tmx_compile.find.repeat import same
from tmx_compile.graph.calls import Call, call_of
from tmx_compile.graph.calls import order_of as _order_of
from tmx_compile.graph.effects import writes
from tmx_compile.graph.nodes import tensor_of

Axes: TypeAlias = tuple[str, ...]

_RESHAPES = frozenset(
    "reshape view _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as getitem".split()  # noqa: SIM905
)
_COPIES = frozenset({"contiguous", "clone", "alias"})
_CASTS = frozenset({"to", "_to_copy", "type", "type_as", "float", "half", "bfloat16", "double"})
_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_EXPANDS = frozenset({"expand", "expand_as", "broadcast_to"})
_FULL = slice(None, None, None)


def source_of(node: Node) -> Node | None:
    """The tensor that a call is about; None for calls of which nothing is known."""
    return _source(call_of(node))


def _source(call: Call | None) -> Node | None:
    source = None if call is None else call.arguments.get("input")
    return source if isinstance(source, Node) and tensor_of(source) is not None else None


def is_copy(node: Node) -> bool:
    """Whether a call gives the numbers of its first argument in its shape."""
    call = call_of(node)
    if call is None:
        return False
    return call.name in _COPIES or ((call.name in _EXPANDS or _slices(call)) and _keeps_shape(node))


def is_cast(node: Node) -> bool:
    """Whether a call gives its first argument in another floating dtype (or the same) on the same device."""
    call, fake = call_of(node), tensor_of(node)
    source = tensor_of(_source(call))
    if call is None or call.name not in _CASTS or source is None or fake is None:
        return False
    return {source.dtype, fake.dtype} <= _FLOATS and source.device == fake.device and _keeps_shape(node)


def is_lossless_cast(node: Node) -> bool:
    """Whether a call is a cast to a dtype that holds every number of the old one."""
    source, fake = tensor_of(source_of(node)), tensor_of(node)
    if not is_cast(node) or source is None or fake is None:
        return False
    return torch.promote_types(source.dtype, fake.dtype) == fake.dtype


def is_reshape(node: Node) -> bool:
    """Whether a call is a reshape: the same numbers in the same row-major order."""
    call = call_of(node)
    source, fake = tensor_of(_source(call)), tensor_of(node)
    if call is None or call.name not in _RESHAPES or source is None:
        return False
    if call.name == "getitem":
        index = call["index"]
        items = index if isinstance(index, tuple) else (index,)
        return all(item is None or item is Ellipsis or item == _FULL for item in items)
    return fake is not None and source.dtype == fake.dtype


def is_expand(node: Node) -> bool:
    """Whether a call repeats axes of size 1."""
    call = call_of(node)
    return call is not None and call.name in _EXPANDS and _source(call) is not None


def order_of(node: Node) -> tuple[int, ...] | None:
    """How a permutation orders its source's axes; None for any other call."""
    call = call_of(node)
    return None if call is None else _order_of(call)


def is_move(node: Node) -> bool:
    """Whether a call changes neither the numbers of its first argument nor how many there are."""
    if writes(node):
        return False
    return is_copy(node) or is_reshape(node) or order_of(node) is not None


def forward(node: Node, axes: Axes) -> Axes | None:
    """The axes of a move or cast, from those of its source; None where an axis would be cut."""
    source, fake = tensor_of(source_of(node)), tensor_of(node)
    assert source is not None
    assert fake is not None
    order = order_of(node)
    if order is not None:
        return tuple(axes[d] for d in order)
    if is_reshape(node):
        return regroup(axes, source.shape, fake.shape)
    return axes


def backward(node: Node, axes: Axes, repeats: bool = False) -> Axes | None:
    """The axes of a move's or cast's source; ``repeats``: a ``h`` may turn out to be ``h`` and ``r``."""
    source, fake = tensor_of(source_of(node)), tensor_of(node)
    assert source is not None
    assert fake is not None
    order = order_of(node)
    if order is not None:
        back = [""] * len(order)
        for position, d in enumerate(order):
            back[d] = axes[position]
        return tuple(back)
    if is_reshape(node):
        return regroup(axes, fake.shape, source.shape, repeats)
    return axes


def regroup(axes: Axes, shape: Sequence[Any], target: Sequence[Any], repeats: bool = False) -> Axes | None:
    """The axes of a reshape to ``target``, matched from the right by sizes; None where an axis would be cut."""
    found: list[str] = []
    i, j = len(shape) - 1, len(target) - 1
    while i >= 0 or j >= 0:
        if i >= 0 and j >= 0 and same(shape[i], target[j]):
            found.append("" if same(target[j], 1) else axes[i])
            i, j = i - 1, j - 1
        elif j >= 0 and same(target[j], 1):
            found.append("")
            j -= 1
        elif i >= 0 and same(shape[i], 1):
            i -= 1
        elif i < 0 or j < 0:
            return None
        elif count := _run(shape[i], target[: j + 1]):
            names = _split(axes[i], target[j - count + 1 : j + 1], repeats)
            if names is None:
                return None
            found.extend(reversed(names))
            i, j = i - 1, j - count
        elif count := _run(target[j], shape[: i + 1]):
            found.append("".join(axes[i - count + 1 : i + 1]))
            i, j = i - count, j - 1
        else:
            return None
    return tuple(reversed(found))


def heads_of(axes: Axes) -> str:
    """What the axis of heads is called among four; ``g`` where all query heads share one key head."""
    return next((name for name in ("hg", "h", "g") if name in axes), "h")


def complete(axes: Axes, last: tuple[str, str]) -> Axes:
    """Name the unnamed axes of four: batch, heads and the ``last`` two, of which an axis of size 1 may be any."""
    heads = heads_of(axes)
    open_ = [i for i, name in enumerate(axes) if name in ("", "*")]
    missing = [name for name in ("b", heads, *last) if name not in axes]
    if len(axes) != 4 or len(open_) != len(missing):
        return axes
    names = list(axes)
    for i, name in zip(open_, missing, strict=True):
        names[i] = name
    return tuple(names)


def order_to(axes: Axes, last: tuple[str, str]) -> tuple[int, ...] | None:
    """The permutation that makes four axes (batch, heads, *last); None where they are others."""
    wanted = ("b", heads_of(axes), *last)
    return tuple(axes.index(name) for name in wanted) if sorted(axes) == sorted(wanted) else None


def _run(size: Any, sizes: Sequence[Any]) -> int:
    """How many of the last sizes multiply to ``size``; 0 if none of 2 to 4 do."""
    for count in range(2, min(4, len(sizes)) + 1):
        if same(size, math.prod(sizes[-count:])):
            return count
    return 0


def _split(axis: str, sizes: Sequence[Any], repeats: bool) -> tuple[str, ...] | None:
    """Names for the parts of an axis; parts of size 1 get none."""
    parts = [i for i, size in enumerate(sizes) if not same(size, 1)]
    if axis == "*":
        letters = "bhg"[: len(parts)] if len(parts) in (2, 3) else ""
    elif axis == "h" and repeats:
        letters = "hr"
    elif axis == "q":
        # Rows of all query heads that share a key head, one head after the other.
        letters = "gq"
    else:
        letters = axis
    if len(letters) != len(parts):
        return None
    names = [""] * len(sizes)
    for i, letter in zip(parts, letters, strict=True):
        names[i] = letter
    return tuple(names)


def _slices(call: Call) -> bool:
    """Whether a call is an index of nothing but slices; where it keeps the shape, it keeps everything."""
    index = call["index"] if call.name == "getitem" else None
    if call.name == "slice":
        return True
    return isinstance(index, tuple) and all(isinstance(item, slice) or item is Ellipsis for item in index)


def _keeps_shape(node: Node) -> bool:
    source, fake = tensor_of(source_of(node)), tensor_of(node)
    return source is not None and fake is not None and same_shape(source.shape, fake.shape)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are surely equal; adds no guard."""
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
