"""Small questions about FX nodes that every stage asks in the same way."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

_OPERATOR_NAMES = {"and_": "and", "or_": "or", "xor": "xor", "invert": "not", "inv": "not", "not_": "not"}
_METHOD_NAMES = {
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_xor": "xor",
    "logical_xor": "xor",
    "bitwise_not": "not",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "not_equal": "ne",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
}

INSERTED = "tmx_inserted"
"""Key in ``node.meta`` of every node that the pass or a lowering wrote."""


def value_of(node: Node) -> Any:
    """The node's example value: a fake tensor, a symbolic or plain number, or None where tracing left none.

    Dynamo's is "example_value"; export and AOTAutograd write "val", and may leave Dynamo's beside it.
    """
    meta = node.meta
    return meta["val"] if "val" in meta else meta.get("example_value")


def tensor_of(arg: Any) -> torch.Tensor | None:
    """The fake tensor of a node argument; None for anything else."""
    value = value_of(arg) if isinstance(arg, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def op_name(node: Node) -> str:
    """One name for a call however it was written: ``x + y``, ``torch.add(x, y)``, ``x.add(y)``, ``aten.add.Tensor``."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
    elif node.op != "call_function":
        return node.op
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[-1]
    else:
        name = getattr(target, "__name__", str(target))
        if getattr(operator, name, None) is target:
            name = _OPERATOR_NAMES.get(name, name)
    if name.startswith("__") and name.endswith("__"):
        # torch 2.11 records a comparison of tensors as the method ``__eq__``.
        name = _OPERATOR_NAMES.get(name[2:-2], name[2:-2])
    return _METHOD_NAMES.get(name, name)


def is_in_place(node: Node) -> bool:
    """Whether a call writes to its first argument."""
    if "out" in node.kwargs:
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target is operator.setitem or name == "__setitem__":
        return True
    if name.startswith("__i") and name not in ("__invert__", "__index__"):
        return True
    if getattr(operator, name, None) is target and name in _IN_PLACE_OPERATORS:
        return True
    return name.endswith("_") and not name.endswith("__") and name not in ("and_", "or_", "not_", "is_")


_IN_PLACE_OPERATORS = frozenset(
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift iconcat imatmul".split()  # noqa: SIM905
)


def fake_mode_of(gm: GraphModule) -> Any:
    """The fake tensor mode that the graph's example values belong to; None in a graph without fake tensors."""
    for node in gm.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


@contextlib.contextmanager
def on_fakes(fake_mode: Any) -> Iterator[None]:
    """Run code on fake tensors: symbolic sizes need the Python dispatcher, and no gradient is wanted."""
    with fake_mode, torch.no_grad(), enable_python_dispatcher():
        yield


def shape_env_of(value: torch.Tensor) -> Any:
    """The shape environment behind a fake tensor, or None (static shapes need none)."""
    return getattr(getattr(value, "fake_mode", None), "shape_env", None)
