"""ModelDefs written by hand, for tests of the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.ascend.ge.run import execute
from tests.support.ascend.ge.schema import PROTO_OF, load

UNFED = "_is_unfed_optional"


class Graph:
    """A graph that grows node by node. Nodes are referred to by "name:index", as in the protobuf."""

    def __init__(self) -> None:
        self.model = load().ModelDef()
        self.graph = self.model.graph.add(name="by hand")
        self._inputs = 0

    def data(self, dtype: torch.dtype, shape: Sequence[int] = (-2,)) -> str:
        """The next input of the graph."""
        op = self._node("Data", f"data{self._inputs}")
        op.attr["index"].i = self._inputs
        self._inputs += 1
        for desc in (op.input_desc.add(name="x"), op.output_desc.add(name="y")):
            self._describe(desc, dtype, shape)
        return f"{op.name}:0"

    def const(self, value: Tensor) -> str:
        """A constant."""
        op = self._node("Const")
        tensor = op.attr["value"].t
        self._describe(tensor.desc, value.dtype, value.shape)
        tensor.data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        self._describe(op.output_desc.add(name="y"), value.dtype, value.shape)
        return f"{op.name}:0"

    def op(
        self,
        kind: str,
        inputs: Mapping[str, str | Sequence[str] | None],
        attrs: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = ("y",),
    ) -> str:
        """A node; a list of references feeds a dynamic input, None leaves an optional one unfed. Its first output."""
        op = self._node(kind)
        for name, sources in inputs.items():
            several = [(name, sources)]
            if isinstance(sources, (list, tuple)):
                several = [(f"{name}{i}", source) for i, source in enumerate(sources)]
            for each, source in several:
                op.input.append(source or "")
                desc = op.input_desc.add(name=each)
                if source is None:
                    desc.attr[UNFED].b = True
        for name, value in (attrs or {}).items():
            set_attr(op, name, value)
        for name in outputs:
            op.output_desc.add(name=name, dtype=1)
        return f"{op.name}:0"

    def outputs(self, *described: tuple[str, torch.dtype]) -> None:
        """The end of the graph."""
        op = self._node("NetOutput")
        for i, (source, dtype) in enumerate(described):
            op.input.append(source)
            self._describe(op.input_desc.add(name=f"input{i}"), dtype, (-2,))

    def run(self, *inputs: Tensor, **options: Any) -> list[Tensor]:
        """Execute the serialised graph."""
        return execute(self.model.SerializeToString(), inputs, **options)

    def _node(self, kind: str, name: str | None = None) -> Any:
        return self.graph.op.add(type=kind, name=name or f"{kind}_{len(self.graph.op)}")

    @staticmethod
    def _describe(desc: Any, dtype: torch.dtype, shape: Sequence[int]) -> None:
        desc.dtype = PROTO_OF[dtype]
        desc.shape.dim.extend(shape)
        desc.layout = "ND"


def set_attr(op: Any, name: str, value: Any) -> None:
    """Give a node an attribute, in the field that its Python type belongs to."""
    attribute = op.attr[name]
    if isinstance(value, bool):
        attribute.b = value
    elif isinstance(value, int):
        attribute.i = value
    elif isinstance(value, float):
        attribute.f = value
    elif isinstance(value, str):
        attribute.s = value.encode()
    else:
        attribute.list.i[:] = value
        attribute.list.val_type = 2


def run_one(
    kind: str,
    inputs: Mapping[str, Tensor | Sequence[Tensor] | None],
    attrs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, torch.dtype] | torch.dtype | None = None,
    **options: Any,
) -> list[Tensor]:
    """The outputs of a graph of one node whose inputs are the graph's.

    ``outputs`` names the node's outputs with their dtypes; by default one, "y", of the first input's dtype.
    """
    graph, given = Graph(), []

    def feed(value: Tensor) -> str:
        given.append(value)
        return graph.data(value.dtype, value.shape)

    sources: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            sources[name] = feed(value)
        else:
            sources[name] = None if value is None else [feed(each) for each in value]
    if not isinstance(outputs, Mapping):
        outputs = {"y": outputs or (given[0].dtype if given else torch.float32)}
    name = graph.op(kind, sources, attrs, list(outputs)).rsplit(":", 1)[0]
    graph.outputs(*((f"{name}:{i}", dtype) for i, dtype in enumerate(outputs.values())))
    return graph.run(*given, **options)
