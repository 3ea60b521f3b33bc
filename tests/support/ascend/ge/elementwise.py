"""Elementwise operators. Two operands broadcast as in NumPy; a result is computed wide and rounded once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.ascend.ge.node import BOOL, FLOATING, INTEGER, NUMBER, Call, wide
from tests.support.ascend.ge.schema import ATTRIBUTE

_SIGNED = (*FLOATING, torch.int32, torch.int64)


def _binary(call: Call, dtypes: tuple[torch.dtype, ...], promotes: bool = False) -> tuple[Tensor, Tensor, torch.dtype]:
    """The operands in the dtype to compute in, and the result's dtype.

    Both operands must have one dtype, except where the prototype says ``Promote({"T1", "T2"})`` (Mul, Pow).
    """
    a, b = call.tensor("x1", dtypes), call.tensor("x2", dtypes)
    call.require(promotes or a.dtype == b.dtype, f"x1 and x2 must have one dtype, got {a.dtype} and {b.dtype}")
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        call.fail(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not broadcast")
    # Both as they are, so that a 0-d tensor counts as much as any other; GE has no weak scalars.
    dtype = torch.promote_types(a.dtype, b.dtype)
    return wide(a.to(dtype)), wide(b.to(dtype)), dtype


def _arithmetic(function: Callable[[Tensor, Tensor], Tensor], dtypes: tuple[torch.dtype, ...], promotes: bool = False):
    def run(call: Call) -> tuple[Tensor]:
        a, b, dtype = _binary(call, dtypes, promotes)
        return (function(a, b).to(dtype),)

    return run


def _comparison(function: Callable[[Tensor, Tensor], Tensor], dtypes: tuple[torch.dtype, ...]):
    def run(call: Call) -> tuple[Tensor]:
        a, b, _ = _binary(call, dtypes)
        return (function(a, b),)

    return run


def _unary(function: Callable[[Tensor], Tensor], dtypes: tuple[torch.dtype, ...]):
    def run(call: Call) -> tuple[Tensor]:
        x = call.tensor("x", dtypes)
        return (function(wide(x)).to(x.dtype),)

    return run


def floor_div(call: Call) -> tuple[Tensor]:
    """FloorDiv: floor(x1 / x2) of integers. Division by zero is not documented."""
    a, b, dtype = _binary(call, INTEGER)
    call.require(bool((b != 0).all()), "x2 has a zero")
    return (torch.div(a, b, rounding_mode="floor").to(dtype),)


def exponential(call: Call) -> tuple[Tensor]:
    """Exp: base**(scale * x + shift), base -1 meaning e."""
    call.only(base=-1.0, scale=1.0, shift=0.0)
    x = call.tensor("x", FLOATING)
    return (torch.exp(wide(x)).to(x.dtype),)


def logarithm(call: Call) -> tuple[Tensor]:
    """Log: log_base(scale * x + shift), base -1 meaning e."""
    call.only(base=-1.0, scale=1.0, shift=0.0)
    x = call.tensor("x", FLOATING)
    return (torch.log(wide(x)).to(x.dtype),)


def muls(call: Call) -> tuple[Tensor]:
    """Muls: x * value. Integers lose precision above 2**24 (manual), so they are refused here."""
    x = call.tensor("x", FLOATING[:3])
    return ((wide(x) * call.real("value")).to(x.dtype),)


def swish(call: Call) -> tuple[Tensor]:
    """Swish: x * sigmoid(scale * x)."""
    x = call.tensor("x", FLOATING[:3])
    return ((wide(x) * torch.sigmoid(call.real("scale", 1.0) * wide(x))).to(x.dtype),)


def cast(call: Call) -> tuple[Tensor]:
    """Cast to ``dst_type`` (numbered as ge::DataType). A float that the integer cannot hold is not documented."""
    x = call.tensor("x")
    number = call.integer("dst_type")
    call.require(number in ATTRIBUTE, f"dst_type {number} is not implemented")
    dtype = ATTRIBUTE[number]
    if x.dtype in FLOATING and dtype in INTEGER:
        limits = torch.iinfo(dtype)
        held = (x.double() > float(limits.min) - 1) & (x.double() < float(limits.max) + 1)
        call.require(bool(held.all()), f"a value does not fit into {dtype}")
    return (x.to(dtype),)


def select(call: Call) -> tuple[Tensor]:
    """SelectV2: ``then`` where the condition holds, else ``else``; the three broadcast."""
    condition, then, other = call.tensor("condition", BOOL), call.tensor("then"), call.tensor("else")
    call.require(then.dtype == other.dtype, f"then and else must have one dtype, got {then.dtype} and {other.dtype}")
    return (torch.where(condition, then, other),)


def clip(call: Call) -> tuple[Tensor]:
    """ClipByValueV2: x limited to [min, max]; the three have one dtype and broadcast. min above max is undefined."""
    x = call.tensor("x", NUMBER)
    low, high = (call.tensor(f"clip_value_{end}", (x.dtype,)) for end in ("min", "max"))
    call.require(bool((low <= high).all()), "clip_value_min is above clip_value_max")
    return (torch.minimum(torch.maximum(x, low), high),)


OPERATORS = {
    "Add": _arithmetic(torch.add, NUMBER),
    "Sub": _arithmetic(torch.sub, NUMBER),
    "Mul": _arithmetic(torch.mul, NUMBER, promotes=True),
    "RealDiv": _arithmetic(torch.div, FLOATING),
    "Div": _arithmetic(torch.div, FLOATING),
    "FloorDiv": floor_div,
    "Pow": _arithmetic(torch.pow, FLOATING, promotes=True),
    "Minimum": _arithmetic(torch.minimum, _SIGNED),
    "Maximum": _arithmetic(torch.maximum, _SIGNED),
    "Equal": _comparison(torch.eq, (*NUMBER, torch.bool)),
    "NotEqual": _comparison(torch.ne, (*NUMBER, torch.bool)),
    "Less": _comparison(torch.lt, NUMBER),
    "LessEqual": _comparison(torch.le, NUMBER),
    "Greater": _comparison(torch.gt, NUMBER),
    "GreaterEqual": _comparison(torch.ge, NUMBER),
    "LogicalAnd": _comparison(torch.logical_and, BOOL),
    "LogicalOr": _comparison(torch.logical_or, BOOL),
    "LogicalNot": _unary(torch.logical_not, BOOL),
    "Neg": _unary(torch.neg, _SIGNED),
    "Sqrt": _unary(torch.sqrt, FLOATING),
    "Rsqrt": _unary(torch.rsqrt, FLOATING),
    "Cos": _unary(torch.cos, FLOATING),
    "Sin": _unary(torch.sin, FLOATING),
    "Sigmoid": _unary(torch.sigmoid, FLOATING),
    "Exp": exponential,
    "Log": logarithm,
    "Muls": muls,
    "Swish": swish,
    "Cast": cast,
    "SelectV2": select,
    "ClipByValueV2": clip,
}
"""GE type -> function of a :class:`~tests.support.ascend.ge.node.Call` that returns the outputs."""
