"""The ``triton`` lowering and its kernels; only ``kernel``, ``hopper`` and the launches import Triton itself."""

from tmx_compile.lowering.triton.lowering import Triton

__all__ = ["Triton"]
