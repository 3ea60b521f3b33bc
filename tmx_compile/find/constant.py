"""Numbers that are known at compile time, also where the graph holds them as tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._sympy.symbol import SymT, symbol_is_type

from tmx_compile.graph.calls import call_of
from tmx_compile.graph.nodes import tensor_of, value_of

# Where a call that fills a tensor has its number: the name of the argument, or the number itself.
_FILLED: dict[str, str | float] = {
    **dict.fromkeys(("full", "full_like", "new_full"), "fill_value"),
    "scalar_tensor": "s",
    "tensor": "data",
    **dict.fromkeys(("ones", "ones_like", "new_ones"), 1.0),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0.0),
}
_SAME = frozenset("to _to_copy float half bfloat16 double type clone detach detach_ alias expand".split())  # noqa: SIM905
_LIFTED = frozenset({"lift_fresh", "lift_fresh_copy"})
_ARITHMETIC: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x),
    "reciprocal": lambda x: 1.0 / x,
    "neg": operator.neg,
    "mul": operator.mul,
    "add": operator.add,
    "sub": operator.sub,
    "div": operator.truediv,
    "pow": operator.pow,
}
# What arithmetic may be told beside its operands, where it is told nothing.
_PLAIN: dict[str, Any] = {"alpha": 1, "rounding_mode": None}


def number_of(arg: Any) -> float | None:
    """An argument as a number: plain, symbolic, or a tensor all of whose elements are this number; else None.

    A symbolic number is read, with a guard, where tracing lifted it from an attribute of a module. One that depends on
    a size is not: it changes from call to call.
    """
    if isinstance(arg, Node):
        value = value_of(arg)
        if isinstance(value, torch.Tensor):
            number = _of_tensor(arg, depth=8)
            return None if number is None else _rounded(number, value.dtype)
        return _plain(value)
    return _plain(arg)


def _plain(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, (torch.SymFloat, torch.SymInt)):
        return None
    expression = value.node.expr
    if not all(symbol_is_type(symbol, SymT.FLOAT) for symbol in expression.free_symbols):
        return None
    try:
        return float(value)
    except GuardOnDataDependentSymNode:
        return None


def _of_tensor(node: Node, depth: int) -> float | None:
    call = call_of(node)
    if depth == 0 or call is None:
        return None
    if call.name in _FILLED:
        where = _FILLED[call.name]
        if isinstance(where, float):
            return where
        given = call[where]
        return _plain(value_of(given)) if isinstance(given, Node) else _plain(given)
    if call.name in _LIFTED:
        return _constant(call["input"])
    if call.name in _SAME:
        return _operand(call["input"], depth)
    function = _ARITHMETIC.get(call.name)
    if function is None or any(call.arguments.get(name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    numbers = [_operand(arg, depth) for name, arg in call.arguments.items() if name not in _PLAIN]
    try:
        result = function(*numbers) if None not in numbers else None
    except (ArithmeticError, ValueError, TypeError):
        return None
    return result if isinstance(result, float) else None


def _operand(arg: Any, depth: int) -> float | None:
    """An operand, rounded to its dtype as the graph rounds it."""
    if not isinstance(arg, Node):
        return _plain(arg)
    fake = tensor_of(arg)
    if fake is None:
        return _plain(value_of(arg))
    number = _of_tensor(arg, depth - 1)
    return None if number is None else _rounded(number, fake.dtype)


def _rounded(number: float, dtype: torch.dtype) -> float | None:
    if not dtype.is_floating_point:
        return number if dtype != torch.bool and math.isfinite(number) else None
    return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _constant(arg: Any) -> float | None:
    """A tensor that the program wrote down, such as ``torch.tensor(0.5)``: tracing keeps it beside the graph."""
    if not isinstance(arg, Node):
        return None
    fake = tensor_of(arg)
    held = getattr(fake, "constant", None)
    if held is None and arg.op == "get_attr":
        held = _attribute(arg)
    if not isinstance(held, torch.Tensor) or held.dim() != 0 or type(held) is not torch.Tensor:
        return None
    return _plain(held.item())


def _attribute(node: Node) -> Any:
    held: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        held = getattr(held, name, None)
    return held
