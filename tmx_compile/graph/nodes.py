"""Small questions about FX nodes that every stage asks in the same way."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterable, Iterator
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

# Calls whose result may share storage with their first argument.
_VIEWS = frozenset(
    """getitem view reshape expand expand_as broadcast_to transpose permute unsqueeze squeeze narrow select slice t
    flatten unflatten unfold detach to contiguous alias swapaxes movedim view_as chunk split unbind as_strided
    type bool float int long half bfloat16 diagonal _unsafe_view lift_fresh split_with_sizes""".split()  # noqa: SIM905
)


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


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.Size)


def written_nodes(graph: torch.fx.Graph) -> dict[Node, Node]:
    """Every node whose storage some in-place call of the graph may write, and the first such call.

    What is read before that call is what the node computed; what is read later depends on when one looks.
    """
    first: dict[Node, Node] = {}
    for write in graph.nodes:
        if not is_in_place(write) or not write.args:
            continue
        stack = [write.args[0]]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            # A view is given sizes too: they share nothing with what it shows.
            if not isinstance(node, Node) or node in seen or isinstance(value_of(node), _NUMBERS):
                continue
            seen.add(node)
            first.setdefault(node, write)
            if op_name(node) in _VIEWS:
                stack.extend(node.all_input_nodes)
            elif is_in_place(node):
                stack.append(node.args[0])
            # A view taken of the storage is written through its base, whichever of the two the call names.
            stack.extend(user for user in node.users if op_name(user) in _VIEWS)
    return first


def storage_of(node: Node) -> Node:
    """The node that made the storage which ``node`` is (or may be) a view of."""
    seen: set[Node] = set()
    while (is_in_place(node) or op_name(node) in _VIEWS) and node.args and isinstance(node.args[0], Node):
        if node in seen:
            break
        seen.add(node)
        node = node.args[0]
    return node


def is_written(node: Node) -> bool:
    """Whether an in-place call writes to a node's tensor, or to a view of it."""
    for user in node.users:
        if op_name(user) != "detach_" and is_in_place(user) and storage_of(user) is storage_of(node):
            return True
        if op_name(user) in _VIEWS and is_written(user):
            return True
    return False


def erase_dead(graph: torch.fx.Graph, roots: Iterable[Node], effects: Collection[Node] = ()) -> int:
    """Erase the roots and what only they needed; returns how many nodes went.

    ``effects`` are calls that may go although they do more than give a result.

    ``Graph.eliminate_dead_code`` is not used: it takes an in-place method call without users for dead.
    """
    erased = 0
    stack = list(roots)
    gone: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in gone or not all(map(_only_asserts, node.users)) or node.op in ("placeholder", "output"):
            continue
        if node not in effects and (is_in_place(node) or node.op == "call_module" or node.is_impure()):
            continue
        for assertion in list(node.users):
            graph.erase_node(assertion)
            gone.add(assertion)
        inputs = node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
        erased += 1
        stack.extend(inputs)
    return erased


def dead_ends(node: Node) -> list[Node] | None:
    """The last of the nodes that depend on ``node``, if nothing needs them; None where something does.

    :func:`erase_dead` of the last nodes erases ``node`` and all that depends on it.
    """
    ends: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op not in ("call_function", "call_method") or is_in_place(current) or current.is_impure():
            return None
        stack.extend(current.users)
        ends.extend([] if current.users else [current])
    return ends


def _only_asserts(node: Node) -> bool:
    """Whether a node does nothing but check the dtype and device of a tensor (export asks before every cast)."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default and not node.users


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
