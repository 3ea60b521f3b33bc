"""What each operation does to index terms: the rules of the mask reader, by the operation's name.

A rule gives the term of its node, or raises :class:`~tmx_compile.graph.read.NotUnderstood`, and the node stays opaque.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
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
    as_constants,
    as_truth,
    dtype_of,
    integer,
    only,
    shape_of,
)
from tmx_compile.graph.terms import Choice, Const, Lin, Term, Truth

# Constants and ranges --------------------------------------------------------------------------------


def _arange(_: MaskReader, node: Node) -> Term:
    only(node)
    if dtype_of(node) not in INTEGERS:
        raise NotUnderstood
    numbers = [integer(arg) for arg in node.args]
    if len(numbers) == 1:
        return Lin.of(0, {0: 1})
    step = numbers[2] if len(numbers) == 3 else 1
    if not isinstance(step, int):
        raise NotUnderstood
    return Lin.of(numbers[0], {0: step})


def _filled(reader: MaskReader, node: Node, value: Any) -> Term:
    dtype = dtype_of(node)
    if isinstance(value, Node):
        return _as(dtype, reader.operand(value))
    if dtype == torch.bool:
        return Const(bool(value))
    if dtype in INTEGERS:
        return Lin.of(int(value))
    return _floats(dtype, float(value))


def _floats(dtype: torch.dtype, value: float | Choice) -> Term:
    """Constants as a term, rounded to the dtype: what counts as "minus infinity" is judged on rounded numbers."""
    if isinstance(value, Choice):
        yes, no = (_floats(dtype, x) for x in (value.yes, value.no))
        return Choice(value.condition, _leaf(yes), _leaf(no))
    return Choice(t.TRUE, _rounded(dtype, value), 0.0)


def _leaf(term: Term) -> float | Choice:
    assert isinstance(term, Choice)
    return term.yes if term.condition == t.TRUE else term


@functools.lru_cache(maxsize=256)
def _rounded(dtype: torch.dtype, value: float) -> float:
    if not dtype.is_floating_point:
        return value
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _as(dtype: torch.dtype, term: Term) -> Term:
    """A term converted to a dtype."""
    if dtype == torch.bool:
        return as_truth(term)
    if isinstance(term, Lin) and dtype in INTEGERS:
        return term
    constants = as_constants(term)
    if dtype in INTEGERS and not isinstance(constants, Choice):
        return Lin.of(int(constants))
    return _floats(dtype, constants)


def _full(reader: MaskReader, node: Node) -> Term:
    only(node, "fill_value", "size")
    return _filled(reader, node, argument(node, 2 if op_name(node) == "new_full" else 1, "fill_value"))


def _constant(value: int) -> Rule:
    def rule(reader: MaskReader, node: Node) -> Term:
        only(node, "size", "memory_format")
        return _filled(reader, node, value)

    return rule


def _scalar(reader: MaskReader, node: Node) -> Term:
    only(node)
    if len(node.args) != 1 or not isinstance(node.args[0], (bool, int, float)):
        raise NotUnderstood
    return _filled(reader, node, node.args[0])


# Arithmetic, comparison, logic -----------------------------------------------------------------------


def _arithmetic(combine: Callable[[Lin, Lin], Lin], numbers: Callable[[float, float], float]) -> Rule:
    """Affine over integers; over anything else, the same for each of the constants that an operand may be."""

    def rule(reader: MaskReader, node: Node) -> Term:
        only(node)
        if len(node.args) != 2:
            raise NotUnderstood
        dtype = dtype_of(node)
        a, b = (reader.operand(arg) if not isinstance(arg, float) else Choice(t.TRUE, arg, 0.0) for arg in node.args)
        if dtype in INTEGERS and isinstance(a, (Lin, Const)) and isinstance(b, (Lin, Const)):
            return combine(reader.number(node.args[0]), reader.number(node.args[1]))
        if dtype == torch.bool:
            raise NotUnderstood
        return _floats(dtype, _each(numbers, as_constants(a), as_constants(b)))

    return rule


def _each(numbers: Callable[[float, float], float], a: float | Choice, b: float | Choice) -> float | Choice:
    """Apply an operation to whichever constants are chosen; both sides of one condition are chosen together."""
    if isinstance(a, Choice):
        if isinstance(b, Choice) and a.condition == b.condition:
            return t.choose(a.condition, _each(numbers, a.yes, b.yes), _each(numbers, a.no, b.no))
        return t.choose(a.condition, _each(numbers, a.yes, b), _each(numbers, a.no, b))
    if isinstance(b, Choice):
        return t.choose(b.condition, _each(numbers, a, b.yes), _each(numbers, a, b.no))
    return numbers(a, b)


def _product(a: Lin, b: Lin) -> Lin:
    for factor, other in ((a, b), (b, a)):
        if factor.is_number:
            return other.scaled(operator.index(factor.const))
    raise NotUnderstood


def _rsub(reader: MaskReader, node: Node) -> Term:
    only(node)
    if len(node.args) != 2:
        raise NotUnderstood
    dtype = dtype_of(node)
    if dtype in INTEGERS:
        return reader.number(node.args[1]) - reader.number(node.args[0])
    return _floats(dtype, _each(lambda a, b: b - a, *(reader.constants(arg) for arg in node.args[:2])))


def _neg(reader: MaskReader, node: Node) -> Term:
    term = reader.operand(node.args[0])
    if dtype_of(node) in INTEGERS and isinstance(term, Lin):
        return term.scaled(-1)
    return _floats(dtype_of(node), _each(lambda a, b: a * b, as_constants(term), -1.0))


def _compare(make: Callable[[Lin], Truth], numbers: Callable[[float, float], bool]) -> Rule:
    """A comparison: a truth value of the difference of affine operands, or of each constant that one may be."""

    def rule(reader: MaskReader, node: Node) -> Term:
        if len(node.args) != 2 or node.kwargs:
            raise NotUnderstood
        operands = [arg if isinstance(arg, float) else reader.operand(arg) for arg in node.args]
        if all(isinstance(x, (Lin, Const)) for x in operands):
            return make(reader.number(node.args[0]) - reader.number(node.args[1]))
        a, b = (x if isinstance(x, float) else as_constants(x) for x in operands)
        outcome = _each(lambda x, y: float(numbers(x, y)), a, b)
        return t.leaves(outcome, lambda number: Const(number != 0))

    return rule


def _logic(combine: Callable[..., Truth]) -> Rule:
    def rule(reader: MaskReader, node: Node) -> Term:
        if dtype_of(node) != torch.bool or node.kwargs:
            raise NotUnderstood
        return combine(*(reader.truth(arg) for arg in node.args))

    return rule


def _xor(a: Truth, b: Truth) -> Truth:
    return t.select(a, t.negate(b), b)


def _where(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise NotUnderstood
    return _chosen(reader, node, reader.truth(node.args[0]), node.args[1], node.args[2])


def _masked_fill(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise NotUnderstood
    return _chosen(reader, node, reader.truth(node.args[1]), node.args[2], node.args[0])


def _chosen(reader: MaskReader, node: Node, condition: Truth, yes: Any, no: Any) -> Term:
    dtype = dtype_of(node)
    if dtype == torch.bool:
        return t.select(condition, *(Const(bool(x)) if isinstance(x, float) else reader.truth(x) for x in (yes, no)))
    return _floats(dtype, t.choose(condition, reader.constants(yes), reader.constants(no)))


def _triangular(sign: int) -> Rule:
    """tril keeps column - row <= diagonal, triu keeps column - row >= diagonal; the rest becomes 0."""

    def rule(reader: MaskReader, node: Node) -> Term:
        only(node, "diagonal")
        diagonal = integer(argument(node, 1, "diagonal", 0))
        kept = t.compare_ge(Lin.of(diagonal, {0: -1, 1: 1}).scaled(sign))
        if dtype_of(node) == torch.bool:
            return t.all_of(kept, reader.truth(node.args[0]))
        return _floats(dtype_of(node), t.choose(kept, reader.constants(node.args[0]), 0.0))

    return rule


# Differences and sums along a dimension --------------------------------------------------------------


def _along(node: Node, position: int) -> int:
    """The coordinate that a ``dim`` argument means."""
    dim = argument(node, position, "dim", -1)
    rank = len(shape_of(node))
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise NotUnderstood
    return rank - 1 - (dim % rank)


def _diff(reader: MaskReader, node: Node) -> Term:
    """First difference with one element prepended: constant where the prepended one continues the line."""
    only(node, "dim", "n", "prepend")
    prepend = node.kwargs.get("prepend")
    if node.kwargs.get("n", 1) != 1 or len(node.args) > 1 or not isinstance(prepend, Node):
        raise NotUnderstood
    along = _along(node, 2)
    line, before = reader.number(node.args[0]), reader.number(prepend)
    if shape_of(prepend)[-1 - along] != 1:
        raise NotUnderstood
    step = line.factor(along)
    depends = any(along in t.coordinates(element) for element, _ in line.atoms)
    if depends or t.substitute_lin(line, {along: Lin(0)}) - before != Lin.of(step):
        raise NotUnderstood
    return Lin.of(step)


def _cumsum(reader: MaskReader, node: Node) -> Term:
    only(node, "dim")
    along = _along(node, 1)
    _note_run(reader, node, along)
    constant = reader.number(node.args[0])
    if dtype_of(node) not in INTEGERS or not constant.is_number:
        raise NotUnderstood
    step = operator.index(constant.const)
    return Lin.of(step, {along: step})


def _note_run(reader: MaskReader, node: Node, along: int) -> None:
    """A running count of ``diff(x) != 1`` numbers packed documents: see ``MaskReader.runs``."""
    breaks = node.args[0]
    if along != 0 or not isinstance(breaks, Node) or op_name(breaks) != "ne" or breaks.args[1:] != (1,):
        return
    steps = breaks.args[0]
    if not isinstance(steps, Node) or op_name(steps) != "diff" or _along(steps, 2) != 0 or len(steps.args) > 1:
        return
    before = steps.kwargs.get("prepend")
    if steps.kwargs.get("n", 1) != 1 or not isinstance(before, Node) or shape_of(before)[-1] != 1:
        return
    reader.runs[node] = reader.number(steps.args[0])


# Shapes and indices ----------------------------------------------------------------------------------


def _same_term(reader: MaskReader, node: Node) -> Term:
    """Broadcasting: coordinates count from the right, so the term stays."""
    return reader.operand(node.args[0])


def _cast(reader: MaskReader, node: Node) -> Term:
    source = node.args[0]
    term = reader.operand(source)
    if isinstance(source, Node) and dtype_of(node) == dtype_of(source):
        return term
    return _as(dtype_of(node), term)


def _reshape(reader: MaskReader, node: Node) -> Term:
    """A reshape that adds or removes dimensions of size 1, or changes only leading ones that the term ignores."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise NotUnderstood
    old, new = shape_of(source), shape_of(node)
    old_dims = [len(old) - 1 - d for d, size in enumerate(old) if size != 1]
    new_dims = [len(new) - 1 - d for d, size in enumerate(new) if size != 1]
    pairs = list(zip(reversed(old_dims), reversed(new_dims), strict=False))
    same = next((i for i, (a, b) in enumerate(pairs) if old[-1 - a] != new[-1 - b]), len(pairs))
    moved = {a: Lin.of(0, {b: 1}) for a, b in pairs[:same]}
    term = reader.operand(source)
    if any(c in old_dims and c not in moved for c in t.coordinates(term)):
        raise NotUnderstood
    return t.substitute(term, moved)


def _permute(reader: MaskReader, node: Node) -> Term:
    source = node.args[0]
    rank = len(shape_of(node))
    if op_name(node) == "permute":
        dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        order = [d % rank for d in dims if isinstance(d, int)]
    else:
        order = list(range(rank))
        pair = node.args[1:3]
        if len(pair) != 2 or not all(isinstance(d, int) for d in pair):
            raise NotUnderstood
        a, b = (operator.index(d) % rank for d in pair)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    if sorted(order) != list(range(rank)):
        raise NotUnderstood
    moved = {rank - 1 - old: Lin.of(0, {rank - 1 - new: 1}) for new, old in enumerate(order)}
    return t.substitute(reader.operand(source), moved)


def _getitem(reader: MaskReader, node: Node) -> Term:
    """Indexing by None, slices, integers, an ellipsis, and one run of integer tensors."""
    source, index = node.args
    if not isinstance(source, Node) or tensor_of(source) is None or tensor_of(node) is None:
        raise NotUnderstood
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    rank, out = len(shape_of(source)), len(shape_of(node))
    used = sum(item is not None and item is not Ellipsis for item in items)
    if sum(item is Ellipsis for item in items) > 1:
        raise NotUnderstood
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    missing = [slice(None)] * (rank - used)
    items = items + missing if at is None else items[:at] + missing + items[at + 1 :]
    gathers = [i for i, item in enumerate(items) if isinstance(item, Node) and tensor_of(item) is not None]
    if gathers and (gathers != list(range(gathers[0], gathers[-1] + 1)) or None in items):
        raise NotUnderstood
    gathered_rank = max(
        (len(shape_of(item)) for item in items if isinstance(item, Node) and tensor_of(item) is not None), default=0
    )
    # Walk both shapes from the left: `dim` of the source, `place` of the result.
    dim, place = 0, 0
    new: dict[int, Lin] = {}
    for position, item in enumerate(items):
        old = rank - 1 - dim
        if item is None:
            place += 1
            continue
        if position in gathers:
            shift = out - 1 - place - (gathered_rank - 1)
            new[old] = _index_term(reader, item, shift)
            place += gathered_rank if position == gathers[-1] else 0
        elif isinstance(item, slice):
            if item.step not in (None, 1):
                raise NotUnderstood
            begin = Lin.of(0 if item.start is None else integer(item.start))
            if not reader.is_index(begin):
                raise NotUnderstood
            new[old] = begin + Lin.of(0, {out - 1 - place: 1})
            place += 1
        else:
            begin = Lin.of(integer(item))
            if not reader.is_index(begin):
                raise NotUnderstood
            new[old] = begin
        dim += 1
    return t.substitute(reader.operand(source), new)


def _index_term(reader: MaskReader, item: Any, shift: int) -> Lin:
    if dtype_of(item) not in INTEGERS:
        raise NotUnderstood
    term = reader.operand(item)
    if not isinstance(term, Lin) or not reader.is_index(term):
        raise NotUnderstood
    return t.substitute_lin(term, {c: Lin.of(0, {c + shift: 1}) for c in t.coordinates(term)})


RULES: dict[str, Rule] = {
    "arange": _arange,
    **dict.fromkeys(("tensor", "scalar_tensor"), _scalar),
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0)),
    "add": _arithmetic(operator.add, operator.add),
    "sub": _arithmetic(operator.sub, operator.sub),
    "rsub": _rsub,
    "mul": _arithmetic(_product, operator.mul),
    "neg": _neg,
    "ge": _compare(t.compare_ge, operator.ge),
    "le": _compare(lambda d: t.compare_ge(d.scaled(-1)), operator.le),
    "gt": _compare(lambda d: t.compare_ge(d - Lin(1)), operator.gt),
    "lt": _compare(lambda d: t.compare_ge(d.scaled(-1) - Lin(1)), operator.lt),
    "eq": _compare(t.compare_eq, operator.eq),
    "ne": _compare(lambda d: t.negate(t.compare_eq(d)), operator.ne),
    "and": _logic(t.all_of),
    "or": _logic(t.any_of),
    "xor": _logic(_xor),
    "not": _logic(t.negate),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangular(1),
    "triu": _triangular(-1),
    "diff": _diff,
    "cumsum": _cumsum,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _same_term),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same_term),
    **dict.fromkeys(("to", "type", "bool", "int", "long", "float", "half", "bfloat16", "type_as"), _cast),
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze", "flatten"), _reshape),
    **dict.fromkeys(("permute", "transpose", "swapaxes"), _permute),
    "getitem": _getitem,
}
