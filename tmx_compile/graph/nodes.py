"""Small questions about FX nodes that every stage asks in the same way."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from tmx_compile.graph.operators import Operator, attribute_of, method_of, name_of, operator_of

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
    """Which operator a call is: "add" for ``x + y``, ``torch.add(x, y)``, ``x.add(y)`` and ``aten.add.Tensor``.

    What :mod:`tmx_compile.graph.operators` does not know never has the name of something that it knows: it is told by
    where it comes from, as ``lab::softmax`` or ``torch.masked._ops.softmax``.
    """
    known = known_operator(node)
    if known is not None:
        return known.name
    if node.op not in ("call_function", "call_method"):
        return node.op
    odd = next((type(value_of(x)).__name__ for x in node.all_input_nodes if not _is_plain(x)), None)
    if node.op == "call_function":
        return name_of(node.target) if odd is None else f"{name_of(node.target)} of a {odd}"
    kind = type(value_of(node.args[0])) if node.args and isinstance(node.args[0], Node) else type(None)
    if odd is None and kind in _PLAIN:
        return name_of(getattr(torch.Tensor, str(node.target), node.target))
    return f"{odd or kind.__name__}.{node.target}"


def known_operator(node: Node) -> Operator | None:
    """The operator that a call is, of those that rules and finders know.

    A tensor of a class of its own may override any of them, as a function or as a method.
    """
    if node.op not in ("call_function", "call_method") or not all(map(_is_plain, node.all_input_nodes)):
        return None
    first = node.args[0] if node.args else None
    if node.op == "call_method":
        return method_of(str(node.target)) if tensor_of(first) is not None else None
    if node.target is getattr and tensor_of(first) is not None:
        return attribute_of(str(node.args[1])) or operator_of(getattr)
    return operator_of(node.target)


def _is_plain(node: Node) -> bool:
    """Whether a node's tensor, if it is one, is of a class that computes what torch says."""
    value = value_of(node)
    return not isinstance(value, torch.Tensor) or type(value) in _PLAIN


_PLAIN = (torch.Tensor, torch._subclasses.FakeTensor, torch.nn.Parameter, torch.nn.Buffer)


def _is_view(node: Node) -> bool:
    """Whether a call's result may be a view; told by the bare name alone, since a view too many does no harm."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(target, torch._ops.OpOverload):
        name = str(target._schema.name.split("::")[-1])
    else:
        name = str(getattr(target, "__name__", target))
        name = name.strip("_") if name.startswith("__") else name
    return name in _VIEWS or (target is getattr and op_name(node) != "getattr")


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
            if _is_view(node):
                stack.extend(node.all_input_nodes)
            elif is_in_place(node):
                stack.append(node.args[0])
            # A view taken of the storage is written through its base, whichever of the two the call names.
            stack.extend(user for user in node.users if _is_view(user))
    return first


def storage_of(node: Node) -> Node:
    """The node that made the storage which ``node`` is (or may be) a view of."""
    seen: set[Node] = set()
    while (is_in_place(node) or _is_view(node)) and node.args and isinstance(node.args[0], Node):
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
        if _is_view(user) and is_written(user):
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
