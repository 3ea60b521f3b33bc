"""Index terms: what one element of a mask tensor is, as a function of its coordinates.

A coordinate is a dimension counted from the right: 0 is the last dimension (the key, in a mask), 1 the one before it
(the row). Counting from the right makes broadcasting free: a tensor keeps its term when leading dimensions are added.

Numbers are :class:`Lin` (affine in the coordinates), :class:`Element` (one element of a tensor that is only known by
its node) or :class:`Choice` (one of two constants). Truth values are :class:`Const`, :class:`NonNegative`,
:class:`Zero`, :class:`Truthy`, :class:`Negation`, :class:`AllOf` and :class:`AnyOf`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.fx import Node

Size: TypeAlias = "int | sympy.Expr"


@dataclass(frozen=True)
class Lin:
    """``const + sum(factor * coordinate)``; ``factors`` is sorted by coordinate and holds no zero factor."""

    const: Size
    factors: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(const: Size, factors: Mapping[int, int] | None = None) -> Lin:
        """Build the canonical form: constants expanded, zero factors dropped."""
        kept = tuple(sorted((c, f) for c, f in (factors or {}).items() if f != 0))
        return Lin(const if isinstance(const, int) else _canonical(const), kept)

    def __add__(self, other: Lin) -> Lin:
        factors = dict(self.factors)
        for coordinate, factor in other.factors:
            factors[coordinate] = factors.get(coordinate, 0) + factor
        return Lin.of(self.const + other.const, factors)

    def scaled(self, by: int) -> Lin:
        """This term times an integer."""
        return Lin.of(self.const * by, {c: f * by for c, f in self.factors})

    def __sub__(self, other: Lin) -> Lin:
        return self + other.scaled(-1)

    def factor(self, coordinate: int) -> int:
        """The factor of one coordinate, 0 where it does not occur."""
        return dict(self.factors).get(coordinate, 0)


def _canonical(expr: sympy.Expr) -> Size:
    expanded = sympy.expand(expr)
    return int(expanded) if expanded.is_Integer else expanded


@dataclass(frozen=True)
class Element:
    """The element of ``node``'s tensor at ``index`` (one affine term per dimension, left to right)."""

    node: Node
    index: tuple[Lin, ...]


@dataclass(frozen=True)
class Choice:
    """``yes`` where the condition holds, else ``no``."""

    condition: Truth
    yes: float
    no: float


@dataclass(frozen=True)
class Const:
    """A known truth value."""

    value: bool


@dataclass(frozen=True)
class NonNegative:
    """``lin >= 0``."""

    lin: Lin


@dataclass(frozen=True)
class Zero:
    """``lin == 0``."""

    lin: Lin


@dataclass(frozen=True)
class Truthy:
    """An element that is not zero."""

    element: Element


@dataclass(frozen=True)
class Negation:
    """Not ``term``."""

    term: Truth


@dataclass(frozen=True)
class AllOf:
    """Every one of ``terms``."""

    terms: frozenset[Truth]


@dataclass(frozen=True)
class AnyOf:
    """At least one of ``terms``."""

    terms: frozenset[Truth]


Truth: TypeAlias = "Const | NonNegative | Zero | Truthy | Negation | AllOf | AnyOf"
Number: TypeAlias = "Lin | Element | Choice"
Term: TypeAlias = "Truth | Number"

TRUE, FALSE = Const(True), Const(False)
TRUTHS = (Const, NonNegative, Zero, Truthy, Negation, AllOf, AnyOf)


def all_of(*terms: Truth) -> Truth:
    """Conjunction, flattened, with the constants folded."""
    flat: set[Truth] = set()
    for term in terms:
        flat |= term.terms if isinstance(term, AllOf) else {term}
    flat.discard(TRUE)
    if FALSE in flat:
        return FALSE
    return next(iter(flat)) if len(flat) == 1 else (AllOf(frozenset(flat)) if flat else TRUE)


def any_of(*terms: Truth) -> Truth:
    """Disjunction, flattened, with the constants folded."""
    flat: set[Truth] = set()
    for term in terms:
        flat |= term.terms if isinstance(term, AnyOf) else {term}
    flat.discard(FALSE)
    if TRUE in flat:
        return TRUE
    return next(iter(flat)) if len(flat) == 1 else (AnyOf(frozenset(flat)) if flat else FALSE)


def negate(term: Truth) -> Truth:
    """Negation, pushed inwards as far as it goes; over integers ``not (x >= 0)`` is ``-x - 1 >= 0``."""
    match term:
        case Const(value):
            return Const(not value)
        case NonNegative(lin):
            return compare_ge(Lin.of(-1) - lin)
        case Negation(inner):
            return inner
        case AllOf(terms):
            return any_of(*map(negate, terms))
        case AnyOf(terms):
            return all_of(*map(negate, terms))
        case _:
            return Negation(term)


def compare_ge(lin: Lin) -> Truth:
    """``lin >= 0``, decided where it is a number."""
    return Const(lin.const >= 0) if not lin.factors and isinstance(lin.const, int) else NonNegative(lin)


def compare_eq(lin: Lin) -> Truth:
    """``lin == 0``, decided where it is a number."""
    return Const(lin.const == 0) if not lin.factors and isinstance(lin.const, int) else Zero(lin)


def substitute(term: Term, new: Mapping[int, Lin]) -> Term:
    """Replace every coordinate by an affine term of other coordinates; all at once."""
    match term:
        case Lin(const, factors):
            total = Lin.of(const)
            for coordinate, factor in factors:
                total = total + new.get(coordinate, Lin.of(0, {coordinate: 1})).scaled(factor)
            return total
        case Element(node, index):
            return Element(node, tuple(_lin(substitute(i, new)) for i in index))
        case Choice(condition, yes, no):
            return Choice(substitute_truth(condition, new), yes, no)
        case _:
            return substitute_truth(term, new)


def substitute_truth(term: Truth, new: Mapping[int, Lin]) -> Truth:
    """:func:`substitute` for truth values."""
    match term:
        case Const():
            return term
        case NonNegative(lin):
            return compare_ge(_lin(substitute(lin, new)))
        case Zero(lin):
            return compare_eq(_lin(substitute(lin, new)))
        case Truthy(element):
            replaced = substitute(element, new)
            assert isinstance(replaced, Element)
            return Truthy(replaced)
        case Negation(inner):
            return negate(substitute_truth(inner, new))
        case AllOf(terms):
            return all_of(*(substitute_truth(t, new) for t in terms))
        case AnyOf(terms):
            return any_of(*(substitute_truth(t, new) for t in terms))


def _lin(term: Term) -> Lin:
    assert isinstance(term, Lin)
    return term


def coordinates(term: Term) -> frozenset[int]:
    """The coordinates that a term depends on."""
    match term:
        case Lin(_, factors):
            return frozenset(c for c, _ in factors)
        case Element(_, index):
            return frozenset().union(*(coordinates(i) for i in index))
        case Choice(condition, _, _):
            return coordinates(condition)
        case NonNegative(lin) | Zero(lin):
            return coordinates(lin)
        case Truthy(element):
            return coordinates(element)
        case Negation(inner):
            return coordinates(inner)
        case AllOf(terms) | AnyOf(terms):
            return frozenset().union(*(coordinates(t) for t in terms))
        case _:
            return frozenset()


def size_of(value: object) -> Size:
    """A length as an int, or as the expression of its symbol; never guards."""
    if isinstance(value, torch.SymInt):
        return _canonical(value.node.expr)
    if isinstance(value, int):
        return value
    raise TypeError(f"not a length: {value!r}")
