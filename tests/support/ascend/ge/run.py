"""Runs a ModelDef on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.support.ascend.ge import attention, elementwise, linear, shapes
from tests.support.ascend.ge.node import Call, GraphError, Invalid
from tests.support.ascend.ge.schema import PROTO, load

OPERATORS = {**elementwise.OPERATORS, **shapes.OPERATORS, **linear.OPERATORS, **attention.OPERATORS}
_FLOAT = 1


def execute(model: bytes | Any, inputs: Sequence[Tensor], *, allow_empty: bool = False) -> list[Tensor]:
    """The outputs of a graph.

    Args:
        model: a ``ModelDef`` or its bytes; weights are Data or Const nodes in it.
        inputs: one tensor for each Data node, in the order of their ``index``.
        allow_empty: whether a tensor between nodes may be without elements. torchair compiles a graph with
            ``ge.exec.allTensorNotEmpty=1`` unless tracing met one, so by default it may not.

    Raises:
        GraphError: see the package.
    """
    if isinstance(model, bytes):
        model = load().ModelDef.FromString(model)
    if len(model.graph) != 1:
        raise GraphError(f"a ModelDef with {len(model.graph)} graphs is not implemented")
    ops = {op.name: op for op in model.graph[0].op}
    if len(ops) != len(model.graph[0].op):
        raise GraphError("two nodes have one name")
    values: dict[str, tuple[Tensor | Invalid, ...]] = {}
    data = sorted((op for op in ops.values() if op.type == "Data"), key=lambda op: op.attr["index"].i)
    if [op.attr["index"].i for op in data] != list(range(len(inputs))):
        raise GraphError(f"{len(inputs)} inputs were given, Data nodes: {[op.name for op in data]}")
    for op, given in zip(data, inputs, strict=True):
        values[op.name] = (_data(op, given),)
    outputs: list[Tensor] | None = None
    for op in _ordered(ops):
        if op.type == "Data":
            continue
        call = Call(op, _inputs(op, values))
        if op.type == "NetOutput":
            if outputs is not None:
                raise GraphError("two NetOutput nodes")
            outputs = _net_output(call)
        elif op.type == "Const":
            values[op.name] = (_const(call),)
        else:
            values[op.name] = _run(call, allow_empty)
    if outputs is None:
        raise GraphError("no NetOutput node")
    return outputs


def _ordered(ops: dict[str, Any]) -> list[Any]:
    """The nodes, each behind those it reads or is ordered behind ("name:-1" is a control edge)."""
    done: dict[str, bool] = {}
    order = []
    for first in ops:
        stack = [first]
        while stack:
            name = stack[-1]
            if done.get(name):
                stack.pop()
                continue
            if name not in ops:
                raise GraphError(f"{name!r} is read and is no node")
            needed = [source.rsplit(":", 1)[0] for source in ops[name].input if source]
            open_ = [source for source in needed if not done.get(source)]
            if not open_:
                done[name] = True
                order.append(ops[stack.pop()])
            elif name in done:
                raise GraphError(f"{ops[name].type} {name!r}: reads its own result")
            else:
                done[name] = False
                stack.extend(open_)
    return order


def _inputs(op: Any, values: dict[str, tuple[Tensor | Invalid, ...]]) -> dict[str, Tensor | Invalid | None]:
    """The values of a node's inputs by name. Inputs stand in the order of their descriptions, then control edges."""
    sources = [source for source in op.input if not source.endswith(":-1")]
    if len(sources) != len(op.input_desc):
        raise GraphError(f"{op.type} {op.name!r}: {len(sources)} inputs with {len(op.input_desc)} descriptions")
    found: dict[str, Tensor | Invalid | None] = {}
    for source, desc in zip(sources, op.input_desc, strict=True):
        if not source:
            found[desc.name] = None
            continue
        name, index = source.rsplit(":", 1)
        if int(index) >= len(values[name]):
            raise GraphError(f"{op.type} {op.name!r}: reads {source!r}, of {len(values[name])} outputs")
        found[desc.name] = values[name][int(index)]
    return found


def _data(op: Any, given: Tensor) -> Tensor:
    call = Call(op, {})
    (desc,) = op.output_desc
    dtype = PROTO.get(desc.dtype)
    call.require(given.dtype == dtype, f"the input must be of {dtype}, got {given.dtype}")
    fits = _agrees(desc.shape.dim, given)
    call.require(fits, f"the input must have shape {list(desc.shape.dim)}, got {tuple(given.shape)}")
    call.require(given.is_contiguous() and given.device.type == "cpu", "the input must be contiguous and on the CPU")
    return given.detach()


def _const(call: Call) -> Tensor:
    attribute = call.op.attr["value"]
    call.require(attribute.WhichOneof("value") == "t", "value is no tensor")
    desc, data = attribute.t.desc, attribute.t.data
    dtype = PROTO.get(desc.dtype)
    if dtype is None:
        call.fail(f"dtype {desc.dtype} is not implemented")
    sizes = list(desc.shape.dim)
    count = torch.Size(sizes).numel()
    call.require(len(data) == count * dtype.itemsize, f"{len(data)} bytes for shape {sizes} of {dtype}")
    if count == 0:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(sizes)


def _run(call: Call, allow_empty: bool) -> tuple[Tensor | Invalid, ...]:
    op = call.op
    if op.type not in OPERATORS:
        call.fail("the operator is not implemented")
    results = OPERATORS[op.type](call)
    call.check_complete()
    call.require(len(results) == len(op.output_desc), f"{len(op.output_desc)} outputs are described")
    for result, desc in zip(results, op.output_desc, strict=True):
        if isinstance(result, Invalid):
            continue
        # Torchair leaves the default, float, where it does not describe an output.
        described = desc.dtype == _FLOAT or PROTO.get(desc.dtype) == result.dtype
        call.require(described, f"output {desc.name!r} is described as {PROTO.get(desc.dtype)}, is {result.dtype}")
        empty = result.numel() == 0 and op.type != "Shape"
        call.require(allow_empty or not empty, f"output {desc.name!r} is empty, shape {tuple(result.shape)}")
    return results


def _net_output(call: Call) -> list[Tensor]:
    found = []
    for desc in call.op.input_desc:
        value = call.tensor(desc.name)
        same = PROTO.get(desc.dtype) == value.dtype and _agrees(desc.shape.dim, value)
        call.require(
            same,
            f"{desc.name!r} is described as {PROTO.get(desc.dtype)} {list(desc.shape.dim)}, "
            f"is {value.dtype} {tuple(value.shape)}",
        )
        found.append(value)
    return found


def _agrees(described: Sequence[int], value: Tensor) -> bool:
    """Whether the shape is as described: -1 stands for any size, [-2] for any rank (GE's convention)."""
    if list(described) == [-2]:
        return True
    return len(described) == value.dim() and all(a in (-1, b) for a, b in zip(described, value.shape, strict=True))
