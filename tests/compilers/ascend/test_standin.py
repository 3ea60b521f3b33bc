"""The stand-in CANN: the real conversion runs on it, and what needs an engine does not seem to work."""

from __future__ import annotations

import pytest
import torch

from tests.support.ascend.standin.process import RemoteError


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16, dtype=torch.float16)

    def forward(self, x):
        return torch.nn.functional.silu(self.linear(x)) + 1


def types(data):
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    return [op.type for op in ModelDef.FromString(data).graph[0].op]


def export_small(folder, dynamic):
    from tests.support.ascend.standin import capture

    return types(capture.exported(Small(), torch.randn(4, 16).half(), folder=folder, dynamic=dynamic))


def compile_small(runs):
    import torchair

    from tests.support.ascend.standin import capture

    small, x = Small(), torch.randn(4, 16).half()

    def execute(model, inputs):
        (given,) = [t for t in inputs if t.shape == x.shape]
        return [small(given)]

    with torch.no_grad(), capture.engine(execute if runs else None) as models:
        out = torch.compile(small, backend=torchair.get_npu_backend())(x)
    return types(models[0]), torch.equal(out, small(x))


def available():
    import torch_npu

    return torch_npu.npu.is_available()


def touch_device():
    return torch.empty(2, device="npu")


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_real_export_writes_a_model(npu, tmp_path, dynamic):
    ops = npu.call(export_small, tmp_path, dynamic)
    assert "Swish" in ops
    assert ops[-1] == "NetOutput"
    assert (tmp_path / "dynamo.pbtxt").exists()


def test_ge_mode_runs_what_the_test_gives_it(npu):
    ops, same = npu.call(compile_small, runs=True)
    assert "Swish" in ops
    assert same


def test_without_an_executor_no_graph_runs(npu):
    with pytest.raises(RemoteError, match="runs no graph") as caught:
        npu.call(compile_small, runs=False)
    assert caught.value.kind == "NoEngineError"


def test_there_is_no_device(npu):
    assert npu.call(available) is False
    with pytest.raises(RemoteError):
        npu.call(touch_device)
