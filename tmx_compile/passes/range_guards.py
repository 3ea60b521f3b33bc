"""Guards under a fixed range of lengths: discharge those that hold for every length, refuse the others.

``mark_dynamic(min=, max=)`` forbids guards inside the range, and Dynamo takes every recorded guard for one, even if it
holds for all lengths: ``32 * (n // 32 + 1) != n``, say, which a view of a padded tensor asks. Such a guard is settled
here by evaluating it at every length that its graph will see.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import TensorReferenceAnalysis

_MOST_LENGTHS = 1 << 22


class RangeGuards:
    """The guards that compiling one graph adds, to be settled for lengths in (low, high].

    Args:
        length: the symbolic prompt length; must be a bare symbol to be settled.
        above: only lengths greater than this reach the graph (None: no lower bound but the range's).
        up_to: only lengths up to this reach the graph (None: no upper bound but the range's).
    """

    def __init__(self, length: torch.SymInt, *, above: int | None = None, up_to: int | None = None) -> None:
        self._env = length.node.shape_env
        self._symbol = length.node.expr
        self._before = len(self._env.guards)
        self._above, self._up_to = above, up_to

    def settle(self) -> str:
        """Remove the new guards if each holds for every length; else keep them all and return one that does not."""
        new = self._env.guards[self._before :]
        if not new:
            return ""
        lengths = self._lengths()
        if lengths is None:
            return f"the range of {self._symbol} has no end to check {new[0].expr} up to"
        for guard in new:
            if not _holds(guard.expr, self._symbol, lengths):
                return str(guard.expr)
        del self._env.guards[self._before :]
        return ""

    def forget(self) -> None:
        """Remove the new guards of a compilation that is thrown away."""
        del self._env.guards[self._before :]

    def _lengths(self) -> Tensor | None:
        if not isinstance(self._symbol, sympy.Symbol):
            return None
        bounds = self._env.bound_sympy(self._symbol)
        low = int(bounds.lower) if self._above is None else max(int(bounds.lower), self._above + 1)
        high = bounds.upper
        if high == int_oo or high == sympy.oo:
            if self._up_to is None:
                return None
            high = self._up_to
        high = int(high) if self._up_to is None else min(int(high), self._up_to)
        return torch.arange(low, high + 1) if 0 <= high - low < _MOST_LENGTHS else None


class _AtLengths(TensorReferenceAnalysis):
    """Integer expressions over a tensor of lengths; lengths are positive, so both remainders are one."""

    @staticmethod
    def mod(a: Any, b: Any) -> Any:
        return torch.remainder(a, b)

    python_mod = mod


def _holds(expr: Any, symbol: Any, lengths: Tensor) -> bool:
    """Whether a guard is true at every length; False as well where it cannot be evaluated."""
    if expr.free_symbols - {symbol}:
        return False
    try:
        # Plain tensors: the compiler's fake mode may be active around us.
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            value = sympy_interp(_AtLengths, {symbol: lengths}, expr)
            return bool(torch.as_tensor(value).all())
    except (NotImplementedError, AttributeError, TypeError):
        return False
