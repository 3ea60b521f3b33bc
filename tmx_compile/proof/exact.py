"""Which integers a tensor holds exactly: arithmetic on tensors wraps around or rounds, that on terms does neither.

Two things are taken for granted, since no program that runs can tell otherwise: no dimension of unknown size has more
than 2^30 places, and int64 data keep a factor of 8 away from the ends of their range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from tmx_compile.graph.sizes import Size
from tmx_compile.proof.terms import Lin

_LONGEST = 1 << 30
_DATA = 1 << 60


def holds(dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest of the integers that are all exact in a dtype; an empty range for others."""
    if dtype == torch.bool or dtype.is_complex:
        return 0, 1
    if dtype.is_floating_point:
        # One bit is implied: float32 has an eps of 2^-23, and counts to 2^24.
        most = round(2 / torch.finfo(dtype).eps)
        return -most, most
    info = torch.iinfo(dtype)
    return info.min, info.max


def fits(lin: Lin, dtype: torch.dtype, size: Callable[[int], Size], shape_env: Any) -> bool:
    """Whether a term is an integer that a dtype holds, at every coordinate; adds no guard.

    Args:
        lin: the term.
        dtype: of the tensor.
        size: what a coordinate's range is: 0 to size - 1.
        shape_env: the shape environment that symbolic sizes belong to.
    """
    low, high = lin.const, lin.const
    for coordinate, factor in lin.factors:
        last = factor * (size(coordinate) - 1)
        low, high = (low, high + last) if factor > 0 else (low + last, high)
    for element, factor in lin.atoms:
        least, most = _data(element.node)
        ends = factor * least, factor * most
        low, high = low + min(ends), high + max(ends)
    least, most = holds(dtype)
    return bool(_bound(low, shape_env).lower >= least and _bound(high, shape_env).upper <= most)


def _data(node: torch.fx.Node) -> tuple[int, int]:
    value = node.meta["val"] if "val" in node.meta else node.meta["example_value"]
    return (-_DATA, _DATA) if value.dtype == torch.int64 else holds(value.dtype)


def _bound(size: Size, shape_env: Any) -> ValueRanges[Any]:
    expression = sympy.expand(size)
    known = getattr(shape_env, "var_to_range", {})
    ranges = {}
    for symbol in expression.free_symbols:
        given = known.get(symbol, ValueRanges(0, int_oo))
        ranges[symbol] = ValueRanges(given.lower, min(given.upper, sympy.Integer(_LONGEST)))
    return bound_sympy(expression, ranges)
