"""Query, key and value of a product: the (batch, heads, tokens, head_dim) tensor below its operand.

Scaling by a number, casts that lose nothing, copies, permutations, merged batches and heads, and the repetition of key
heads are seen through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from tmx_compile.find.axes import (
    Axes,
    backward,
    complete,
    is_copy,
    is_expand,
    is_lossless_cast,
    is_reshape,
    order_of,
    order_to,
    same_shape,
    source_of,
)
from tmx_compile.find.constant import number_of
from tmx_compile.find.repeat import same
from tmx_compile.find.site import Operand
from tmx_compile.graph.calls import named
from tmx_compile.graph.effects import writes
from tmx_compile.graph.nodes import tensor_of

_STEPS = 24
IDENTITY = (0, 1, 2, 3)


@dataclass(frozen=True)
class Found:
    """A tensor that may stand for an operand.

    Attributes:
        operand: the tensor.
        scale: what the graph multiplied it by afterwards.
        reader: the call that reads it, whose place in the graph says when.
        between: the tensors that were seen through.
    """

    operand: Operand
    scale: float
    reader: Node
    between: tuple[Node, ...] = ()

    @property
    def shape(self) -> Any:
        """(batch, heads, tokens, head_dim)."""
        return self.operand.fake.shape


def operands(reader: Node, node: Node, axes: Axes, last: tuple[str, str], *, scales: bool = True) -> Iterator[Found]:
    """Every tensor below ``node`` that may stand for the operand, from the nearest to the farthest.

    Args:
        reader: the product.
        node: its operand.
        axes: what the operand's axes stand for.
        last: the letters of tokens and head dimension.
        scales: whether a factor can be taken out.
    """
    repeats = "k" in last
    scale = 1.0
    between: tuple[Node, ...] = ()
    for _ in range(_STEPS):
        axes = complete(axes, last)
        order = order_to(axes, last)
        if order is not None:
            yield Found(Operand(node, None if order == IDENTITY else order), scale, reader, between)
        if node.op not in ("call_function", "call_method") or writes(node):
            return
        scaled = scaled_by_number(node) if scales else None
        below: Axes | None
        if scaled is not None:
            source, number = scaled
            scale *= number
            below = axes
        else:
            given = source_of(node)
            if given is None:
                return
            source = given
            below = _below(node, axes, repeats=repeats, order=order)
        if below is None:
            return
        between += (node,)
        reader, node, axes = node, source, below


def _below(node: Node, axes: Axes, *, repeats: bool, order: tuple[int, ...] | None) -> Axes | None:
    """The axes of a call's source, None where the call is not seen through."""
    if is_copy(node) or is_lossless_cast(node):
        return axes
    if order_of(node) is not None:
        return None if order == IDENTITY else backward(node, axes)
    if is_reshape(node):
        return backward(node, axes, repeats) if order is None or repeats else None
    if repeats and is_expand(node):
        return _expanded(node, axes)
    repeated = named(node, "repeat_interleave") if repeats else None
    if repeated is not None:
        factor, dim = repeated["repeats"], repeated["dim"]
        if isinstance(factor, int) and isinstance(dim, int) and axes[dim] == "h":
            return axes
    return None


def _expanded(node: Node, axes: Axes) -> Axes | None:
    """Repeated groups go, and heads that are one key head may; any other repetition is the operand's own."""
    source, fake = tensor_of(source_of(node)), tensor_of(node)
    assert source is not None
    assert fake is not None
    if source.dim() != fake.dim():
        return None
    names = list(axes)
    for i, (old, new) in enumerate(zip(source.shape, fake.shape, strict=True)):
        if same(old, new):
            continue
        if names[i] in ("r", "g"):
            names[i] = ""
        elif names[i] != "h":
            return None
    return tuple(names)


def scaled_by_number(node: Node) -> tuple[Node, float] | None:
    """The tensor that a call multiplies by a number known at compile time, and the number; sizes are kept."""
    call = named(node, "neg", "mul", "div")
    if call is None:
        return None
    if call.name == "neg":
        negated = source_of(node)
        return None if negated is None else (negated, -1.0)
    if call.arguments.get("rounding_mode") is not None:
        return None
    pairs = [("input", "other"), ("other", "input")] if call.name == "mul" else [("input", "other")]
    for scaled, by in pairs:
        source, number = call[scaled], number_of(call[by])
        if number is None or not isinstance(source, Node):
            continue
        old, new = tensor_of(source), tensor_of(node)
        if old is None or new is None or not same_shape(old.shape, new.shape):
            continue
        if call.name == "mul":
            return source, number
        return None if number == 0 else (source, 1.0 / number)
    return None
