"""The one operator that the pass substitutes: ``tmx::triangle_attention``."""

from __future__ import annotations

from tmx_compile.ops.triangle import ALL_ROWS, OPERATOR, triangle_attention

__all__ = ["ALL_ROWS", "OPERATOR", "triangle_attention"]
