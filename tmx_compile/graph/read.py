"""An abstract interpreter that reads a mask-building subgraph as index terms.

Each node becomes a :class:`View`: its shape and what one of its elements is, as a term of the element's coordinates.
A node that is not understood is not an error: it becomes an element of its own tensor, so that everything built on it
is still exact, and the proof decides whether that matters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.graph import terms as t
from tmx_compile.graph.nodes import op_name, tensor_of, value_of
from tmx_compile.graph.terms import Choice, Const, Element, Lin, Size, Term, Truth

_INTEGERS = frozenset({torch.int64, torch.int32})


@dataclass(frozen=True)
class View:
    """A tensor as a function: its shape, left to right, and the term of its element."""

    shape: tuple[Size, ...]
    term: Term


class _NotUnderstood(Exception):
    """Raised inside a rule to fall back to an opaque element."""


class MaskReader:
    """Reads nodes of one graph, each once.

    Args:
        known_non_negative: decides ``lin >= 0`` over all coordinates (each at least 0) without adding a guard.
    """

    def __init__(self, known_non_negative: Callable[[Lin], bool]) -> None:
        self._views: dict[Node, View] = {}
        self._known_non_negative = known_non_negative

    def read(self, node: Node) -> View:
        """The view of a tensor node."""
        if node not in self._views:
            rule = _RULES.get(op_name(node)) if node.op in ("call_function", "call_method") else None
            try:
                if rule is None:
                    raise _NotUnderstood
                view = View(_shape(node), self._normal(node, rule(self, node)))
            except _NotUnderstood:
                view = opaque(node)
            self._views[node] = view
        return self._views[node]

    def _normal(self, node: Node, term: Term) -> Term:
        """Drop coordinates of dimensions of size 1: they are always 0."""
        shape = _shape(node)
        units = {c: Lin(0) for c in t.coordinates(term) if c >= len(shape) or shape[-1 - c] == 1}
        return t.substitute(term, units) if units else term

    def operand(self, arg: Any) -> Term:
        """The term of an argument: a tensor node, a symbolic or plain number."""
        if isinstance(arg, Node) and tensor_of(arg) is not None:
            return self.read(arg).term
        if isinstance(arg, bool):
            return Const(arg)
        return Lin.of(_integer(arg))

    def number(self, arg: Any) -> Lin:
        """An operand that must be affine; a known truth value counts as 0 or 1."""
        term = self.operand(arg)
        if isinstance(term, Const):
            return Lin(int(term.value))
        if not isinstance(term, Lin):
            raise _NotUnderstood
        return term

    def truth(self, arg: Any) -> Truth:
        """An operand as a truth value (non-zero means true)."""
        return as_truth(self.operand(arg))

    def is_index(self, lin: Lin) -> bool:
        """Whether a term can never be negative; a negative index would count from the end."""
        return self._known_non_negative(lin)


def as_truth(term: Term) -> Truth:
    """Non-zero means true."""
    match term:
        case Lin():
            return t.negate(t.compare_eq(term))
        case Element():
            return t.Truthy(term)
        case Choice(condition, yes, no):
            if bool(yes) == bool(no):
                return Const(bool(yes))
            return condition if yes else t.negate(condition)
        case _:
            return term


def opaque(node: Node) -> View:
    """The view of a node that is not understood: its own element."""
    shape = _shape(node)
    last = len(shape) - 1
    index = tuple(Lin(0) if size == 1 else Lin.of(0, {last - d: 1}) for d, size in enumerate(shape))
    element = Element(node, index)
    fake = tensor_of(node)
    return View(shape, t.Truthy(element) if fake is not None and fake.dtype == torch.bool else element)


def _shape(node: Node) -> tuple[Size, ...]:
    fake = tensor_of(node)
    assert fake is not None, f"{node} is no tensor"
    return tuple(t.size_of(size) for size in fake.shape)


def _dtype(node: Node) -> torch.dtype:
    fake = tensor_of(node)
    assert fake is not None
    return fake.dtype


def _integer(arg: Any) -> Size:
    value = value_of(arg) if isinstance(arg, Node) else arg
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise _NotUnderstood
    return t.size_of(value)


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _only(node: Node, *keywords: str) -> None:
    """Refuse keyword arguments that change the meaning and are not handled."""
    if set(node.kwargs) - {
        "device",
        "dtype",
        "layout",
        "requires_grad",
        "pin_memory",
        "non_blocking",
        *keywords,
    }:
        raise _NotUnderstood


# Constants and ranges ------------------------------------------------------------------------------------------------


def _arange(_: MaskReader, node: Node) -> Term:
    _only(node)
    if _dtype(node) not in _INTEGERS:
        raise _NotUnderstood
    numbers = [_integer(arg) for arg in node.args]
    if len(numbers) == 1:
        return Lin.of(0, {0: 1})
    step = numbers[2] if len(numbers) == 3 else 1
    if not isinstance(step, int):
        raise _NotUnderstood
    return Lin.of(numbers[0], {0: step})


def _filled(node: Node, value: Any) -> Term:
    dtype = _dtype(node)
    if isinstance(value, Node):
        raise _NotUnderstood
    if dtype == torch.bool:
        return Const(bool(value))
    if dtype in _INTEGERS:
        return Lin.of(int(value))
    return Choice(t.TRUE, float(value), 0.0)


def _full(_: MaskReader, node: Node) -> Term:
    _only(node, "fill_value")
    return _filled(node, _argument(node, 2 if op_name(node) == "new_full" else 1, "fill_value"))


def _constant(value: int) -> Callable[[MaskReader, Node], Term]:
    def rule(_: MaskReader, node: Node) -> Term:
        _only(node, "size", "memory_format")
        return _filled(node, value)

    return rule


# Arithmetic, comparison, logic -----------------------------------------------------------------------------------------


def _linear(combine: Callable[[Lin, Lin], Lin]) -> Callable[[MaskReader, Node], Term]:
    def rule(reader: MaskReader, node: Node) -> Term:
        _only(node)
        if _dtype(node) not in _INTEGERS or len(node.args) != 2:
            raise _NotUnderstood
        return combine(reader.number(node.args[0]), reader.number(node.args[1]))

    return rule


def _product(a: Lin, b: Lin) -> Lin:
    for factor, other in ((a, b), (b, a)):
        if not factor.factors and isinstance(factor.const, int):
            return other.scaled(factor.const)
    raise _NotUnderstood


def _neg(reader: MaskReader, node: Node) -> Term:
    if _dtype(node) not in _INTEGERS:
        raise _NotUnderstood
    return reader.number(node.args[0]).scaled(-1)


def _compare(make: Callable[[Lin], Truth]) -> Callable[[MaskReader, Node], Term]:
    """A comparison as a truth value of the difference of its operands."""

    def rule(reader: MaskReader, node: Node) -> Term:
        if len(node.args) != 2 or node.kwargs:
            raise _NotUnderstood
        return make(reader.number(node.args[0]) - reader.number(node.args[1]))

    return rule


def _logic(combine: Callable[..., Truth]) -> Callable[[MaskReader, Node], Term]:
    def rule(reader: MaskReader, node: Node) -> Term:
        if _dtype(node) != torch.bool or node.kwargs:
            raise _NotUnderstood
        return combine(*(reader.truth(arg) for arg in node.args))

    return rule


def _where(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise _NotUnderstood
    condition = reader.truth(node.args[0])
    if _dtype(node) == torch.bool:
        yes, no = reader.truth(node.args[1]), reader.truth(node.args[2])
        return t.any_of(t.all_of(condition, yes), t.all_of(t.negate(condition), no))
    return Choice(condition, _constant_number(reader, node.args[1]), _constant_number(reader, node.args[2]))


def _masked_fill(reader: MaskReader, node: Node) -> Term:
    if len(node.args) != 3 or node.kwargs:
        raise _NotUnderstood
    source, condition = reader.operand(node.args[0]), reader.truth(node.args[1])
    value = _constant_number(reader, node.args[2])
    if _dtype(node) == torch.bool:
        kept = t.all_of(t.negate(condition), as_truth(source))
        return t.any_of(condition, kept) if value else kept
    match source:
        case Choice(inner, yes, no) if no == value:
            return Choice(t.all_of(inner, t.negate(condition)), yes, no)
        case Choice(Const(True), yes, _):
            return Choice(condition, value, yes)
    raise _NotUnderstood


def _constant_number(reader: MaskReader, arg: Any) -> float:
    if isinstance(arg, (bool, int, float)):
        return float(arg)
    term = reader.operand(arg)
    match term:
        case Choice(Const(True), yes, _):
            return yes
        case Lin(int(const), ()):
            return float(const)
    raise _NotUnderstood


def _triangular(sign: int) -> Callable[[MaskReader, Node], Term]:
    """tril keeps column - row <= diagonal, triu keeps column - row >= diagonal; the rest becomes 0."""

    def rule(reader: MaskReader, node: Node) -> Term:
        _only(node, "diagonal")
        diagonal = _integer(_argument(node, 1, "diagonal", 0))
        kept = t.compare_ge(Lin.of(diagonal, {0: -1, 1: 1}).scaled(sign))
        source = reader.operand(node.args[0])
        if _dtype(node) == torch.bool:
            return t.all_of(kept, as_truth(source))
        match source:
            case Choice(Const(True), yes, _):
                return Choice(kept, yes, 0.0)
            case Lin(int(const), ()):
                return Choice(kept, float(const), 0.0)
        raise _NotUnderstood

    return rule


# Differences and sums along a dimension --------------------------------------------------------------------------------


def _along(node: Node, position: int) -> int:
    """The coordinate that a ``dim`` argument means."""
    dim = _argument(node, position, "dim", -1)
    rank = len(_shape(node))
    if not isinstance(dim, int) or not -rank <= dim < rank:
        raise _NotUnderstood
    return rank - 1 - (dim % rank)


def _diff(reader: MaskReader, node: Node) -> Term:
    """First difference with one element prepended: constant where the prepended one continues the line."""
    _only(node, "dim", "n", "prepend")
    prepend = node.kwargs.get("prepend")
    if node.kwargs.get("n", 1) != 1 or len(node.args) > 1 or not isinstance(prepend, Node):
        raise _NotUnderstood
    along = _along(node, 2)
    line, before = reader.number(node.args[0]), reader.number(prepend)
    if _shape(prepend)[-1 - along] != 1:
        raise _NotUnderstood
    step = line.factor(along)
    first = t.substitute(line, {along: Lin(0)})
    if not isinstance(first, Lin) or first - before != Lin.of(step):
        raise _NotUnderstood
    return Lin.of(step)


def _cumsum(reader: MaskReader, node: Node) -> Term:
    _only(node, "dim")
    along = _along(node, 1)
    constant = reader.number(node.args[0])
    if _dtype(node) not in _INTEGERS or constant.factors or not isinstance(constant.const, int):
        raise _NotUnderstood
    return Lin.of(constant.const, {along: constant.const})


# Shapes and indices ------------------------------------------------------------------------------------------------------


def _same_term(reader: MaskReader, node: Node) -> Term:
    """Broadcasting: coordinates count from the right, so the term stays."""
    return reader.operand(node.args[0])


def _cast(reader: MaskReader, node: Node) -> Term:
    source = node.args[0]
    term = reader.operand(source)
    dtype, before = _dtype(node), _dtype(source) if isinstance(source, Node) else None
    if dtype == before:
        return term
    if dtype == torch.bool:
        return as_truth(term)
    if dtype in _INTEGERS and isinstance(term, Lin):
        return term
    if isinstance(term, t.TRUTHS):
        return Choice(term, 1.0, 0.0)
    if isinstance(term, Choice) and dtype.is_floating_point:
        # The cast rounds; what counts as "minus infinity" is judged on the rounded numbers.
        yes, no = (float(torch.tensor(x, dtype=before).to(dtype)) for x in (term.yes, term.no))
        return Choice(term.condition, yes, no)
    raise _NotUnderstood


def _reshape(reader: MaskReader, node: Node) -> Term:
    """A reshape that only adds or removes dimensions of size 1."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise _NotUnderstood
    old, new = _shape(source), _shape(node)
    old_dims = [len(old) - 1 - d for d, size in enumerate(old) if size != 1]
    new_dims = [len(new) - 1 - d for d, size in enumerate(new) if size != 1]
    if [old[-1 - c] for c in old_dims] != [new[-1 - c] for c in new_dims]:
        raise _NotUnderstood
    moved = {a: Lin.of(0, {b: 1}) for a, b in zip(old_dims, new_dims, strict=True)}
    return t.substitute(reader.operand(source), moved)


def _permute(reader: MaskReader, node: Node) -> Term:
    source = node.args[0]
    rank = len(_shape(node))
    if op_name(node) == "permute":
        dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        order = [d % rank for d in dims if isinstance(d, int)]
    else:
        order = list(range(rank))
        pair = node.args[1:3]
        if len(pair) != 2 or not all(isinstance(d, int) for d in pair):
            raise _NotUnderstood
        a, b = (operator.index(d) % rank for d in pair)  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    if sorted(order) != list(range(rank)):
        raise _NotUnderstood
    moved = {rank - 1 - old: Lin.of(0, {rank - 1 - new: 1}) for new, old in enumerate(order)}
    return t.substitute(reader.operand(source), moved)


def _getitem(reader: MaskReader, node: Node) -> Term:
    """Indexing by None, slices, integers, an ellipsis, and one run of integer tensors."""
    source, index = node.args
    if not isinstance(source, Node) or tensor_of(source) is None or tensor_of(node) is None:
        raise _NotUnderstood
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    rank, out = len(_shape(source)), len(_shape(node))
    used = sum(item is not None and item is not Ellipsis for item in items)
    if sum(item is Ellipsis for item in items) > 1:
        raise _NotUnderstood
    at = next((i for i, item in enumerate(items) if item is Ellipsis), None)
    missing = [slice(None)] * (rank - used)
    items = items + missing if at is None else items[:at] + missing + items[at + 1 :]
    gathers = [i for i, item in enumerate(items) if isinstance(item, Node) and tensor_of(item) is not None]
    if gathers and (gathers != list(range(gathers[0], gathers[-1] + 1)) or None in items):
        raise _NotUnderstood
    gathered_rank = max((len(_shape(items[i])) for i in gathers), default=0)
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
                raise _NotUnderstood
            begin = Lin.of(0 if item.start is None else _integer(item.start))
            if not reader.is_index(begin):
                raise _NotUnderstood
            new[old] = begin + Lin.of(0, {out - 1 - place: 1})
            place += 1
        else:
            begin = Lin.of(_integer(item))
            if not reader.is_index(begin):
                raise _NotUnderstood
            new[old] = begin
        dim += 1
    return t.substitute(reader.operand(source), new)


def _index_term(reader: MaskReader, item: Any, shift: int) -> Lin:
    if _dtype(item) not in _INTEGERS:
        raise _NotUnderstood
    term = reader.operand(item)
    if not isinstance(term, Lin) or not reader.is_index(term):
        raise _NotUnderstood
    moved = t.substitute(term, {c: Lin.of(0, {c + shift: 1}) for c in t.coordinates(term)})
    assert isinstance(moved, Lin)
    return moved


_RULES: dict[str, Callable[[MaskReader, Node], Term]] = {
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
