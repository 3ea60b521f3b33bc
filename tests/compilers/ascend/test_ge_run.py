"""How the interpreter runs a graph: order, inputs, constants, descriptions, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.support.ascend.ge.build import Graph, set_attr
from tests.support.ascend.ge.node import GraphError
from tests.support.ascend.ge.run import execute
from tests.support.ascend.ge.schema import load
from tests.support.ascend.standin.process import unsupported

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=str(unsupported()))

F32, I64 = torch.float32, torch.int64


def chain():
    """-(x + 1) * y with x the first input and y the second."""
    graph = Graph()
    x, y = graph.data(F32, (-1, 2)), graph.data(F32, (2,))
    total = graph.op("Add", {"x1": x, "x2": graph.const(torch.tensor(1.0))})
    graph.outputs((graph.op("Mul", {"x1": graph.op("Neg", {"x": total}), "x2": y}), F32))
    return graph


X, Y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])


def test_a_chain():
    assert torch.equal(chain().run(X, Y)[0], -(X + 1) * Y)


def test_nodes_may_stand_in_any_order():
    graph = chain()
    nodes = [type(op).FromString(op.SerializeToString()) for op in reversed(graph.graph.op)]
    del graph.graph.op[:]
    graph.graph.op.extend(nodes)
    assert torch.equal(graph.run(X, Y)[0], -(X + 1) * Y)


def test_inputs_come_by_index_not_by_place():
    graph = chain()
    first, second = (op for op in graph.graph.op if op.type == "Data")
    first.attr["index"].i, second.attr["index"].i = 1, 0
    assert torch.equal(graph.run(Y, X)[0], -(X + 1) * Y)


def test_inputs_stay_as_they_were():
    x = X.clone()
    graph = Graph()
    ref = graph.data(F32)
    graph.outputs((ref, F32), (ref, F32))
    out, again = graph.run(x)
    assert torch.equal(out, again)
    assert torch.equal(x, X)


@pytest.mark.parametrize("value", [[1.5, -2.0], [True, False], [1, -(2**40)]])
def test_constants(value):
    tensors = [torch.tensor(value)]
    if isinstance(value[0], float):
        tensors += [tensors[0].to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]
    tensors.append(torch.empty(0, dtype=tensors[0].dtype))
    for tensor in tensors:
        graph = Graph()
        graph.outputs((graph.const(tensor), tensor.dtype))
        assert torch.equal(graph.run()[0], tensor)


def test_control_edges_order_and_feed_nothing():
    graph = chain()
    neg = next(op for op in graph.graph.op if op.type == "Neg")
    neg.input.append("data1:-1")
    assert torch.equal(graph.run(X, Y)[0], -(X + 1) * Y)


def find(graph, kind):
    return next(op for op in graph.graph.op if op.type == kind)


def rename(graph):
    find(graph, "Neg").name = "data0"


def unknown_input(graph):
    find(graph, "Neg").input[0] = "nowhere:0"


def second_output(graph):
    find(graph, "Neg").input[0] = "data0:1"


def cycle(graph):
    find(graph, "Add").input[0] = f"{find(graph, 'Mul').name}:0"


def no_end(graph):
    graph.graph.op.remove(find(graph, "NetOutput"))


def two_ends(graph):
    graph.graph.op.add(type="NetOutput", name="another")


def two_graphs(graph):
    graph.model.graph.add(name="another")


def variable(graph):
    find(graph, "Data").type = "RefData"


def outside(graph):
    find(graph, "Const").type = "FileConstant"


def short_constant(graph):
    find(graph, "Const").attr["value"].t.data = b"\0\0"


def described_otherwise(graph):
    find(graph, "Neg").output_desc[0].dtype = 2


def other_result(graph):
    find(graph, "NetOutput").input_desc[0].dtype = 2


def other_shape(graph):
    find(graph, "NetOutput").input_desc[0].shape.dim[:] = [-1, 3]


def too_many_outputs(graph):
    find(graph, "Neg").output_desc.add(name="z")


def undescribed(graph):
    find(graph, "Neg").input.append("data0:0")


def wrong_field(graph):
    set_attr(find(graph, "Neg"), "alpha", [1])


BROKEN = [
    (rename, "one name"),
    (unknown_input, "'nowhere' is read and is no node"),
    (second_output, "reads 'data0:1', of 1 outputs"),
    (cycle, "reads its own result"),
    (no_end, "no NetOutput"),
    (two_ends, "two NetOutput"),
    (two_graphs, "2 graphs"),
    (variable, "2 inputs were given, Data nodes"),
    (outside, "FileConstant .* the operator is not implemented"),
    (short_constant, "2 bytes for shape"),
    (described_otherwise, "described as torch.float16, is torch.float32"),
    (other_result, "described as torch.float16"),
    (other_shape, "described as .*-1, 3.*is torch.float32 .2, 2."),
    (too_many_outputs, "2 outputs are described"),
    (undescribed, "2 inputs with 1 descriptions"),
    (wrong_field, "attribute 'alpha' is not implemented"),
]


@pytest.mark.parametrize(("break_it", "text"), BROKEN)
def test_broken_graphs(break_it, text):
    graph = chain()
    break_it(graph)
    with pytest.raises(GraphError, match=text):
        graph.run(X, Y)


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((X,), "1 inputs were given"),
        ((X, Y, Y), "3 inputs were given"),
        ((X.double(), Y), "must be of torch.float32, got torch.float64"),
        ((X.reshape(1, 4), Y), r"must have shape \[-1, 2\], got \(1, 4\)"),
        ((X.T, Y), "contiguous"),
    ],
)
def test_inputs_that_do_not_fit(inputs, text):
    with pytest.raises(GraphError, match=text):
        chain().run(*inputs)


def test_empty_tensors_between_nodes():
    graph = chain()
    with pytest.raises(GraphError, match="is empty"):
        graph.run(X[:0], Y)
    assert graph.run(X[:0], Y, allow_empty=True)[0].shape == (0, 2)


def test_a_model_in_either_form():
    graph = chain()
    model = graph.model
    assert isinstance(model, load().ModelDef)
    assert torch.equal(execute(model, (X, Y))[0], execute(model.SerializeToString(), (X, Y))[0])
