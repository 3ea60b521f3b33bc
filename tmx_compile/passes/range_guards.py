"""Guards under a fixed range of lengths: discharge those that hold for every length, refuse the others.

``mark_dynamic(min=, max=)`` forbids guards inside the range, and Dynamo takes every recorded guard for one, even if it
holds for all lengths: ``32 * (n // 32 + 1) != n``, say, which a view of a padded tensor asks.
"""

from __future__ import annotations

import sympy
import torch

from tmx_compile.graph.guards import Bounds, bounds_of, holds_always


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
        bounds = self._bounds()
        for guard in self._env.guards[self._before :]:
            if not holds_always(guard.expr, bounds):
                return str(guard.expr)
        self.forget()
        return ""

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
