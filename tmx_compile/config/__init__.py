"""What the user asks for: which layers are triangle layers, and the shape of the triangle."""

from tmx_compile.config.triangle import TriangleMixConfig
from tmx_compile.config.values import as_count

__all__ = ["TriangleMixConfig", "as_count"]
