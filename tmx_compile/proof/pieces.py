"""Masks of a piece of a prompt: what a piece shows of a mask, and what only the whole prompt would."""

from __future__ import annotations

from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import KEY
from tmx_compile.proof.terms import AllOf, AnyOf, Element, Lin, Negation, NonNegative, Truth, Truthy, Zero

_OWN = Lin.of(0, {KEY: 1})


def by_place(truth: Truth) -> bool:
    """Whether a truth of a key rests on its number, rather than on what a tensor holds of it.

    In a piece, and in a cache that holds one, numbers begin anew: such a truth is another one there.
    """
    match truth:
        case NonNegative(lin) | Zero(lin):
            return bool(lin.factor(KEY)) or any(_elsewhere(element) for element, _ in lin.atoms)
        case Truthy(element):
            return _elsewhere(element)
        case Negation(inner):
            return by_place(inner)
        case AllOf(terms) | AnyOf(terms):
            return any(map(by_place, terms))
        case _:
            return False


def _elsewhere(element: Element) -> bool:
    """Whether a tensor is read at another place than the key's own."""
    return any(KEY in t.coordinates(index) and index != _OWN for index in element.index)
