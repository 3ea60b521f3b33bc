"""One node as an operator sees it: its tensors and attributes by the prototype's names, each checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
INDEX = (torch.int32, torch.int64)
BOOL = (torch.bool,)
NUMBER = (*FLOATING, *INTEGER)
ANY = (*NUMBER, torch.bool)

# What torchair and GE note on a node for themselves; none of it changes a value.
_ANNOTATIONS = {
    "_input_name_key",
    "_input_name_value",
    "_output_name_key",
    "_output_name_value",
    "_force_unknown_shape",
    "_inputs_all_sym",
    "_readable_value",
    "_host_tensor",
}
_FIELDS = {int: "i", float: "f", bool: "b", bytes: "s"}
_REQUIRED = object()


class GraphError(ValueError):
    """A graph that the manual does not allow, or whose meaning it does not tell. Names the operator and the node."""


class Invalid:
    """An output that the manual calls invalid. Reading it is an error."""

    def __init__(self, why: str) -> None:
        self.why = why


class Call:
    """A node with its input values.

    Attributes:
        op: the ``OpDef``.
        inputs: the value of each input by the prototype's name ("x0", "x1" for a dynamic input "x"); None where an
            optional input is not fed.
    """

    def __init__(self, op: Any, inputs: Mapping[str, Tensor | Invalid | None]) -> None:
        self.op = op
        self.inputs = inputs
        self._used: set[str] = set()
        self._read: set[str] = set()

    def fail(self, text: str) -> NoReturn:
        """Raise :class:`GraphError` with the operator's type and the node's name."""
        raise GraphError(f"{self.op.type} {self.op.name!r}: {text}")

    def require(self, condition: bool, text: str) -> None:
        """Fail with the text unless the condition holds."""
        if not condition:
            self.fail(text)

    def tensor(self, name: str, dtypes: Collection[torch.dtype] = ANY) -> Tensor:
        """A required input of one of the dtypes."""
        value = self.optional(name, dtypes)
        if value is None:
            self.fail(f"input {name!r} is missing")
        return value

    def optional(self, name: str, dtypes: Collection[torch.dtype] = ANY) -> Tensor | None:
        """An optional input, or None."""
        self._used.add(name)
        value = self.inputs.get(name)
        if isinstance(value, Invalid):
            self.fail(f"input {name!r} is invalid: {value.why}")
        if value is not None and value.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.fail(f"input {name!r} must be of {names}, got {value.dtype}")
        return value

    def dynamic(self, name: str, dtypes: Collection[torch.dtype] = ANY) -> list[Tensor]:
        """The tensors of a dynamic input, at least one."""
        found = []
        while f"{name}{len(found)}" in self.inputs:
            found.append(self.tensor(f"{name}{len(found)}", dtypes))
        self.require(bool(found), f"dynamic input {name!r} has no tensors")
        return found

    def numbers(self, name: str) -> list[int]:
        """A 0-d or 1-d integer input as a list."""
        value = self.tensor(name, INDEX)
        self.require(value.dim() <= 1, f"input {name!r} must be 0-d or 1-d, got shape {tuple(value.shape)}")
        return [int(x) for x in value.reshape(-1)]

    def integer(self, name: str, default: Any = _REQUIRED) -> int:
        """An integer attribute."""
        return int(self._attribute(name, default, int))

    def real(self, name: str, default: Any = _REQUIRED) -> float:
        """A float attribute, which protobuf stores in float32."""
        return float(self._attribute(name, default, float))

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """A boolean attribute."""
        return bool(self._attribute(name, default, bool))

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        """A string attribute."""
        value = self._attribute(name, default, bytes)
        return value.decode() if isinstance(value, bytes) else str(value)

    def integers(self, name: str, default: Any = _REQUIRED) -> list[int]:
        """A list of integers."""
        self._read.add(name)
        if name not in self.op.attr:
            self.require(default is not _REQUIRED, f"attribute {name!r} is missing")
            return list(default)
        attribute = self.op.attr[name]
        self.require(attribute.WhichOneof("value") == "list", f"attribute {name!r} must be a list of integers")
        return list(attribute.list.i)

    def only(self, **values: Any) -> None:
        """Fail unless each of these attributes is absent or has this value, the one whose meaning is implemented."""
        for name, value in values.items():
            got = self._attribute(name, value, type(value))
            self.require(got == value, f"attribute {name!r} is implemented for {value!r} alone, got {got!r}")

    def _attribute(self, name: str, default: Any, kind: type) -> Any:
        self._read.add(name)
        if name not in self.op.attr:
            self.require(default is not _REQUIRED, f"attribute {name!r} is missing")
            return default
        attribute = self.op.attr[name]
        field = attribute.WhichOneof("value")
        self.require(field == _FIELDS[kind], f"attribute {name!r} must be {kind.__name__}, got field {field!r}")
        return getattr(attribute, field)

    def check_complete(self) -> None:
        """Fail if the node has an input or attribute that its operator never asked for."""
        fed = {name for name, value in self.inputs.items() if value is not None}
        for name in sorted(fed - self._used):
            self.fail(f"input {name!r} is not implemented")
        for name in sorted(set(self.op.attr) - self._read - _ANNOTATIONS):
            self.fail(f"attribute {name!r} is not implemented")


def wide(x: Tensor) -> Tensor:
    """The dtype in which an operator computes: float32 for 16-bit floats, float64 for float32, integers as they are."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x.double() if x.dtype == torch.float32 else x
