"""A call's arguments by the names of its operator's parameters, however the call is written.

Keywords, positions and defaults are one here, so that no rule and no finder looks at ``node.args``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.graph.nodes import known_operator, tensor_of, value_of
from tmx_compile.graph.operators import Parameter, Signature


@dataclass(frozen=True)
class Call:
    """A call of a known operator.

    Attributes:
        node: the call.
        name: the operator's, as :func:`~tmx_compile.graph.nodes.op_name` says it.
        arguments: by parameter, defaults included.
    """

    node: Node
    name: str
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


def call_of(arg: Any) -> Call | None:
    """The call that a node is; None where no operator of the table takes what it is given, or it is no node."""
    known = known_operator(arg) if isinstance(arg, Node) else None
    if known is None:
        return None
    # An attribute's name says which operator it is: what is left is the tensor.
    args = arg.args[:1] if arg.target is getattr and known.name != "getattr" else arg.args
    for signature in known.signatures:
        if isinstance(arg.target, torch._ops.OpOverload):
            given = _schema_bound(signature, arg.target, args, arg.kwargs)
        else:
            given = bound(signature, args, arg.kwargs)
        if given is not None:
            return Call(arg, known.name, given)
    return None


def named(arg: Any, *names: str) -> Call | None:
    """The call that a node is, if it is one of these operators."""
    call = call_of(arg)
    return call if call is not None and call.name in names else None


def bound(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by parameter, as Python would bind them; None where they do not fit."""
    found: dict[str, Any] = {}
    rest = list(args)
    for parameter in signature.parameters:
        if not rest:
            break
        if parameter.how == "place":
            found[parameter.name] = rest.pop(0)
        elif parameter.how == "rest":
            found[parameter.name] = _sequence(rest[0]) if len(rest) == 1 and _is_sequence(rest[0]) else tuple(rest)
            rest = []
        else:
            break
    if rest:
        return None
    for keyword, value in kwargs.items():
        named = next((p for p in signature.parameters if keyword in p.names), None)
        if named is None or named.name in found:
            return None
        found[named.name] = _sequence(value) if named.how == "rest" else value
    return _complete(signature, found)


def _is_sequence(arg: Any) -> bool:
    # Under a dynamic length the sizes of another tensor are one node.
    return isinstance(value_of(arg) if isinstance(arg, Node) else arg, (tuple, list))


def _sequence(arg: Any) -> Any:
    return tuple(arg) if isinstance(arg, (tuple, list)) else arg


def schema_arguments(
    target: torch._ops.OpOverload[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of an overload by the names of its schema, defaults included."""
    formal = target._schema.arguments
    given = {a.name: value for a, value in zip(formal, args, strict=False)} | dict(kwargs)
    return {a.name: given.get(a.name, a.default_value) for a in formal}


def _schema_bound(
    signature: Signature, target: torch._ops.OpOverload[Any, Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    defaults = {a.name: a.default_value for a in target._schema.arguments}
    found: dict[str, Any] = {}
    for name, value in schema_arguments(target, args, kwargs).items():
        parameter = next((p for p in signature.parameters if name in p.names), None)
        if parameter is not None:
            found[parameter.name] = _sequence(value) if parameter.how == "rest" else value
        elif isinstance(value, Node) or value != defaults[name]:
            return None
    return _complete(signature, found)


def _complete(signature: Signature, found: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with the defaults of those not given; None where one is missing or of another kind."""
    for parameter in signature.parameters:
        if parameter.name not in found:
            if parameter.required:
                return None
            found[parameter.name] = parameter.default
        elif not _is_of_kind(parameter, found[parameter.name]):
            return None
    return found | dict(signature.fixed)


def order_of(call: Call) -> tuple[int, ...] | None:
    """How a permutation orders its source's axes; None for any other call."""
    source = tensor_of(call.arguments.get("input"))
    if source is None:
        return None
    rank = source.dim()
    order = list(range(rank))
    match call.name:
        case "permute" | "permute_copy":
            given = call["dims"] if isinstance(call["dims"], tuple) else ()
            dims = [d % rank for d in given if isinstance(d, int) and -rank <= d < rank]
            return tuple(dims) if sorted(dims) == order else None
        case "numpy_T" | "t":
            return tuple(reversed(order))
        case "transpose" | "transpose_copy":
            ends = call["dim0"], call["dim1"]
        # Of real numbers, the conjugate transpose is the transpose.
        case "mT" | "mH" | "matrix_H" if not source.dtype.is_complex and rank >= 2:
            ends = -2, -1
        case _:
            return None
    if not all(isinstance(d, int) and -rank <= d < rank for d in ends):
        return None
    a, b = (int(d) % rank for d in ends)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def _is_of_kind(parameter: Parameter, arg: Any) -> bool:
    return not parameter.kind or KINDS[parameter.kind](arg)


def _is_integer(arg: Any) -> bool:
    value = value_of(arg) if isinstance(arg, Node) else arg
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


KINDS: dict[str, Callable[[Any], bool]] = {
    "int": _is_integer,
    "ints": lambda arg: _is_sequence(arg) and all(map(_is_integer, value_of(arg) if isinstance(arg, Node) else arg)),
    "tensor": lambda arg: tensor_of(arg) is not None,
    "scalar": lambda arg: isinstance(
        value_of(arg) if isinstance(arg, Node) else arg, (int, float, torch.SymInt, torch.SymFloat)
    ),
}
"""What tells overloads apart; a bool is no integer."""
