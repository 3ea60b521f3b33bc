"""Batched matrix products however they are written, as letters: ``abil, ablj -> abij``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from tmx_compile.find.constant import number_of
from tmx_compile.graph.calls import call_of
from tmx_compile.graph.effects import writes
from tmx_compile.graph.nodes import op_name, tensor_of

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
_LEADING = "ABCDEFGH"


@dataclass(frozen=True)
class Product:
    """``out = alpha * sum(left * right) + beta * bias``, with one letter for every axis.

    Attributes:
        bias: what ``baddbmm`` adds, None where nothing is added.
        alpha, beta: None where they are not known at compile time.
    """

    node: Node
    left: Node
    right: Node
    left_axes: str
    right_axes: str
    out_axes: str
    bias: Node | None = None
    alpha: float | None = 1.0
    beta: float | None = 1.0

    @property
    def summed(self) -> str:
        """The one letter that both operands have and the result has not."""
        return next(x for x in self.left_axes if x in self.right_axes and x not in self.out_axes)

    @property
    def shared(self) -> str:
        """The letters of both operands and the result, in the result's order."""
        return "".join(x for x in self.out_axes if x in self.left_axes and x in self.right_axes)

    def swapped(self) -> Product:
        """The same product with its operands exchanged."""
        return Product(
            self.node, self.right, self.left, self.right_axes, self.left_axes, self.out_axes, self.bias, self.alpha,
            self.beta,
        )  # fmt: skip


def is_product(node: Node) -> bool:
    """Whether a call multiplies batches of matrices: three dimensions or more."""
    if op_name(node) not in PRODUCTS:
        return False
    fake = tensor_of(node)
    return fake is not None and fake.dim() >= 3


def factors_of(node: Node) -> list[Node]:
    """The tensors that a product multiplies, in the order of the call; fewer or more than two for other einsums."""
    call = call_of(node)
    match None if call is None else call.name:
        case "baddbmm":
            names = ["batch1", "batch2"]
        case "einsum":
            assert call is not None
            given = call["operands"]
            given = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
            return [x for x in given if isinstance(x, Node) and tensor_of(x) is not None]
        case "bmm":
            names = ["input", "mat2"]
        case _:
            names = ["input", "other"]
    found = [] if call is None else [call[name] for name in names]
    return [x for x in found if isinstance(x, Node) and tensor_of(x) is not None]


def product_of(node: Node) -> Product | None:
    """The product that a node is; None where it has not two operands, or is no sum over one letter."""
    call, operands = call_of(node), factors_of(node)
    if call is None or len(operands) != 2 or writes(node):
        return None
    left, right = operands
    axes = _equation(call["equation"], left, right) if call.name == "einsum" else _matrix_axes(left, right)
    if axes is None or not _sums_one(*axes):
        return None
    if call.name != "baddbmm":
        return Product(node, left, right, *axes)
    bias, alpha, beta = call["input"], number_of(call["alpha"]), number_of(call["beta"])
    if not isinstance(bias, Node):
        return None
    return Product(node, left, right, *axes, None if beta == 0 else bias, alpha, beta)


def _matrix_axes(left: Node, right: Node) -> tuple[str, str, str] | None:
    ranks = [fake.dim() for x in (left, right) if (fake := tensor_of(x)) is not None]
    if min(ranks) < 3 or max(ranks) > len(_LEADING) + 2:
        return None
    leading = [_LEADING[max(ranks) - rank : max(ranks) - 2] for rank in ranks]
    return f"{leading[0]}il", f"{leading[1]}lj", f"{max(leading, key=len)}ij"


def _equation(equation: Any, left: Node, right: Node) -> tuple[str, str, str] | None:
    """The letters of an einsum; an ellipsis stands for the same axes in both operands."""
    if not isinstance(equation, str) or equation.count("->") != 1:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        return None
    hidden: set[int] = set()
    for term, operand in zip(terms, (left, right), strict=True):
        fake = tensor_of(operand)
        if fake is not None and "..." in term:
            hidden.add(fake.dim() - len(term.replace("...", "")))
    if len(hidden) > 1:
        return None
    unused = "".join(x for x in _LEADING if x not in equation)[: hidden.pop() if hidden else 0]
    a, b, c = (term.replace("...", unused) for term in (*terms, out))
    return a, b, c


def _sums_one(left: str, right: str, out: str) -> bool:
    """Whether no letter is repeated, one is summed, and every other one of an operand is in the result."""
    if any(len(set(term)) != len(term) or not term.isalpha() for term in (left, right, out)):
        return False
    lost = (set(left) | set(right)) - set(out)
    return len(lost) == 1 and lost <= set(left) & set(right) and set(out) <= set(left) | set(right)
