"""Guards that hold for every length: what tracing asks, shown from the ranges of the lengths alone.

Code for all lengths makes the tracer ask questions whose answer never changes, ``32 * (n // 32 + 1) != n`` say. Where a
graph has no guards (an exported program), each such question has to be shown to have one answer, or the graph would be
right for the traced length only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import TensorReferenceAnalysis

_MOST_LENGTHS = 1 << 22


@dataclass
class Unshown:
    """The first guard that was added and is not shown to hold for every length; "" if there is none."""

    guard: str = ""


@contextmanager
def no_guard_added(fake_mode: Any) -> Iterator[Unshown]:
    """Run code that traces; afterwards the environment is what it was, and the result tells what could not be shown.

    Only what is asked is judged, so nothing may answer from memory: the caches of answers are emptied, that of the
    fake mode is set aside, and the example values that the code starts from have to be fresh. An exported program's
    environment is frozen: it would answer without keeping the guard, so it is thawed for the time being.
    """
    result = Unshown()
    env = getattr(fake_mode, "shape_env", None)
    if env is None:
        yield result
        return
    frozen, count, caching = env.frozen, len(env.guards), fake_mode.cache_enabled
    state = _facts(env)
    env.frozen, fake_mode.cache_enabled = False, False
    _forget_answers(env)
    try:
        yield result
    finally:
        env.frozen, fake_mode.cache_enabled = frozen, caching
        added = [guard.expr for guard in env.guards[count:]]
        changed = [name for name in _LENGTHS if getattr(env, name) != state[name]]
        del env.guards[count:]
        _go_back(env, state)
        ranges = bounds_of(state["var_to_range"])
        failed = [str(expr) for expr in added if not holds_always(expr, ranges)]
        result.guard = next(iter(failed or (f"a change of the lengths' {name}" for name in changed)), "")


# What a guard changes: facts about the lengths, and what follows from the guards.
_LENGTHS = ("replacements", "var_to_range")
_STATE = (*_LENGTHS, "axioms", "divisible")


def _facts(env: Any) -> dict[str, Any]:
    return {name: copy.copy(getattr(env, name)) for name in _STATE}


def _go_back(env: Any, facts: Mapping[str, Any]) -> None:
    """Let an environment know no more than then."""
    for name, before in facts.items():
        setattr(env, name, before)
    env._update_version_counter()
    _forget_answers(env)


def _forget_answers(env: Any) -> None:
    for name in ("evaluate_expr", "_inner_evaluate_expr"):
        clear = getattr(getattr(type(env), name, None), "cache_clear", None)
        if clear is not None:
            clear()


@dataclass(frozen=True)
class Bounds:
    """Inclusive bounds of an integer symbol; ``high`` is None where there is none."""

    low: int
    high: int | None


def bounds_of(ranges: Mapping[Any, Any]) -> dict[Any, Bounds]:
    """The bounds of the symbols that have a least value, from a shape environment's ranges."""
    return {
        symbol: Bounds(int(found.lower), None if found.upper in (int_oo, sympy.oo) else int(found.upper))
        for symbol, found in ranges.items()
        if found.lower not in (-int_oo, -sympy.oo)
    }


def holds_always(expr: Any, bounds: Mapping[Any, Bounds]) -> bool:
    """Whether a relation of integer lengths is true at every point of their ranges; False where that is not shown.

    It is shown by algebra, or for one length of a moderate range by trying all.

    Args:
        expr: the relation; floor divisions of a length by a number, products and remainders may occur.
        bounds: of every length.
    """
    if any(symbol not in bounds for symbol in expr.free_symbols):
        return False
    own = dict(bounds)
    try:
        shown = _holds(_without_extremes(_without_floors(expr, own), own), own)
    except (AssertionError, ZeroDivisionError):
        # Torch's Mod asserts that its operands are not negative as soon as replacing makes them numbers.
        shown = False
    return shown or _holds_at_each(expr, bounds)


class _AtLengths(TensorReferenceAnalysis):
    """Integer expressions over a tensor of lengths."""

    @staticmethod
    def mod(a: Any, b: Any) -> Any:
        if bool((torch.as_tensor(a) < 0).any()):
            raise NotImplementedError("the remainder of a negative number, which symbolic shapes leave undefined")
        return torch.remainder(a, b)

    @staticmethod
    def python_mod(a: Any, b: Any) -> Any:
        return torch.remainder(a, b)


def _holds_at_each(expr: Any, bounds: Mapping[Any, Bounds]) -> bool:
    """Whether a relation of one length is true at each of its values; False where it cannot be evaluated."""
    if len(expr.free_symbols) != 1:
        return False
    (symbol,) = expr.free_symbols
    low, high = bounds[symbol].low, bounds[symbol].high
    if high is None or not 0 <= high - low < _MOST_LENGTHS or low < 0:
        return False
    try:
        # Plain tensors: the compiler's fake mode may be active around us.
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            value = sympy_interp(_AtLengths, {symbol: torch.arange(low, high + 1)}, expr)
            return bool(torch.as_tensor(value).all())
    except (NotImplementedError, AttributeError, TypeError):
        return False


def _without_floors(expr: Any, bounds: dict[Any, Bounds]) -> Any:
    """Write a length n that is divided by c as c * m + r, so that ``n // c`` is m."""
    new: dict[Any, Any] = {}
    floors: dict[Any, Any] = {}
    for floor in sorted(expr.atoms(FloorDiv), key=str):
        length, divisor = floor.args
        if not isinstance(length, sympy.Symbol) or not divisor.is_Integer or divisor <= 0 or length in new:
            continue
        c, was = int(divisor), bounds[length]
        if was.low < 0:
            continue
        m, r = sympy.Dummy("m", integer=True), sympy.Dummy("r", integer=True)
        bounds[m] = Bounds(was.low // c, None if was.high is None else was.high // c)
        bounds[r] = Bounds(0, c - 1)
        new[length], floors[floor] = c * m + r, m
    return expr.xreplace(floors).xreplace(new)


def _without_extremes(expr: Any, bounds: dict[Any, Bounds]) -> Any:
    """Replace a maximum or minimum of two by the one that it always is, where that is known."""
    new: dict[Any, Any] = {}
    for extreme in expr.atoms(Max, Min, sympy.Max, sympy.Min):
        if len(extreme.args) != 2:
            continue
        sign = 1 if isinstance(extreme, (Max, sympy.Max)) else -1
        for a, b in (extreme.args, extreme.args[::-1]):
            if _at_least(sign * (a - b), 0, bounds):
                new[extreme] = a
    return expr.xreplace(new)


def _holds(expr: Any, bounds: dict[Any, Bounds]) -> bool:
    match expr:
        case sympy.true:
            return True
        case sympy.And():
            return all(_holds(x, bounds) for x in expr.args)
        case sympy.Or():
            return any(_holds(x, bounds) for x in expr.args)
        case sympy.Eq():
            return _equal(expr.lhs, expr.rhs, bounds)
        case sympy.Ne():
            return _apart(expr.lhs, expr.rhs, bounds)
        case sympy.Ge() | sympy.Gt() | sympy.Le() | sympy.Lt():
            least = 1 if isinstance(expr, (sympy.Gt, sympy.Lt)) else 0
            return _at_least(expr.gts - expr.lts, least, bounds)
        case _:
            return False


def _equal(a: Any, b: Any, bounds: dict[Any, Bounds]) -> bool:
    if sympy.expand(a - b) == 0:
        return True
    if not isinstance(a, (Mod, PythonMod)) or b != 0:
        return False
    number, divisor = a.args
    if not _at_least(divisor, 1, bounds):
        return False
    quotient = sympy.cancel(number / divisor)
    if quotient.is_Integer:
        return True
    polynomial = quotient.as_poly(*quotient.free_symbols) if quotient.is_polynomial() else None
    return polynomial is not None and all(factor.is_Integer for factor in polynomial.coeffs())


def _apart(a: Any, b: Any, bounds: dict[Any, Bounds]) -> bool:
    if isinstance(a, (Mod, PythonMod)) and b == 0:
        # The remainder of a smaller number is the number.
        number, divisor = a.args
        return _at_least(number, 1, bounds) and _at_least(divisor - number, 1, bounds)
    return _at_least(a - b, 1, bounds) or _at_least(b - a, 1, bounds)


def _at_least(expr: Any, least: int, bounds: dict[Any, Bounds]) -> bool:
    """Whether a polynomial is at least a number: every term at its lowest, lengths counted from their lower bound."""
    if any(symbol not in bounds for symbol in expr.free_symbols) or not expr.is_polynomial():
        return False
    steps = {symbol: sympy.Dummy(symbol.name, integer=True) for symbol in expr.free_symbols}
    moved = sympy.expand(expr.xreplace({symbol: bounds[symbol].low + step for symbol, step in steps.items()}))
    highest = {
        step: None if (high := bounds[symbol].high) is None else high - bounds[symbol].low
        for symbol, step in steps.items()
    }
    lowest: Any = sympy.Integer(0)
    for term, factor in moved.as_coefficients_dict().items():
        if factor >= 0:
            lowest += factor if term == 1 else 0
            continue
        for symbol, power in term.as_powers_dict().items():
            high = highest.get(symbol) if symbol != 1 else 1
            if high is None:
                return False
            factor = factor * sympy.Integer(high) ** power
        lowest += factor
    return bool(lowest >= least)


class RangeGuards:
    """The guards that compiling one graph adds, to be settled for lengths in (low, high].

    ``mark_dynamic(min=, max=)`` forbids guards inside its range, and Dynamo takes every recorded guard for one, even if
    it holds for all lengths: those are discharged here.

    Args:
        length: the symbolic prompt length; must be a bare symbol to be settled.
        above: only lengths greater than this reach the graph (None: no lower bound but the range's).
        up_to: only lengths up to this reach the graph (None: no upper bound but the range's).
    """

    def __init__(self, length: torch.SymInt, *, above: int | None = None, up_to: int | None = None) -> None:
        self._env = length.node.shape_env
        self._symbol = length.node.expr
        self._before = len(self._env.guards)
        self._known = _facts(self._env)
        self._above, self._up_to = above, up_to

    def settle(self) -> str:
        """Remove the new guards if each holds for every length; else keep them all and return one that does not."""
        bounds = self._bounds()
        for guard in self._env.guards[self._before :]:
            if not holds_always(guard.expr, bounds):
                return str(guard.expr)
        self.forget()
        return ""

    def drop_held(self) -> None:
        """Remove those of the new guards that hold for every length: they would bind lengths that never come here.

        Such as that the elements of a mask of N x N can be counted in 32 bits, which Inductor asks on a GPU. What they
        told of the lengths is forgotten with them. None is removed where two lengths were found to be one.
        """
        if self._env.replacements != self._known["replacements"]:
            return
        _go_back(self._env, self._known)
        bounds, new = self._bounds(), self._env.guards[self._before :]
        self.forget()
        self._env.guards += [guard for guard in new if not holds_always(guard.expr, bounds)]

    def forget(self) -> None:
        """Remove the new guards of a compilation that is thrown away."""
        del self._env.guards[self._before :]

    def _bounds(self) -> dict[sympy.Symbol, Bounds]:
        bounds = bounds_of(self._env.var_to_range)
        own = bounds.pop(self._symbol, None)
        # The range of any other length may be what this very compilation assumes.
        if own is None or not isinstance(self._symbol, sympy.Symbol):
            return {}
        low = own.low if self._above is None else max(own.low, self._above + 1)
        ends = [end for end in (own.high, self._up_to) if end is not None]
        return {self._symbol: Bounds(low, min(ends) if ends else None)}
