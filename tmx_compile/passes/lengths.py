"""Which side of ``min_seq_len`` a graph is for, without one recompile per length."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint, statically_known_true

from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.sizes import SizeInput


class Prompt(enum.Enum):
    """The lengths that one graph serves."""

    SHORT = "short"
    LONG = "long"
    BOTH = "both"


def known(q_len: int | torch.SymInt, min_seq_len: int) -> Prompt | None:
    """The side a length is on as far as it is known already; never guards."""
    if statically_known_true(q_len > min_seq_len):
        return Prompt.LONG
    return Prompt.SHORT if statically_known_true(q_len <= min_seq_len) else None


def decide(q_len: int | torch.SymInt, min_seq_len: int, *, may_guard: bool = True) -> Prompt:
    """The side a graph is for. Guards on it, so that Dynamo compiles once per side, unless the user fixed a range.

    ``mark_dynamic(min=, max=)`` promises one graph for the whole range; a guard inside it is a constraint violation.
    Such a graph has to serve both sides; so has one whose guards nobody would check (``may_guard=False``).
    """
    side = known(q_len, min_seq_len)
    if side is not None:
        return side
    assert isinstance(q_len, torch.SymInt)
    if not may_guard or has_fixed_range(q_len):
        return Prompt.BOTH
    return Prompt.LONG if bool(q_len > min_seq_len) else Prompt.SHORT


def all_short(lengths: Sequence[int | torch.SymInt], min_seq_len: int, *, may_guard: bool) -> bool:
    """Whether every length is on the short side; what is known of none may be long."""
    for length in lengths:
        side = known(length, min_seq_len)
        if side is None and isinstance(length, torch.SymInt) and length.node.has_hint():
            side = decide(length, min_seq_len, may_guard=may_guard)
        if side is not Prompt.SHORT:
            return False
    return bool(lengths)


def row_counts(node: Node) -> list[int | torch.SymInt]:
    """What may be the number of rows of a call that is not understood: its result's dimensions but the last."""
    values = (value_of(x) for x in (node, *node.all_input_nodes))
    out = next((x for x in values if isinstance(x, torch.Tensor)), None)
    return [] if out is None else list(out.shape[:-1])


def has_fixed_range(length: torch.SymInt) -> bool:
    """Whether the user fixed the range of a length with ``mark_dynamic(min=, max=)``."""
    symbols = length.node.expr.free_symbols
    for tracked in length.node.shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        sizes = getattr(tracked.fake, "shape", ())
        for size, constraint in zip(sizes, constraints, strict=False):
            fixed = isinstance(constraint, StrictMinMaxConstraint)
            if fixed and isinstance(size, torch.SymInt) and size.node.expr.free_symbols & symbols:
                return True
    return False


def hint(size: int | torch.SymInt) -> int:
    """A length as compilation saw it: itself, or the hint of its symbol (0 where it has none)."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def dispatch(
    where: SizeInput, min_seq_len: int, short: Callable[..., Any], long: Callable[..., Any]
) -> Callable[..., Any]:
    """A callable that picks the graph by the length of each call."""

    def run(*args: Any) -> Any:
        return (long if where.read(args) > min_seq_len else short)(*args)

    return run
