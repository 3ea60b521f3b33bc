"""Small questions about FX nodes that every stage asks in the same way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

from tmx_compile.graph.operators import Operator, attribute_of, method_of, name_of, operator_of

INSERTED = "tmx_inserted"
"""Key in ``node.meta`` of every node that the pass or a lowering wrote."""

FIRST_ROW = "tmx_first_row"
"""Metadata of an operator's node: the node of row 0's position before the keys were moved to the end, or None."""

LAYER = "tmx_layer"
"""Metadata of an operator's node: the number of its layer."""

ORIGIN = ("nn_module_stack", "stack_trace", LAYER)
"""Metadata that a node inherits from the one that it is written for."""


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


def written(node: Node, like: Node, fake_mode: Any) -> Node:
    """Give a new node what every node has that the pass or a lowering writes: origin, mark and example value.

    Without the example value AOTAutograd bypasses its cache.

    Args:
        node: the node.
        like: the node that it is written for.
        fake_mode: of the graph.
    """
    node.meta.update({key: like.meta[key] for key in ORIGIN if key in like.meta})
    node.meta[INSERTED] = True
    if node.op in ("call_function", "call_method"):
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
        with on_fakes(fake_mode):
            if node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                node.meta["example_value"] = node.target(*args, **kwargs)
    return node
