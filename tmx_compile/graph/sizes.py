"""Lengths as values: an int, or the expression of a symbol in one form; and which input of a graph carries one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Graph, Node

from tmx_compile.graph.nodes import value_of

Size: TypeAlias = "int | sympy.Expr"


def canonical(expr: sympy.Expr) -> Size:
    """The form in which equal lengths are equal values."""
    expanded = sympy.expand(expr)
    return int(expanded) if expanded.is_Integer else expanded


def size_of(value: object) -> Size:
    """A length as an int, or as the expression of its symbol; never guards."""
    if isinstance(value, torch.SymInt):
        return canonical(value.node.expr)
    if isinstance(value, int):
        return value
    raise TypeError(f"not a length: {value!r}")


@dataclass(frozen=True)
class SizeInput:
    """A symbolic size at a graph's inputs: the input, its position, and the dimension (None: the input is the size)."""

    node: Node
    position: int
    dim: int | None

    @property
    def symbolic(self) -> torch.SymInt:
        """The size as the graph was captured."""
        value = value_of(self.node)
        size: torch.SymInt = value if self.dim is None else value.shape[self.dim]
        return size

    def read(self, args: Sequence[Any]) -> int:
        """The size in one call."""
        arg = args[self.position]
        return int(arg if self.dim is None else arg.shape[self.dim])


def size_inputs(graph: Graph) -> Mapping[Any, SizeInput]:
    """Every expression of symbols that is an input, or a dimension of one, and the first that carries it."""
    found: dict[Any, SizeInput] = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        value = value_of(node)
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, SizeInput(node, position, dim))
    return found
