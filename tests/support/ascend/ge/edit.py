"""Mistakes for tests to plant in a ModelDef."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tests.support.ascend.ge.build import UNFED, set_attr
from tests.support.ascend.ge.schema import PROTO_OF, load

FIA = "FusedInferAttentionScore"


class Editor:
    """A parsed model whose nodes can be changed."""

    def __init__(self, model: bytes) -> None:
        self.model = load().ModelDef.FromString(model)
        self.graph = self.model.graph[0]

    def nodes(self, kind: str, **attrs: int) -> list[Any]:
        """The nodes of a type with these integer attributes; at least one."""
        found = [op for op in self.graph.op if op.type == kind]
        found = [op for op in found if all(op.attr[name].i == value for name, value in attrs.items())]
        assert found, f"no {kind} with {attrs}"
        return found

    def set(self, op: Any, **attrs: Any) -> None:
        """Change attributes."""
        for name, value in attrs.items():
            set_attr(op, name, value)

    def input(self, op: Any, name: str) -> int:
        """The place of an input."""
        return [desc.name for desc in op.input_desc].index(name)

    def unfeed(self, op: Any, name: str) -> None:
        """Take an optional input away, as torchair writes it."""
        place = self.input(op, name)
        op.input[place] = ""
        op.input_desc[place].attr[UNFED].b = True

    def swap(self, op: Any, first: str, second: str) -> None:
        """Exchange two inputs."""
        a, b = self.input(op, first), self.input(op, second)
        op.input[a], op.input[b] = op.input[b], op.input[a]

    def insert(
        self, op: Any, name: str, kind: str, inputs: dict[str, Any], attrs: dict[str, Any] | None = None
    ) -> None:
        """Put a node between an input and its source; ``inputs`` has None for the source, and tensors for constants."""
        place = self.input(op, name)
        added = self.graph.op.add(type=kind, name=f"planted_{len(self.graph.op)}")
        for each, value in inputs.items():
            added.input.append(op.input[place] if value is None else self._const(value))
            added.input_desc.add(name=each)
        for each, value in (attrs or {}).items():
            set_attr(added, each, value)
        added.output_desc.add(name="y", dtype=1)
        op.input[place] = f"{added.name}:0"

    def source(self, op: Any, name: str) -> Any:
        """The node that feeds an input."""
        wanted = op.input[self.input(op, name)].rsplit(":", 1)[0]
        (found,) = (each for each in self.graph.op if each.name == wanted)
        return found

    def upstream(self, op: Any, name: str, kind: str) -> Any:
        """The first node of a type on the way up from an input, through first inputs."""
        found = self.source(op, name)
        while found.type != kind:
            found = self.source(found, found.input_desc[0].name)
        return found

    def _const(self, value: torch.Tensor) -> str:
        added = self.graph.op.add(type="Const", name=f"planted_{len(self.graph.op)}")
        tensor = added.attr["value"].t
        tensor.desc.dtype = PROTO_OF[value.dtype]
        tensor.desc.shape.dim.extend(value.shape)
        tensor.data = value.numpy().tobytes()
        added.output_desc.add(name="y", dtype=1)
        return f"{added.name}:0"


def describe(model: bytes) -> Iterator[str]:
    """One line for each node: type, name, inputs, attributes."""
    for op in load().ModelDef.FromString(model).graph[0].op:
        attrs = {name: str(value).split("\n")[0] for name, value in op.attr.items() if not name.startswith("_")}
        yield f"{op.type} {op.name} {list(op.input)} {attrs if op.type != 'Const' else ''}"
