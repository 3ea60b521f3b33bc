"""Rules of the mask reader for operations that only ``aten`` graphs spell: exported programs and AOT-traced graphs.

An index expression ``x[a:b, None, i]`` is there a chain of ``slice``, ``unsqueeze``, ``select`` and ``index``; a cast
is ``_to_copy``; a difference may be taken apart into a concatenation and two slices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tmx_compile.graph import terms as t
from tmx_compile.graph.nodes import op_name, tensor_of
from tmx_compile.graph.read import (
    INTEGERS,
    MaskReader,
    NotUnderstood,
    Rule,
    argument,
    dtype_of,
    integer,
    only,
    shape_of,
)
from tmx_compile.graph.rules import RULES
from tmx_compile.graph.terms import Const, Lin, Size, Term


def _source(node: Node) -> Node:
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or tensor_of(source) is None:
        raise NotUnderstood
    return source


def _coordinate(rank: int, dim: Any) -> int:
    """The coordinate of a dimension of a tensor of ``rank`` dimensions."""
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise NotUnderstood
    return rank - 1 - (dim % rank)


def _begin(reader: MaskReader, index: Any, size: Size) -> Lin:
    """A first index that is surely not negative, counted from the front."""
    begin = Lin.of(integer(index))
    if begin.is_number and isinstance(begin.const, int) and begin.const < 0:
        begin = begin + Lin.of(size)
    if not reader.is_index(begin):
        raise NotUnderstood
    return begin


def _slice(reader: MaskReader, node: Node) -> Term:
    only(node, "dim", "start", "end", "step")
    source = _source(node)
    dim, start, step = argument(node, 1, "dim", 0), argument(node, 2, "start"), argument(node, 4, "step", 1)
    if step != 1:
        raise NotUnderstood
    along = _coordinate(len(shape_of(source)), dim)
    begin = _begin(reader, 0 if start is None else start, shape_of(source)[-1 - along])
    if op_name(source) == "constant_pad_nd" and begin == Lin(0) and _pads_only_ends(source):
        # SDPA's kernels on CUDA want an aligned bias: it is padded, and cut to its size again.
        inner = _source(source)
        if shape_of(inner) == shape_of(node):
            return reader.operand(inner)
    return t.substitute(reader.operand(source), {along: begin + Lin.of(0, {along: 1})})


def _pads_only_ends(node: Node) -> bool:
    widths = argument(node, 1, "pad")
    return isinstance(widths, (list, tuple)) and all(width == 0 for width in widths[::2])


def _select(reader: MaskReader, node: Node) -> Term:
    only(node, "dim", "index")
    source = _source(node)
    along = _coordinate(len(shape_of(source)), argument(node, 1, "dim"))
    begin = _begin(reader, argument(node, 2, "index"), shape_of(source)[-1 - along])
    # The dimensions to the left of the one that goes away move one to the right.
    kept = {c: Lin.of(0, {c - 1: 1}) for c in range(along + 1, len(shape_of(source)))}
    return t.substitute(reader.operand(source), {along: begin, **kept})


def _index(reader: MaskReader, node: Node) -> Term:
    """Indexing by one run of integer tensors; ``None`` keeps a dimension."""
    only(node, "indices")
    source, items = _source(node), argument(node, 1, "indices")
    rank, out = len(shape_of(source)), len(shape_of(node))
    items = [*items, *[None] * (rank - len(items))]
    gathers = [dim for dim, item in enumerate(items) if item is not None]
    if not gathers or gathers != list(range(gathers[0], gathers[-1] + 1)):
        raise NotUnderstood
    gathered = max(len(shape_of(items[dim])) for dim in gathers)
    new: dict[int, Lin] = {}
    for dim, item in enumerate(items):
        if item is None:
            place = dim if dim < gathers[0] else dim - len(gathers) + gathered
            new[rank - 1 - dim] = Lin.of(0, {out - 1 - place: 1})
        else:
            # The indices' own last dimension stands to the left of the dimensions kept after the run.
            new[rank - 1 - dim] = _gathered(reader, item, rank - 1 - gathers[-1])
    return t.substitute(reader.operand(source), new)


def _gathered(reader: MaskReader, item: Node, shift: int) -> Lin:
    term = reader.operand(item) if dtype_of(item) in INTEGERS else None
    if not isinstance(term, Lin) or not reader.is_index(term):
        raise NotUnderstood
    return t.substitute_lin(term, {c: Lin.of(0, {c + shift: 1}) for c in t.coordinates(term)})


def _reversed(reader: MaskReader, node: Node) -> Term:
    """``x.t()`` and ``x.T``: the dimensions in reverse order."""
    only(node)
    rank = len(shape_of(node))
    return t.substitute(reader.operand(_source(node)), {c: Lin.of(0, {rank - 1 - c: 1}) for c in range(rank)})


def _diff(reader: MaskReader, node: Node) -> Term:
    """First difference with one element before it, which continues the line: the constant step."""
    only(node, "n", "dim", "prepend", "append")
    source, before = _source(node), argument(node, 3, "prepend")
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None or not isinstance(before, Node):
        raise NotUnderstood
    along = _coordinate(len(shape_of(node)), argument(node, 2, "dim", -1))
    return _step(_continued(reader, before, source, along), along)


def _step(line: Lin, along: int) -> Term:
    return Lin.of(line.factor(along))


def _cat(reader: MaskReader, node: Node) -> Term:
    """One element and the affine line that continues it: the line from one step earlier on."""
    only(node, "dim")
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or not all(isinstance(x, Node) for x in parts):
        raise NotUnderstood
    before, source = parts
    assert isinstance(before, Node)
    assert isinstance(source, Node)
    along = _coordinate(len(shape_of(node)), argument(node, 1, "dim", 0))
    line = _continued(reader, before, source, along)
    return t.substitute(line, {along: Lin.of(-1, {along: 1})})


def _continued(reader: MaskReader, before: Node, source: Node, along: int) -> Lin:
    """The line of ``source``, of which ``before`` is the element at -1."""
    if dtype_of(before) not in INTEGERS or dtype_of(source) not in INTEGERS or shape_of(before)[-1 - along] != 1:
        raise NotUnderstood
    line = reader.number(source)
    if any(along in t.coordinates(element) for element, _ in line.atoms):
        raise NotUnderstood
    if t.substitute_lin(line, {along: Lin(-1)}) != reader.number(before):
        raise NotUnderstood
    return line


def _scalar(reader: MaskReader, node: Node) -> Term:
    """``scalar_tensor(value)``: what ``full`` reads from ``full([], value)``."""
    only(node)
    return _constant(reader, node, node.args[0])


def _constant(reader: MaskReader, node: Node, value: Any) -> Term:
    dtype = dtype_of(node)
    if isinstance(value, bool) and dtype == torch.bool:
        return Const(value)
    if isinstance(value, int) and dtype in INTEGERS:
        return Lin.of(value)
    if isinstance(value, (int, float)) and dtype.is_floating_point:
        # Rounded to the dtype: what counts as "minus infinity" is judged on rounded numbers.
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            rounded = float(torch.tensor(value, dtype=torch.float64).to(dtype))
        return t.Choice(t.TRUE, rounded, 0.0)
    raise NotUnderstood


def _iota(_: MaskReader, node: Node) -> Term:
    """``prims.iota(length, start=, step=)``, what decompositions make of ``arange``."""
    only(node, "start", "step")
    step = node.kwargs.get("step", 1)
    if dtype_of(node) not in INTEGERS or not isinstance(step, int):
        raise NotUnderstood
    return Lin.of(integer(node.kwargs.get("start", 0)), {0: step})


ATEN_RULES: dict[str, Rule] = {
    "slice": _slice,
    "select": _select,
    "index": _index,
    **dict.fromkeys(("t", "numpy_T"), _reversed),
    "diff": _diff,
    "cat": _cat,
    "scalar_tensor": _scalar,
    "iota": _iota,
    **dict.fromkeys(("_to_copy", "convert_element_type"), RULES["to"]),
    **dict.fromkeys(("lift_fresh_copy", "lift_fresh", "expand_copy", "detach_copy", "alias_copy"), RULES["expand"]),
    **dict.fromkeys(("_unsafe_view", "view_copy", "unsqueeze_copy", "squeeze_copy"), RULES["reshape"]),
    **dict.fromkeys(("permute_copy", "transpose_copy"), RULES["permute"]),
}
