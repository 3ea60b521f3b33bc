"""Which layers can go sparse: each layer's Middle contribution, measured rather than assumed."""

from __future__ import annotations

from tmx_compile.analysis.recorder import TriangleMixAnalyzer

__all__ = ["TriangleMixAnalyzer"]
