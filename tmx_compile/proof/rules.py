"""What each operation does to index terms: the rules of the mask reader, by the operator's name.

A rule gives the term of its call, or raises :class:`~tmx_compile.proof.read.NotUnderstood`, and the node stays opaque.
What is here makes numbers and truths; :mod:`~tmx_compile.proof.shape_rules` moves them about.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.graph.calls import Call
from tmx_compile.graph.nodes import tensor_of, value_of
from tmx_compile.graph.sizes import Size
from tmx_compile.proof import terms as t
from tmx_compile.proof.exact import holds
from tmx_compile.proof.read import (
    INTEGERS,
    MaskReader,
    NotUnderstood,
    Rule,
    as_constants,
    as_truth,
    dtype_of,
    integer,
    shape_of,
)
from tmx_compile.proof.shape_rules import SHAPE_RULES, coordinate
from tmx_compile.proof.terms import Choice, Const, Lin, Term, Truth

# Constants and ranges --------------------------------------------------------------------------------


def _arange(reader: MaskReader, call: Call) -> Term:
    step = _whole(call["step"])
    if not isinstance(step, int):
        raise NotUnderstood
    return reader.exact(Lin.of(_whole(call["start"]), {0: step}), call.node)


def _whole(arg: Any) -> Size:
    """An integer argument, which may be written as a float."""
    return int(arg) if isinstance(arg, float) and arg.is_integer() else integer(arg)


def _filled(reader: MaskReader, node: Node, value: Any) -> Term:
    if isinstance(value, Node):
        return _as(reader, node, reader.operand(value))
    if not isinstance(value, (bool, int, float)):
        raise NotUnderstood
    if dtype_of(node) == torch.bool:
        return Const(bool(value))
    if dtype_of(node) in INTEGERS and isinstance(value, int):
        return reader.exact(Lin.of(int(value)), node)
    return _as(reader, node, Choice(t.TRUE, float(value), 0.0))


def _floats(dtype: torch.dtype, value: float | Choice) -> Term:
    """Constants as a term, rounded to the dtype: what counts as "minus infinity" is judged on rounded numbers."""
    if isinstance(value, Choice):
        yes, no = (_floats(dtype, x) for x in (value.yes, value.no))
        return Choice(value.condition, _leaf(yes), _leaf(no))
    return Choice(t.TRUE, _rounded(dtype, value), 0.0)


def _leaf(term: Term) -> float | Choice:
    assert isinstance(term, Choice)
    return term.yes if term.condition == t.TRUE else term


# Up to here every integer is a float too.
_WHOLE_FLOATS = 1 << 53


@functools.lru_cache(maxsize=256)
def _rounded(dtype: torch.dtype, value: float) -> float:
    if not dtype.is_floating_point:
        # An integer that does not fit wraps around.
        low, high = holds(dtype)
        if not value.is_integer() or abs(value) > _WHOLE_FLOATS or not low <= value <= high:
            raise NotUnderstood
        return value
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        return float(torch.tensor(value, dtype=torch.float64).to(dtype))


def _as(reader: MaskReader, node: Node, term: Term) -> Term:
    """A term converted to the dtype of a node, whose elements it gives."""
    dtype = dtype_of(node)
    if dtype == torch.bool:
        return as_truth(term)
    if isinstance(term, Lin) and not term.is_number:
        return reader.exact(term, node)
    if isinstance(term, Lin) and dtype in INTEGERS:
        return reader.exact(term, node)
    constants = as_constants(term)
    if dtype in INTEGERS and not isinstance(constants, Choice):
        if not math.isfinite(constants):
            raise NotUnderstood
        return reader.exact(Lin.of(math.trunc(constants)), node)
    return _floats(dtype, constants)


def _full(reader: MaskReader, call: Call) -> Term:
    return _filled(reader, call.node, call["fill_value"])


def _constant(value: int) -> Rule:
    def rule(reader: MaskReader, call: Call) -> Term:
        return _filled(reader, call.node, value)

    return rule


def _scalar(reader: MaskReader, call: Call) -> Term:
    value = call["data" if call.name == "tensor" else "s"]
    if not isinstance(value, (bool, int, float)):
        raise NotUnderstood
    return _filled(reader, call.node, value)


# Arithmetic, comparison, logic -----------------------------------------------------------------------


def _pair(reader: MaskReader, call: Call, dtype: torch.dtype) -> tuple[Lin, Lin] | None:
    """Both operands as affine terms that are exact in a dtype; None where they are constants of another kind."""
    terms: list[Term] = []
    for name in ("input", "other"):
        arg = call[name]
        term: Term = Choice(t.TRUE, arg, 0.0) if isinstance(arg, float) else reader.operand(arg)
        match term:
            case Const(value):
                term = Lin(int(value))
            case Choice(t.TRUE, float(value)) if value.is_integer() and not dtype.is_complex:
                term = Lin(int(value))
        terms.append(term)
    a, b = terms
    depends = any(isinstance(term, Lin) and not term.is_number for term in terms)
    if not isinstance(a, Lin) or not isinstance(b, Lin):
        if depends:
            raise NotUnderstood
        return None
    if not depends and dtype not in INTEGERS:
        return None
    return reader.exact(a, call.node, dtype), reader.exact(b, call.node, dtype)


def _arithmetic(combine: Callable[[Lin, Lin], Lin], numbers: Callable[[float, float], float]) -> Rule:
    """Affine where an operand is; over anything else, the same for each of the constants that an operand may be."""

    def rule(reader: MaskReader, call: Call) -> Term:
        dtype = dtype_of(call.node)
        if call.arguments.get("alpha", 1) != 1 or dtype == torch.bool:
            raise NotUnderstood
        pair = _pair(reader, call, dtype)
        if pair is not None:
            return reader.exact(combine(*pair), call.node)
        a, b = (reader.constants(call[name]) for name in ("input", "other"))
        return _floats(dtype, _each(numbers, a, b))

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


def _neg(reader: MaskReader, call: Call) -> Term:
    term = reader.operand(call["input"])
    if isinstance(term, Lin):
        return reader.exact(term.scaled(-1), call.node)
    return _floats(dtype_of(call.node), _each(lambda a, b: a * b, as_constants(term), -1.0))


def _compare(make: Callable[[Lin], Truth], numbers: Callable[[float, float], bool]) -> Rule:
    """A comparison: a truth value of the difference of affine operands, or of each constant that one may be."""

    def rule(reader: MaskReader, call: Call) -> Term:
        pair = _pair(reader, call, _common(call["input"], call["other"]))
        if pair is not None:
            return make(pair[0] - pair[1])
        a, b = (reader.constants(call[name]) for name in ("input", "other"))
        outcome = _each(lambda x, y: float(numbers(x, y)), a, b)
        return t.leaves(outcome, lambda number: Const(number != 0))

    return rule


def _common(*args: Any) -> torch.dtype:
    """The dtype that operands are compared in: one that does not hold them would change them first."""
    values = [value_of(arg) if isinstance(arg, Node) else arg for arg in args]
    plain = [1 if isinstance(x, torch.SymInt) else 1.0 if isinstance(x, torch.SymFloat) else x for x in values]
    if not all(isinstance(x, (torch.Tensor, bool, int, float)) for x in plain):
        raise NotUnderstood
    return torch.result_type(*plain)


def _logic(combine: Callable[..., Truth], *names: str) -> Rule:
    def rule(reader: MaskReader, call: Call) -> Term:
        if dtype_of(call.node) != torch.bool:
            raise NotUnderstood
        return combine(*(reader.truth(call[name]) for name in names))

    return rule


def _xor(a: Truth, b: Truth) -> Truth:
    return t.select(a, t.negate(b), b)


def _where(reader: MaskReader, call: Call) -> Term:
    return _chosen(reader, call.node, reader.truth(call["condition"]), call["input"], call["other"])


def _masked_fill(reader: MaskReader, call: Call) -> Term:
    return _chosen(reader, call.node, reader.truth(call["mask"]), call["value"], call["input"])


def _chosen(reader: MaskReader, node: Node, condition: Truth, yes: Any, no: Any) -> Term:
    dtype = dtype_of(node)
    if dtype == torch.bool:
        return t.select(condition, *(Const(bool(x)) if isinstance(x, float) else reader.truth(x) for x in (yes, no)))
    return _floats(dtype, t.choose(condition, reader.constants(yes), reader.constants(no)))


def _triangular(sign: int) -> Rule:
    """tril keeps column - row <= diagonal, triu keeps column - row >= diagonal; the rest becomes 0."""

    def rule(reader: MaskReader, call: Call) -> Term:
        kept = t.compare_ge(Lin.of(integer(call["diagonal"]), {0: -1, 1: 1}).scaled(sign))
        if dtype_of(call.node) == torch.bool:
            return t.all_of(kept, reader.truth(call["input"]))
        return _floats(dtype_of(call.node), t.choose(kept, reader.constants(call["input"]), 0.0))

    return rule


def _cast(reader: MaskReader, call: Call) -> Term:
    source = call["input"]
    term = reader.operand(source)
    if isinstance(source, Node) and dtype_of(call.node) == dtype_of(source):
        return term
    return _as(reader, call.node, term)


# Differences and sums along a dimension --------------------------------------------------------------


def _diff(reader: MaskReader, call: Call) -> Term:
    """First difference with one element before it, which continues the line: the constant step."""
    source, before = call["input"], call["prepend"]
    if call["n"] != 1 or call["append"] is not None:
        raise NotUnderstood
    along = coordinate(len(shape_of(call.node)), call["dim"])
    return reader.exact(Lin.of(_continued(reader, before, source, along).factor(along)), call.node)


def _cat(reader: MaskReader, call: Call) -> Term:
    """One element and the affine line that continues it: the line from one step earlier on."""
    parts = call["tensors"]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        raise NotUnderstood
    along = coordinate(len(shape_of(call.node)), call["dim"])
    before, source = parts
    line = _continued(reader, before, source, along)
    return t.substitute(line, {along: Lin.of(-1, {along: 1})})


def _continued(reader: MaskReader, before: Any, source: Any, along: int) -> Lin:
    """The line of ``source``, of which ``before`` is the element at -1."""
    if not isinstance(before, Node) or not isinstance(source, Node):
        raise NotUnderstood
    if dtype_of(before) not in INTEGERS or dtype_of(source) not in INTEGERS or shape_of(before)[-1 - along] != 1:
        raise NotUnderstood
    line = reader.number(source)
    if any(along in t.coordinates(element) for element, _ in line.atoms):
        raise NotUnderstood
    if t.substitute_lin(line, {along: Lin(-1)}) != reader.number(before):
        raise NotUnderstood
    return line


def _cumsum(reader: MaskReader, call: Call) -> Term:
    along = coordinate(len(shape_of(call.node)), call["dim"])
    if dtype_of(call.node) not in INTEGERS:
        raise NotUnderstood
    _note_run(reader, call, along)
    constant = reader.number(call["input"])
    if not constant.is_number:
        raise NotUnderstood
    step = operator.index(constant.const)
    return reader.exact(Lin.of(step, {along: step}), call.node)


def _note_run(reader: MaskReader, call: Call, along: int) -> None:
    """A running count of ``diff(x) != 1`` numbers packed documents: see ``MaskReader.runs``."""
    breaks = reader.call(call["input"])
    if breaks is None or breaks.name != "ne" or breaks["other"] != 1:
        return
    steps = reader.call(breaks["input"])
    if along != 0 or steps is None or steps.name != "diff" or steps["n"] != 1 or steps["append"] is not None:
        return
    before, numbers = steps["prepend"], steps["input"]
    if tensor_of(before) is None or shape_of(before)[-1] != 1 or dtype_of(numbers) != torch.int64:
        return
    if coordinate(len(shape_of(steps.node)), steps["dim"]) == 0:
        reader.runs[call.node] = reader.number(numbers)


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **dict.fromkeys(("arange", "iota"), _arange),
    **dict.fromkeys(("tensor", "scalar_tensor"), _scalar),
    **dict.fromkeys(("full", "new_full", "full_like"), _full),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _constant(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _constant(0)),
    "add": _arithmetic(operator.add, operator.add),
    "sub": _arithmetic(operator.sub, operator.sub),
    "rsub": _arithmetic(lambda a, b: b - a, lambda a, b: b - a),
    "mul": _arithmetic(_product, operator.mul),
    "neg": _neg,
    "ge": _compare(t.compare_ge, operator.ge),
    "le": _compare(lambda d: t.compare_ge(d.scaled(-1)), operator.le),
    "gt": _compare(lambda d: t.compare_ge(d - Lin(1)), operator.gt),
    "lt": _compare(lambda d: t.compare_ge(d.scaled(-1) - Lin(1)), operator.lt),
    "eq": _compare(t.compare_eq, operator.eq),
    "ne": _compare(lambda d: t.negate(t.compare_eq(d)), operator.ne),
    "and": _logic(t.all_of, "input", "other"),
    "or": _logic(t.any_of, "input", "other"),
    "xor": _logic(_xor, "input", "other"),
    "not": _logic(t.negate, "input"),
    "where": _where,
    "masked_fill": _masked_fill,
    "tril": _triangular(1),
    "triu": _triangular(-1),
    "diff": _diff,
    "cat": _cat,
    "cumsum": _cumsum,
    **dict.fromkeys(("to", "_to_copy", "convert_element_type", "type", "type_as"), _cast),
    **dict.fromkeys(("bool", "int", "long", "float", "double", "half", "bfloat16"), _cast),
}
