"""``rewrite`` of graph modules, from wherever they come, and the arguments that it refuses."""

import pytest
import torch
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from tests.support.layers import CONFIG, Layer, Stack, causal, expected, qkv, reasons
from tests.support.oracle import oracle
from tests.support.programs import (
    HIGH,
    LENGTHS,
    Named,
    X,
    close,
    export,
    names,
    only_operators,
    projected,
)
from tmx_compile import (
    Reason,
    TriangleMixInferenceConfig,
    VerificationError,
    rewrite,
)
from tmx_compile.graph.nodes import INSERTED, op_name, value_of
from tmx_compile.passes.plan import Plan
from tmx_compile.passes.program import retrace
from tmx_compile.request import PROGRAM, Request


def check_module(before, x):
    """A rewritten graph module computes the triangle, and the one that went in what it did."""
    text = str(before.graph)
    after, report = rewrite(before, CONFIG, strict=True)
    assert isinstance(after, GraphModule)
    assert str(before.graph) == text
    assert len(report.triangle()) == 1
    assert names(after.graph, "placeholder") == names(before.graph, "placeholder")
    got = after(x)
    close(got[0] if isinstance(got, (tuple, list)) else got, expected(x, CONFIG))
    return after


def test_the_module_of_a_program():
    module = export(Stack(), torch.randn(X)).module()
    for length in LENGTHS:
        after = check_module(module, torch.randn(2, 2, length, 16))
    assert only_operators(after)
    assert len(after._forward_pre_hooks) == len(module._forward_pre_hooks)
    for checked in (module, after):
        with pytest.raises(Exception, match=r"n|size|<="):
            checked(torch.randn(2, 2, HIGH + 1, 16))


def seen_by(make_backend, model, *args, dynamic=None):
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=make_backend(keep), dynamic=dynamic)(*args)
    (gm,) = graphs
    return gm


def test_a_graph_that_dynamo_captured():
    check_module(seen_by(lambda keep: keep, Stack(), torch.randn(X)), torch.randn(X))


@pytest.mark.parametrize("attend", [causal, projected])
def test_a_graph_that_aot_autograd_traced(attend):
    from torch._dynamo.backends.common import aot_autograd

    gm = seen_by(lambda keep: aot_autograd(fw_compiler=keep), Stack(attend), torch.randn(X))
    assert any("flash_attention_for_cpu" in str(node.target) for node in gm.graph.nodes)
    # The heads are merged by a view alone: attention's result lies in memory as it wants.
    copies = sum(op_name(node) == "clone" for node in gm.graph.nodes)
    assert copies == (6 if attend is projected else 0)
    with torch.no_grad():
        after = check_module(gm, torch.randn(X))
    assert only_operators(after)
    # Composite operators do not come back into a graph that had none.
    assert not any(str(node.target).startswith("aten.scaled_dot") for node in after.graph.nodes)
    # The dense call went with all of its outputs.
    assert sum("flash_attention_for_cpu" in str(node.target) for node in gm.graph.nodes) == 2
    assert not any(n.name.startswith("_scaled") and n.name.endswith("cpu_1") for n in after.graph.nodes)


def test_make_fx_records_no_layers():
    x = torch.randn(X)
    gm = make_fx(Stack())(x)
    _, report = rewrite(gm, CONFIG)
    assert reasons(report) == [Reason.LAYER_UNKNOWN.name] * 2
    for index, node in enumerate(n for n in gm.graph.nodes if n.name.startswith("_scaled")):
        for entry in node.users:
            entry.meta["nn_module_stack"] = {"layer": (f"layers.{index}", Layer)}
    after = check_module(gm, torch.randn(X))
    # The dense call of layer 1 is gone, though nothing read its log-sum-exp before either.
    left = [n.name for n in after.graph.nodes if n.name.startswith("_scaled")]
    assert left == ["_scaled_dot_product_flash_attention_for_cpu"]


def test_a_graph_without_shapes_is_an_error_that_says_so():
    gm = symbolic_trace(Named())
    with pytest.raises(
        ValueError, match=r"node 'x' has neither meta\['val'\] nor meta\['example_value'\].*FakeTensorProp"
    ):
        rewrite(gm, CONFIG)
    x = torch.randn(X)
    FakeTensorProp(gm).propagate(x)
    after, report = rewrite(gm, CONFIG, strict=True)
    assert len(report.triangle()) == 1
    close(after(x), oracle(*qkv(x), None, *CONFIG.geometry.counts, 0.25)[0])


def test_bad_arguments():
    program = torch.export.export(Stack(), (torch.randn(X),))
    with pytest.raises(ValueError, match=r"GraphModule or a torch.export.ExportedProgram, got Stack"):
        rewrite(Stack(), CONFIG)
    with pytest.raises(ValueError, match="lowering must be one of"):
        rewrite(program, CONFIG, lowering="fast")
    with pytest.raises(ValueError, match="strict"):
        rewrite(program, CONFIG, strict=1)
    with pytest.raises(ValueError, match="config must be"):
        rewrite(program, {"num_sink_tokens": 4})


def test_a_disabled_configuration_changes_nothing():
    program = torch.export.export(Stack(), (torch.randn(X),))
    after, report = rewrite(program, TriangleMixInferenceConfig())
    assert len(report) == 0
    assert str(after) == str(program)


def test_a_constant_that_tracing_leaves_is_a_defect():
    """Constants would have to be lifted into the program: the pass writes none, and says so if one shows up."""
    program = torch.export.export(Stack(), (torch.randn(X),))
    gm = program.graph_module
    gm.register_buffer("loose", torch.ones(16))
    node = next(node for node in gm.graph.nodes if node.op == "call_function")
    (x, *_) = node.all_input_nodes
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr("loose")
        scaled = gm.graph.call_function(torch.mul, (x, constant))
    constant.meta[INSERTED] = scaled.meta[INSERTED] = True
    scaled.meta["val"] = value_of(x)
    node.replace_input_with(x, scaled)
    with pytest.raises(VerificationError, match="left a constant"):
        retrace(Plan(gm, Request(CONFIG), PROGRAM))
