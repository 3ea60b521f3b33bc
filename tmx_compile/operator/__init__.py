"""The one operator that the pass substitutes, ``tmx::triangle_attention``, and the checks of what a user promised."""

from __future__ import annotations

from tmx_compile.operator.checks import CHECK_MASK, FIRST_POSITION, FIRST_ROW_INSIDE, MASKED
from tmx_compile.operator.promised import KEEP_WINDOW
from tmx_compile.operator.triangle import ALL_ROWS, OPERATOR, triangle_attention

__all__ = [
    "ALL_ROWS",
    "CHECK_MASK",
    "FIRST_POSITION",
    "FIRST_ROW_INSIDE",
    "KEEP_WINDOW",
    "MASKED",
    "OPERATOR",
    "triangle_attention",
]
