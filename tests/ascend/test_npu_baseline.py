"""The NPU benchmark with the real torch_npu: that it refuses without a device, and what its dense baseline computes."""

from __future__ import annotations

import pytest
import torch

from tests.support import oracle, tolerance


def platform_error():
    from benchmarks.npu_platform import Npu

    try:
        Npu()
    except RuntimeError as error:
        return str(error)
    return None


def dense_baseline(dtype):
    """The benchmark's dense layer through torchair's GE mode, the graph run by the interpreter."""
    import torch_npu
    import torchair

    from benchmarks.npu import _Layer
    from benchmarks.npu_platform import Npu
    from tests.ascend.ge.run import execute
    from tests.ascend.standin import capture

    platform = Npu.__new__(Npu)
    platform._npu = torch_npu
    platform._mask = torch.ones(2048, 2048, dtype=torch.bool).triu_(1)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 150, 32).to(dtype) for heads in (4, 2, 2))
    with torch.no_grad(), capture.engine(execute):
        compiled = torch.compile(_Layer(platform.dense), backend=torchair.get_npu_backend())
        return query, key, value, compiled(query, key, value)


def test_without_a_device_the_benchmark_says_so(npu):
    assert npu.call(platform_error) == "torch_npu finds no NPU: torch.npu.is_available() is False (see npu-smi info)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dense_baseline_is_causal_attention(npu, dtype):
    *operands, out = npu.call(dense_baseline, dtype)
    expected = oracle(*operands, None, 0, 0, 150, 32**-0.5)[0]
    assert (out.double() - expected).abs().max() < tolerance(dtype)
