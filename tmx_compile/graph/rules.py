"""What each operation does to index terms: the rules of the mask reader, by the operation's name.

A rule gives the term of its node, or raises :class:`~tmx_compile.graph.read.NotUnderstood`, and the node stays opaque.
"""

from __future__ import annotations

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


def _filled(node: Node, value: Any) -> Term:
    dtype = dtype_of(node)
    if isinstance(value, Node):
        raise NotUnderstood
    if dtype == torch.bool:
        return Const(bool(value))
    if dtype in INTEGERS:
        return Lin.of(int(value))
    return Choice(t.TRUE, float(value), 0.0)


def _full(_: MaskReader, node: Node) -> Term:
    only(node, "fill_value")
    return _filled(node, argument(node, 2 if op_name(node) == "new_full" else 1, "fill_value"))


def _constant(value: int) -> Rule:
    def rule(_: MaskReader, node: Node) -> Term:
        only(node, "size", "memory_format")
        return _filled(node, value)

    return rule


# Arithmetic, comparison, logic -----------------------------------------------------------------------


def _linear(combine: Callable[[Lin, Lin], Lin]) -> Rule:
    def rule(reader: MaskReader, node: Node) -> Term:
        only(node)
        if dtype_of(node) not in INTEGERS or len(node.args) != 2:
            raise NotUnderstood
        return combine(reader.number(node.args[0]), reader.number(node.args[1]))

    return rule


def _product(a: Lin, b: Lin) -> Lin:
    for factor, other in ((a, b), (b, a)):
        if not factor.factors and isinstance(factor.const, int):
            return other.scaled(factor.const)
    raise NotUnderstood


def _neg(reader: MaskReader, node: Node) -> Term:
    if dtype_of(node) not in INTEGERS:
        raise NotUnderstood
    return reader.number(node.args[0]).scaled(-1)


def _compare(make: Callable[[Lin], Truth]) -> Rule:
    """A comparison as a truth value of the difference of its operands."""

    def rule(reader: MaskReader, node: Node) -> Term:
        if len(node.args) != 2 or node.kwargs:
            raise NotUnderstood
        return make(reader.number(node.args[0]) - reader.number(node.args[1]))

    return rule


def _logic(combine: Callable[..., Truth]) -> Rule:
    def rule(reader: MaskReader, node: Node) -> Term:
        if dtype_of(node) != torch.bool or node.kwargs:
            raise NotUnderstood
        return combine(*(reader.truth(arg) for arg in node.args))

    return rule


def _where(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise NotUnderstood
    condition = reader.truth(node.args[0])
    if dtype_of(node) == torch.bool:
        yes, no = reader.truth(node.args[1]), reader.truth(node.args[2])
        return t.any_of(t.all_of(condition, yes), t.all_of(t.negate(condition), no))
    return Choice(condition, _constant_number(reader, node.args[1]), _constant_number(reader, node.args[2]))


def _masked_fill(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise NotUnderstood
    source, condition = reader.operand(node.args[0]), reader.truth(node.args[1])
    value = _constant_number(reader, node.args[2])
    if dtype_of(node) == torch.bool:
        kept = t.all_of(t.negate(condition), as_truth(source))
        return t.any_of(condition, kept) if value else kept
    match source:
        case Choice(inner, yes, no) if no == value:
            return Choice(t.all_of(inner, t.negate(condition)), yes, no)
        case Choice(inner, yes, no) if yes == value and inner != t.TRUE:
            return Choice(t.any_of(inner, condition), yes, no)
        case Choice(Const(True), yes, _):
            return Choice(condition, value, yes)
    raise NotUnderstood


def _constant_number(reader: MaskReader, arg: Any) -> float:
    if isinstance(arg, (bool, int, float)):
        return float(arg)
    term = reader.operand(arg)
    match term:
        case Choice(Const(True), yes, _):
            return yes
        case Lin(int(const), ()):
            return float(const)
    raise NotUnderstood


def _triangular(sign: int) -> Rule:
    """tril keeps column - row <= diagonal, triu keeps column - row >= diagonal; the rest becomes 0."""

    def rule(reader: MaskReader, node: Node) -> Term:
        only(node, "diagonal")
        diagonal = integer(argument(node, 1, "diagonal", 0))
        kept = t.compare_ge(Lin.of(diagonal, {0: -1, 1: 1}).scaled(sign))
        source = reader.operand(node.args[0])
        if dtype_of(node) == torch.bool:
            return t.all_of(kept, as_truth(source))
        match source:
            case Choice(Const(True), yes, _):
                return Choice(kept, yes, 0.0)
            case Lin(int(const), ()):
                return Choice(kept, float(const), 0.0)
        raise NotUnderstood

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
    first = t.substitute(line, {along: Lin(0)})
    if not isinstance(first, Lin) or first - before != Lin.of(step):
        raise NotUnderstood
    return Lin.of(step)


def _cumsum(reader: MaskReader, node: Node) -> Term:
    only(node, "dim")
    along = _along(node, 1)
    constant = reader.number(node.args[0])
    if dtype_of(node) not in INTEGERS or constant.factors or not isinstance(constant.const, int):
        raise NotUnderstood
    return Lin.of(constant.const, {along: constant.const})


# Shapes and indices ----------------------------------------------------------------------------------


def _same_term(reader: MaskReader, node: Node) -> Term:
    """Broadcasting: coordinates count from the right, so the term stays."""
    return reader.operand(node.args[0])


def _cast(reader: MaskReader, node: Node) -> Term:
    source = node.args[0]
    term = reader.operand(source)
    dtype, before = dtype_of(node), dtype_of(source) if isinstance(source, Node) else None
    if dtype == before:
        return term
    if dtype == torch.bool:
        return as_truth(term)
    if dtype in INTEGERS and isinstance(term, Lin):
        return term
    if isinstance(term, t.TRUTHS):
        return Choice(term, 1.0, 0.0)
    if isinstance(term, Choice) and dtype.is_floating_point:
        # The cast rounds; what counts as "minus infinity" is judged on the rounded numbers.
        yes, no = (float(torch.tensor(x, dtype=before).to(dtype)) for x in (term.yes, term.no))
        return Choice(term.condition, yes, no)
    raise NotUnderstood


def _reshape(reader: MaskReader, node: Node) -> Term:
    """A reshape that only adds or removes dimensions of size 1."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise NotUnderstood
    old, new = shape_of(source), shape_of(node)
    old_dims = [len(old) - 1 - d for d, size in enumerate(old) if size != 1]
    new_dims = [len(new) - 1 - d for d, size in enumerate(new) if size != 1]
    if [old[-1 - c] for c in old_dims] != [new[-1 - c] for c in new_dims]:
        raise NotUnderstood
    moved = {a: Lin.of(0, {b: 1}) for a, b in zip(old_dims, new_dims, strict=True)}
    return t.substitute(reader.operand(source), moved)


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
    moved = t.substitute(term, {c: Lin.of(0, {c + shift: 1}) for c in t.coordinates(term)})
    assert isinstance(moved, Lin)
    return moved


RULES: dict[str, Rule] = {
    "arange": _arange,
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0)),
    "add": _linear(operator.add),
    "sub": _linear(operator.sub),
    "mul": _linear(_product),
    "neg": _neg,
    "ge": _compare(t.compare_ge),
    "le": _compare(lambda d: t.compare_ge(d.scaled(-1))),
    "gt": _compare(lambda d: t.compare_ge(d - Lin(1))),
    "lt": _compare(lambda d: t.compare_ge(d.scaled(-1) - Lin(1))),
    "eq": _compare(t.compare_eq),
    "ne": _compare(lambda d: t.negate(t.compare_eq(d))),
    "and": _logic(t.all_of),
    "or": _logic(t.any_of),
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
