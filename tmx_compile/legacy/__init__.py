"""The original API's attention for Ascend NPUs: a module that applies its layer's plan, and a block-sparse kernel."""

from __future__ import annotations

from tmx_compile.legacy.attention import AscendTriangleMixAttention
from tmx_compile.legacy.optimizer import AscendNPUTriangleMixOptimizer

__all__ = ["AscendNPUTriangleMixOptimizer", "AscendTriangleMixAttention"]
