"""Rules of the mask reader that move elements about: broadcasting, reshapes, permutations, indices.

An index expression ``x[a:b, None, i]`` is one call in Dynamo's form. In an exported program or an AOT-traced graph it
is a chain of ``slice``, ``unsqueeze``, ``select`` and ``index``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from tmx_compile.graph.calls import Call, order_of
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.proof import terms as t
from tmx_compile.proof.read import INTEGERS, MaskReader, NotUnderstood, Rule, dtype_of, shape_of
from tmx_compile.proof.terms import Lin, Term


def _source(call: Call) -> Node:
    source = call["input"]
    if not isinstance(source, Node) or tensor_of(source) is None:
        raise NotUnderstood
    return source


def coordinate(rank: int, dim: Any) -> int:
    """The coordinate of a dimension of a tensor of ``rank`` dimensions."""
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise NotUnderstood
    return rank - 1 - (dim % rank)


def _same_term(reader: MaskReader, call: Call) -> Term:
    """Broadcasting: coordinates count from the right, so the term stays."""
    return reader.operand(call["input"])


def _reshape(reader: MaskReader, call: Call) -> Term:
    """A reshape that adds or removes dimensions of size 1, or changes only leading ones that the term ignores."""
    source = _source(call)
    old, new = shape_of(source), shape_of(call.node)
    old_dims = [len(old) - 1 - d for d, size in enumerate(old) if size != 1]
    new_dims = [len(new) - 1 - d for d, size in enumerate(new) if size != 1]
    pairs = list(zip(reversed(old_dims), reversed(new_dims), strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if old[-1 - a] != new[-1 - b]), len(pairs))
    moved = {a: Lin.of(0, {b: 1}) for a, b in pairs[:same]}
    term = reader.operand(source)
    if any(c in old_dims and c not in moved for c in t.coordinates(term)):
        raise NotUnderstood
    return t.substitute(term, moved)


# Permutations ----------------------------------------------------------------------------------------


def _permute(reader: MaskReader, call: Call) -> Term:
    order = order_of(call)
    if order is None:
        raise NotUnderstood
    last = len(order) - 1
    moved = {last - old: Lin.of(0, {last - new: 1}) for new, old in enumerate(order)}
    return t.substitute(reader.operand(call["input"]), moved)


# Indices ---------------------------------------------------------------------------------------------


def _getitem(reader: MaskReader, call: Call) -> Term:
    """Indexing by None, slices, integers, an ellipsis, and one run of integer tensors."""
    source, index = call["input"], call["index"]
    grid = reader.call(source)
    if grid is not None and grid.name == "meshgrid":
        return _of_grid(reader, call, grid)
    if tensor_of(source) is None or tensor_of(call.node) is None:
        raise NotUnderstood
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    rank, out = len(shape_of(source)), len(shape_of(call.node))
    used = sum(item is not None and item is not Ellipsis for item in items)
    if sum(item is Ellipsis for item in items) > 1:
        raise NotUnderstood
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    missing = [slice(None)] * (rank - used)
    items = items + missing if at is None else items[:at] + missing + items[at + 1 :]
    gathers = [i for i, item in enumerate(items) if tensor_of(item) is not None]
    if gathers and (gathers != list(range(gathers[0], gathers[-1] + 1)) or None in items):
        raise NotUnderstood
    gathered = max((len(shape_of(items[i])) for i in gathers), default=0)
    # Walk both shapes from the left: `dim` of the source, `place` of the result.
    dim, place = 0, 0
    new: dict[int, Lin] = {}
    for position, item in enumerate(items):
        if item is None:
            place += 1
            continue
        if dim >= rank:
            raise NotUnderstood
        old, size = rank - 1 - dim, shape_of(source)[dim]
        if position in gathers:
            new[old] = _index_term(reader, item, out - place - gathered)
            place += gathered if position == gathers[-1] else 0
        elif isinstance(item, slice):
            begin = reader.first(0 if item.start is None else item.start, size)
            new[old] = begin + Lin.of(0, {out - 1 - place: _step(item.step)})
            place += 1
        else:
            new[old] = reader.first(item, size)
        dim += 1
    return t.substitute(reader.operand(source), new)


def _index_term(reader: MaskReader, item: Any, shift: int) -> Lin:
    """An index tensor's term, its last dimension standing ``shift`` places from the right of the result."""
    term = reader.operand(item) if dtype_of(item) in INTEGERS else None
    if not isinstance(term, Lin) or not reader.is_index(term):
        raise NotUnderstood
    return t.substitute_lin(term, {c: Lin.of(0, {c + shift: 1}) for c in t.coordinates(term)})


def _step(step: Any) -> int:
    if step is not None and (not isinstance(step, int) or step < 1):
        raise NotUnderstood
    return 1 if step is None else step


def _of_grid(reader: MaskReader, call: Call, grid: Call) -> Term:
    """One result of ``meshgrid``: a vector along its own dimension; "xy" exchanges the first two."""
    tensors: Sequence[Any] = grid["tensors"]
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tensors[0]
    place = call["index"]
    if not isinstance(place, int) or not -len(tensors) <= place < len(tensors):
        raise NotUnderstood
    place %= len(tensors)
    vector = tensors[place]
    if tensor_of(vector) is None or len(shape_of(vector)) > 1 or grid["indexing"] not in (None, "ij", "xy"):
        raise NotUnderstood
    along = 1 - place if grid["indexing"] == "xy" and place < 2 <= len(tensors) else place
    return t.substitute(reader.operand(vector), {0: Lin.of(0, {len(tensors) - 1 - along: 1})})


def _slice(reader: MaskReader, call: Call) -> Term:
    source = _source(call)
    shape = shape_of(source)
    along = coordinate(len(shape), call["dim"])
    begin = reader.first(0 if call["start"] is None else call["start"], shape[-1 - along])
    padded = reader.call(source)
    if padded is not None and padded.name == "constant_pad_nd" and begin == Lin(0) and call["step"] == 1:
        # SDPA's kernels on CUDA want an aligned bias: it is padded, and cut to its size again.
        inner, widths = padded["input"], padded["pad"]
        ends = isinstance(widths, (list, tuple)) and all(width == 0 for width in widths[::2])
        if ends and tensor_of(inner) is not None and shape_of(inner) == shape_of(call.node):
            return reader.operand(inner)
    return t.substitute(reader.operand(source), {along: begin + Lin.of(0, {along: _step(call["step"])})})


def _narrow(reader: MaskReader, call: Call) -> Term:
    source = _source(call)
    shape = shape_of(source)
    along = coordinate(len(shape), call["dim"])
    begin = reader.first(call["start"], shape[-1 - along])
    return t.substitute(reader.operand(source), {along: begin + Lin.of(0, {along: 1})})


def _select(reader: MaskReader, call: Call) -> Term:
    source = _source(call)
    shape = shape_of(source)
    along = coordinate(len(shape), call["dim"])
    begin = reader.first(call["index"], shape[-1 - along])
    # The dimensions to the left of the one that goes away move one to the right.
    kept = {c: Lin.of(0, {c - 1: 1}) for c in range(along + 1, len(shape))}
    return t.substitute(reader.operand(source), {along: begin, **kept})


def _index(reader: MaskReader, call: Call) -> Term:
    """Indexing by one run of integer tensors; ``None`` keeps a dimension."""
    source, items = _source(call), call["indices"]
    rank, out = len(shape_of(source)), len(shape_of(call.node))
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
            new[rank - 1 - dim] = _index_term(reader, item, rank - 1 - gathers[-1])
    return t.substitute(reader.operand(source), new)


_COPIES = "contiguous clone detach detach_copy alias alias_copy lift_fresh lift_fresh_copy".split()  # noqa: SIM905
_RESHAPES = """view view_copy _unsafe_view view_as reshape reshape_as unsqueeze unsqueeze_copy squeeze squeeze_copy
flatten unflatten""".split()  # noqa: SIM905
_PERMUTATIONS = "permute permute_copy transpose transpose_copy t numpy_T mT mH matrix_H".split()  # noqa: SIM905

SHAPE_RULES: dict[str, Rule] = {
    **dict.fromkeys((*_COPIES, "expand", "expand_copy", "expand_as", "broadcast_to"), _same_term),
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_PERMUTATIONS, _permute),
    "getitem": _getitem,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "index": _index,
}
