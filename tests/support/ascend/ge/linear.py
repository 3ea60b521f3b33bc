"""Matrix products and reductions: accumulated wide, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.ascend.ge.node import FLOATING, NUMBER, Call, wide

_MATRIX = (torch.float32, torch.float16, torch.bfloat16)


def _product(call: Call, first: str, second: str) -> tuple[Tensor, Tensor]:
    a, b = call.tensor("x1", _MATRIX), call.tensor("x2", _MATRIX)
    call.require(a.dtype == b.dtype, f"x1 and x2 must have one dtype, got {a.dtype} and {b.dtype}")
    call.require(a.dim() >= 2 and b.dim() >= 2, f"ranks are {a.dim()} and {b.dim()}")
    if call.flag(first, False):
        a = a.transpose(-1, -2)
    if call.flag(second, False):
        b = b.transpose(-1, -2)
    fits = a.dim() == b.dim() and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    call.require(fits, f"{tuple(a.shape)} and {tuple(b.shape)} do not multiply")
    return a, b


def matmul(call: Call) -> tuple[Tensor]:
    """MatMul and MatMulV2: x1 @ x2 of matrices, each transposed where asked, plus a bias over the columns."""
    a, b = _product(call, "transpose_x1", "transpose_x2")
    call.only(offset_x=0)
    call.require(a.dim() == 2, f"operands must be matrices, got rank {a.dim()}")
    bias = call.optional("bias", (a.dtype, torch.float32))
    out = wide(a) @ wide(b)
    if bias is not None:
        call.require(bias.shape in ((out.shape[1],), (1, out.shape[1])), f"bias has shape {tuple(bias.shape)}")
        out = out + bias
    return (out.to(a.dtype),)


def batch_matmul(call: Call) -> tuple[Tensor]:
    """BatchMatMul and BatchMatMulV2: products of the last two axes; broadcasting of the others is not implemented."""
    a, b = _product(call, "adj_x1", "adj_x2")
    call.only(offset_x=0)
    return ((wide(a) @ wide(b)).to(a.dtype),)


def _axes(call: Call, x: Tensor, axes: list[int]) -> list[int]:
    call.require(all(-x.dim() <= axis < x.dim() for axis in axes), f"axes {axes} are out of range for rank {x.dim()}")
    call.require(bool(axes), "no axes: what that means differs between versions")
    return axes


def _reduction(name: str):
    def run(call: Call) -> tuple[Tensor]:
        x = call.tensor("x", FLOATING if name == "mean" else NUMBER)
        axes = _axes(call, x, call.numbers("axes"))
        call.flag("noop_with_empty_axes", True)  # said for empty axes alone
        out = getattr(wide(x), name)(axes, keepdim=call.flag("keep_dims", False))
        return (out.to(x.dtype),)

    return run


def softmax(call: Call) -> tuple[Tensor]:
    """SoftmaxV2 along one axis."""
    call.only(half_to_float=False)
    x = call.tensor("x", FLOATING)
    axes = _axes(call, x, call.integers("axes", (-1,)))
    call.require(len(axes) == 1, f"softmax is implemented along one axis, got {axes}")
    return (torch.softmax(wide(x), axes[0]).to(x.dtype),)


OPERATORS = {
    "MatMul": matmul,
    "MatMulV2": matmul,
    "BatchMatMul": batch_matmul,
    "BatchMatMulV2": batch_matmul,
    "ReduceMean": _reduction("mean"),
    "ReduceSum": _reduction("sum"),
    "ReduceMax": _reduction("amax"),
    "SoftmaxV2": softmax,
}
"""GE type -> function of a :class:`~tests.support.ascend.ge.node.Call` that returns the outputs."""
