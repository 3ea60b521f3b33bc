"""Learned sinks where attention is written out: a column joined to the scores, and dropped after the softmax."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from tmx_compile.find.axes import Axes, backward, is_expand, is_lossless_cast, is_move, same_shape, source_of
from tmx_compile.find.repeat import same
from tmx_compile.find.site import SinkLogits
from tmx_compile.graph.calls import Call
from tmx_compile.graph.effects import writes
from tmx_compile.graph.nodes import tensor_of

_HEADS: tuple[list[str], ...] = ([], ["h"], ["g"], ["hg"], ["h", "g"])
_DEPTH = 8


def joined_sinks(call: Call, scores: Node, axes: Axes) -> SinkLogits | None:
    """What a ``cat`` joins to the scores behind the last key, where that is one number a head.

    Args:
        call: the ``cat``.
        scores: the scores.
        axes: what their axes are.
    """
    tensors, dim, fake = call["tensors"], call["dim"], tensor_of(scores)
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 2 or tensors[0] is not scores or fake is None:
        return None
    column = tensor_of(tensors[1])
    rank = len(axes)
    if column is None or column.dim() != rank or not isinstance(dim, int) or axes[dim % rank] != "k":
        return None
    heads = math.prod(size for name, size in zip(axes, fake.shape, strict=True) if name in ("h", "g", "hg"))
    if not same(column.shape[dim], 1) or not column.dtype.is_floating_point or column.device != fake.device:
        return None
    return _of_heads(tensors[1], tuple("" if name == "k" else name for name in axes), heads)


def _of_heads(node: Node, axes: Axes, heads: Any) -> SinkLogits | None:
    """The tensor of ``heads`` numbers in the order of the query heads, seen through its repetition."""
    for _ in range(_DEPTH):
        fake = tensor_of(node)
        assert fake is not None
        named = [name for name, size in zip(axes, fake.shape, strict=True) if not same(size, 1)]
        if named in _HEADS and same(fake.numel(), heads):
            return SinkLogits(node)
        source = source_of(node)
        below = tensor_of(source)
        if source is None or below is None or writes(node):
            return None
        if is_expand(node):
            axes = axes[len(axes) - below.dim() :]
        elif is_move(node) or is_lossless_cast(node):
            moved = backward(node, axes)
            if moved is None:
                return None
            axes = moved
        else:
            return None
        node = source
    return None


def drops_sinks(call: Call, like: Node) -> bool:
    """Whether a call cuts everything behind the shape of ``like`` off: the weights of the keys, without the sink's."""
    if call.name == "getitem":
        index = call["index"]
        items = [item for item in (index if isinstance(index, tuple) else (index,)) if item is not Ellipsis]
        if not all(isinstance(item, slice) and _from_first(item.start, item.step) for item in items):
            return False
    elif call.name == "slice":
        if not _from_first(call["start"], call["step"]):
            return False
    elif call.name != "narrow" or not _from_first(call["start"], None):
        return False
    kept, wanted = tensor_of(call.node), tensor_of(like)
    return kept is not None and wanted is not None and same_shape(kept.shape, wanted.shape)


def _from_first(start: Any, step: Any) -> bool:
    return not isinstance(start, Node) and start in (None, 0) and not isinstance(step, Node) and step in (None, 1)
