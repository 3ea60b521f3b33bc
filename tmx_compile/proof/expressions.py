"""Expressions of symbolic lengths as graph nodes: ``max(0, n - w)``, ``n // k``, ``n % k`` as a mask writes them.

The graph has most of them already, since the mask was computed from them; what it lacks is put together from the sizes
of its inputs. What cannot be written is told before anything is replaced (:func:`unwritable`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy import functions as f

from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.sizes import Size, size_inputs
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.terms import AllOf, AnyOf, Element, Lin, Negation, NonNegative, Term, Truthy, Zero
from tmx_compile.report import Reason, Rejected

Call: TypeAlias = "Callable[..., Any]"

# Functions of any number of arguments, folded from the left.
_FOLDED: dict[Any, Call] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    f.Max: torch.sym_max,
    f.Min: torch.sym_min,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
}
_CALLS: dict[Any, Call] = {
    f.FloorDiv: operator.floordiv,
    f.CleanDiv: operator.floordiv,
    f.Mod: operator.mod,
    f.PythonMod: operator.mod,
    sympy.Mod: operator.mod,
    sympy.Pow: operator.pow,
    f.PowByNatural: operator.pow,
    f.IntTrueDiv: operator.truediv,
    f.FloatTrueDiv: operator.truediv,
    f.ToFloat: torch.sym_float,
    f.TruncToInt: math.trunc,
    f.FloorToInt: math.floor,
    f.CeilToInt: math.ceil,
}


class Unwritable(Exception):
    """An expression that the graph's lengths do not give."""


class Lengths:
    """Where a graph has symbolic lengths: its inputs, their sizes, and what it computes from them."""

    def __init__(self, graph: Graph) -> None:
        self._inputs = size_inputs(graph)
        self._nodes: dict[Any, Node] = {}
        for node in graph.nodes:
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self._nodes.setdefault(value.node.expr, node)

    def write(self, expr: Size, before: Node, call: Call) -> Any:
        """The value of ``expr`` before a node: a number, or what ``call(function, *arguments)`` gives.

        Raises:
            Unwritable: the graph does not tell it; the message says which length is missing.
        """
        if isinstance(expr, int) or expr.is_Integer:
            return int(expr)
        if isinstance(expr, sympy.Float):
            return float(expr)
        found = self._nodes.get(expr)
        if found is not None and found < before:
            return found
        if expr in self._inputs:
            where = self._inputs[expr]
            return where.node if where.dim is None else call(torch.Tensor.size, where.node, where.dim)
        if isinstance(expr, sympy.Symbol):
            return self._solved(expr, before, call)
        if expr.func in (sympy.Pow, f.PowByNatural) and not (expr.args[1].is_Integer and expr.args[1] > 0):
            raise Unwritable(str(expr))
        if expr.func not in _FOLDED and expr.func not in _CALLS:
            raise Unwritable(str(expr))
        arguments = [self.write(argument, before, call) for argument in expr.args]
        if expr.func in _FOLDED:
            return reduce(lambda a, b: call(_FOLDED[expr.func], a, b), arguments)
        return call(_CALLS[expr.func], *arguments)

    def _solved(self, symbol: Any, before: Node, call: Call) -> Any:
        """A symbol that no input has as it is, from a length in which it occurs once: ``a * symbol + b``, whole a."""
        known = [(expr, where.node, where.dim) for expr, where in self._inputs.items()]
        known += [(expr, node, None) for expr, node in self._nodes.items() if node < before]
        for expr, node, dim in known:
            rest = expr.xreplace({symbol: sympy.Integer(0)})
            factor = sympy.expand(expr - rest).coeff(symbol)
            if not factor.is_Integer or factor == 0 or sympy.expand(expr - rest - factor * symbol) != 0:
                continue
            if not all(s in self._inputs or s in self._nodes for s in rest.free_symbols):
                continue
            total = node if dim is None else call(torch.Tensor.size, node, dim)
            if rest != 0:
                total = call(operator.sub, total, self.write(rest, before, call))
            return total if factor == 1 else call(operator.floordiv, total, int(factor))
        raise Unwritable(f"no input of the graph tells the length {symbol}")


def unwritable(proof: Proof, site: Node) -> Rejected | None:
    """A refusal where a proof rests on a length that nodes before the site cannot give."""
    sizes = {size for term in _terms(proof) for size in _sizes(term) if not isinstance(size, int)}
    lengths = Lengths(site.graph) if sizes else None
    for size in sorted(sizes, key=str):
        assert lengths is not None
        try:
            got = lengths.write(size, site, _on_values)
        except Unwritable as missing:
            return Rejected(Reason.MASK_UNKNOWN, str(missing), site)
        got = value_of(got) if isinstance(got, Node) else got
        # What rounds or wraps differently than the symbol says is no way to write it.
        if not isinstance(got, torch.SymInt) or sympy.expand(got.node.expr - size) != 0:
            return Rejected(Reason.MASK_UNKNOWN, f"the length {size} cannot be written", site)
    return None


def _on_values(function: Call, *arguments: Any) -> Any:
    """Writes nothing: the symbolic value."""
    return function(*(value_of(x) if isinstance(x, Node) else x for x in arguments))


def _terms(proof: Proof) -> Iterator[Term]:
    yield from proof.valid
    yield from (x for x in (proof.offset, proof.documents, proof.positions, proof.promised) if x is not None)


def _sizes(term: Term) -> Iterator[Size]:
    """The constants of a term."""
    match term:
        case Lin(const, _, atoms):
            yield const
            for element, _ in atoms:
                yield from _sizes(element)
        case Element(_, index):
            for part in index:
                yield from _sizes(part)
        case NonNegative(lin) | Zero(lin):
            yield from _sizes(lin)
        case Truthy(element):
            yield from _sizes(element)
        case Negation(inner):
            yield from _sizes(inner)
        case AllOf(terms) | AnyOf(terms):
            for inner in terms:
                yield from _sizes(inner)
