"""Lengths as values: an int, or the expression of a symbol in one form."""

from __future__ import annotations

from typing import TypeAlias

import sympy
import torch

Size: TypeAlias = "int | sympy.Expr"


def canonical(expr: sympy.Expr) -> Size:
    """The form in which equal lengths are equal values."""
    expanded = sympy.expand(expr)
    return int(expanded) if expanded.is_Integer else expanded


def size_of(value: object) -> Size:
    """A length as an int, or as the expression of its symbol; never guards."""
    if isinstance(value, torch.SymInt):
        return canonical(value.node.expr)
    if isinstance(value, int):
        return value
    raise TypeError(f"not a length: {value!r}")
