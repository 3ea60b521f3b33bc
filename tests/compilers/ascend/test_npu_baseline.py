"""The NPU benchmark with the real torch_npu: that it refuses without a device, and what its layers compute."""

from __future__ import annotations

import pytest
import torch

from benchmarks.npu import MODEL, QUICK, register
from benchmarks.npu_platform import Cpu
from benchmarks.shapes import MODELS, Prefill, build
from tests.support.oracle import oracle, tolerance
from tmx_compile.mask.geometry import Geometry

ROWS = 300  # more than a quick run's min_seq_len


def platform_error():
    from benchmarks.npu_platform import Npu

    try:
        Npu()
    except RuntimeError as error:
        return str(error)
    return None


def prefill(geometry, lengths):
    """Last logits of a tiny Llama as the benchmark compiles and calls it, and how many graphs that took."""
    import torch_npu

    from benchmarks.npu import MODEL, QUICK, register
    from benchmarks.npu_platform import Npu
    from benchmarks.shapes import MODELS, Prefill, build, check_layers
    from tests.support.ascend.ge.run import execute
    from tests.support.ascend.standin import capture

    platform = Npu.__new__(Npu)
    platform._npu = torch_npu
    platform._mask = torch.ones(2048, 2048, dtype=torch.bool).triu_(1)
    model = build(MODELS[MODEL], torch.device("cpu"), torch.float16, quick=True)
    config = QUICK.config(Geometry(*geometry), [2, 3]) if geometry else None
    model.config._attn_implementation = "sdpa" if geometry else register(platform, None, "dense, test")
    found = []
    with torch.no_grad(), capture.engine(execute) as models:
        compiled, backend = platform.compile(model, "max-autotune", config)
        for tokens in lengths:
            found.append(Prefill(model, compiled, tokens, dynamic=True, cache=False)())
        check_layers(backend, [2, 3])
        return found, len(models)


def layer(dtype, geometry):
    """One layer as the benchmark compiles it in GE mode, dense without a geometry; the interpreter runs it."""
    import torch_npu

    from benchmarks.npu import QUICK, Layer, compiled
    from benchmarks.npu_platform import Npu
    from tests.support.ascend.ge.run import execute
    from tests.support.ascend.standin import capture

    platform = Npu.__new__(Npu)
    platform._npu = torch_npu
    platform._mask = torch.ones(2048, 2048, dtype=torch.bool).triu_(1)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, ROWS, 32).to(dtype) for heads in (4, 2, 2))
    config = QUICK.config(Geometry(*geometry), [0]) if geometry else None
    with torch.no_grad(), capture.engine(execute) as models:
        made = platform.compile(Layer(None if geometry else platform.dense), "max-autotune", config)
        run = compiled(made, query, key, value)
        return query, key, value, run(), len(models)


def test_without_a_device_the_benchmark_says_so(npu):
    assert npu.call(platform_error) == "torch_npu finds no NPU: torch.npu.is_available() is False (see npu-smi info)"


@pytest.mark.parametrize("geometry", [None, (4, 32, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_benchmark_times_what_it_says(npu, dtype, geometry):
    *operands, out, graphs = npu.call(layer, dtype, geometry)
    expected = oracle(*operands, None, *(geometry or (0, 0, ROWS)), 32**-0.5)[0]
    assert (out.double() - expected).abs().max() < tolerance(dtype)
    assert graphs == 1


@pytest.mark.parametrize("geometry", [None, (4, 32, 16)], ids=str)
def test_the_benchmark_prefills_what_it_says(npu, geometry):
    """The same model and prompts, uncompiled, with this package's CPU kernels."""
    lengths = (300, 320)
    found, graphs = npu.call(prefill, geometry, lengths)
    assert graphs == 1
    model = build(MODELS[MODEL], torch.device("cpu"), torch.float16, quick=True)
    config = QUICK.config(Geometry(*geometry), [2, 3]) if geometry else None
    model.config._attn_implementation = register(Cpu(), config, f"{geometry}, test")
    for tokens, logits in zip(lengths, found, strict=True):
        expected = Prefill(model, model, tokens, dynamic=False, cache=False)()
        assert logits.shape == expected.shape
        assert (logits.double() - expected.double()).abs().max() < 0.02 * expected.double().std()
