"""Ascend NPUs: the operator as calls of torch_npu's fused attention, for torchair and for eager mode."""

from tmx_compile.lowering.ascend import eager
from tmx_compile.lowering.ascend.lowering import Ascend

__all__ = ["Ascend", "eager"]
