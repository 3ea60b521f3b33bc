"""Index terms: what one element of a mask tensor is, as a function of its coordinates.

A coordinate is a dimension counted from the right: 0 is the last dimension (the key, in a mask), 1 the one before it
(the row). Counting from the right makes broadcasting free: a tensor keeps its term when leading dimensions are added.

Numbers are :class:`Lin` (affine in the coordinates and in elements of integer tensors), :class:`Element` (one element
of a tensor that is only known by its node) or :class:`Choice` (one of a few constants). Truth values are
:class:`Const`, :class:`NonNegative`, :class:`Zero`, :class:`Truthy`, :class:`Negation`, :class:`AllOf`, :class:`AnyOf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from torch.fx import Node

from tmx_compile.graph.sizes import Size, canonical


@dataclass(frozen=True)
class Lin:
    """``const + sum(factor * coordinate) + sum(factor * element)``.

    Canonical: ``factors`` is sorted by coordinate, no factor is zero. ``atoms`` are elements of integer tensors whose
    values are not known.
    """

    const: Size
    factors: tuple[tuple[int, int], ...] = ()
    atoms: frozenset[tuple[Element, int]] = frozenset()

    @staticmethod
    def of(const: Size, factors: Mapping[int, int] | None = None, atoms: Mapping[Element, int] | None = None) -> Lin:
        """Build the canonical form: constants expanded, zero factors dropped."""
        kept = tuple(sorted((c, f) for c, f in (factors or {}).items() if f != 0))
        elements = frozenset((e, f) for e, f in (atoms or {}).items() if f != 0)
        return Lin(const if isinstance(const, int) else canonical(const), kept, elements)

    def __add__(self, other: Lin) -> Lin:
        factors, atoms = dict(self.factors), dict(self.atoms)
        for coordinate, factor in other.factors:
            factors[coordinate] = factors.get(coordinate, 0) + factor
        for element, factor in other.atoms:
            atoms[element] = atoms.get(element, 0) + factor
        return Lin.of(self.const + other.const, factors, atoms)

    def scaled(self, by: int) -> Lin:
        """This term times an integer."""
        factors = {coordinate: factor * by for coordinate, factor in self.factors}
        return Lin.of(self.const * by, factors, {element: factor * by for element, factor in self.atoms})

    def __sub__(self, other: Lin) -> Lin:
        return self + other.scaled(-1)

    def factor(self, coordinate: int) -> int:
        """The factor of one coordinate, 0 where it does not occur."""
        return dict(self.factors).get(coordinate, 0)

    @property
    def is_number(self) -> bool:
        """Whether it is one plain integer."""
        return isinstance(self.const, int) and not self.factors and not self.atoms


@dataclass(frozen=True)
class Element:
    """The element of ``node``'s tensor at ``index`` (one affine term per dimension, left to right).

    ``version`` is how often the tensor's storage had been written when it was read.
    """

    node: Node
    index: tuple[Lin, ...]
    version: int = 0


@dataclass(frozen=True)
class Choice:
    """``yes`` where the condition holds, else ``no``; either may be another choice."""

    condition: Truth
    yes: float | Choice
    no: float | Choice


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


def select(condition: Truth, yes: Truth, no: Truth) -> Truth:
    """``yes`` where the condition holds, else ``no``."""
    if yes == no:
        return yes
    if yes == TRUE:
        return any_of(condition, no)
    if no == FALSE:
        return all_of(condition, yes)
    if yes == FALSE:
        return all_of(negate(condition), no)
    return any_of(all_of(condition, yes), all_of(negate(condition), no))


def choose(condition: Truth, yes: float | Choice, no: float | Choice) -> float | Choice:
    """A choice, or the number where there is nothing to choose."""
    if isinstance(condition, Const) or yes == no:
        return yes if not isinstance(condition, Const) or condition.value else no
    return Choice(condition, yes, no)


def leaves(value: float | Choice, judge: Callable[[float], Truth]) -> Truth:
    """The truth of a judgement on whichever constant is chosen."""
    if isinstance(value, Choice):
        return select(value.condition, leaves(value.yes, judge), leaves(value.no, judge))
    return judge(value)


def compare_ge(lin: Lin) -> Truth:
    """``lin >= 0``, decided where it is a number; without a common factor: over integers, 2x - 3 >= 0 is x - 2 >= 0."""
    if lin.is_number:
        return Const(lin.const >= 0)
    divisor = _common_factor(lin)
    return NonNegative(lin if divisor == 1 else _divided(lin, divisor))


def compare_eq(lin: Lin) -> Truth:
    """``lin == 0``, decided where it is a number; with the first sign fixed, so that ``a == b`` is ``b == a``."""
    if lin.is_number:
        return Const(lin.const == 0)
    divisor = _common_factor(lin)
    if divisor != 1:
        if isinstance(lin.const, int) and lin.const % divisor:
            return FALSE
        lin = _divided(lin, divisor)
    if lin.const == 0 and not lin.factors and len(lin.atoms) == 1:
        ((element, _),) = lin.atoms
        return Negation(Truthy(element))
    opposite = lin.scaled(-1)
    return Zero(min(lin, opposite, key=_sign_order))


def _common_factor(lin: Lin) -> int:
    """What divides every factor of coordinates and elements, and a symbolic constant; at least 1."""
    factors = [factor for _, factor in (*lin.factors, *lin.atoms)]
    if not isinstance(lin.const, int):
        coefficients = sympy.expand(lin.const).as_coefficients_dict().values()
        if not all(c.is_Integer for c in coefficients):
            return 1
        factors += map(int, coefficients)
    return math.gcd(*factors)


def _divided(lin: Lin, by: int) -> Lin:
    """Divided by a common factor; a plain constant is rounded down."""
    const = lin.const // by if isinstance(lin.const, int) else lin.const / by
    return Lin.of(const, {c: f // by for c, f in lin.factors}, {e: f // by for e, f in lin.atoms})


def _sign_order(lin: Lin) -> tuple[str, ...]:
    return str(lin.factors), str(lin.const), *sorted(map(str, lin.atoms))


def substitute(term: Term, new: Mapping[int, Lin]) -> Term:
    """Replace every coordinate by an affine term of other coordinates; all at once."""
    match term:
        case Lin():
            return substitute_lin(term, new)
        case Element(node, index, version):
            return Element(node, tuple(substitute_lin(i, new) for i in index), version)
        case Choice(condition, yes, no):
            yes, no = (_substitute_choice(x, new) for x in (yes, no))
            return Choice(substitute_truth(condition, new), yes, no)
        case _:
            return substitute_truth(term, new)


def _substitute_choice(value: float | Choice, new: Mapping[int, Lin]) -> float | Choice:
    replaced = substitute(value, new) if isinstance(value, Choice) else value
    assert isinstance(replaced, (float, Choice))
    return replaced


def substitute_lin(term: Lin, new: Mapping[int, Lin]) -> Lin:
    """:func:`substitute` for affine terms."""
    total = Lin.of(term.const)
    for coordinate, factor in term.factors:
        total = total + new.get(coordinate, Lin.of(0, {coordinate: 1})).scaled(factor)
    for element, factor in term.atoms:
        replaced = substitute(element, new)
        assert isinstance(replaced, Element)
        total = total + Lin.of(0, None, {replaced: factor})
    return total


def substitute_truth(term: Truth, new: Mapping[int, Lin]) -> Truth:
    """:func:`substitute` for truth values."""
    match term:
        case Const():
            return term
        case NonNegative(lin):
            return compare_ge(substitute_lin(lin, new))
        case Zero(lin):
            return compare_eq(substitute_lin(lin, new))
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


def coordinates(term: Term | float) -> frozenset[int]:
    """The coordinates that a term depends on."""
    match term:
        case Lin(_, factors, atoms):
            return frozenset(c for c, _ in factors).union(*(coordinates(e) for e, _ in atoms))
        case Element(_, index, _):
            return frozenset().union(*(coordinates(i) for i in index))
        case Choice(condition, yes, no):
            return coordinates(condition) | coordinates(yes) | coordinates(no)
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
