"""A prompt split over processes by its length: what each computes, and what is exchanged."""

from tmx_compile.lowering.context_parallel.agree import agreed
from tmx_compile.lowering.context_parallel.halo import least_piece
from tmx_compile.lowering.context_parallel.lowering import ContextParallel
from tmx_compile.lowering.context_parallel.ranks import Ranks

__all__ = ["ContextParallel", "Ranks", "agreed", "least_piece"]
