"""Launches that are repeated on a real NVIDIA GPU: other addresses, streams, threads and CUDA graphs.

On a GPU: ``python -m pytest tests/lowering/test_launch_cuda.py``.
"""

import threading

import pytest
import torch

from tests.support.oracle import oracle
from tmx_compile.mask.geometry import Geometry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

# The general kernel with and without splits, and where there is one the Hopper kernel.
CASES = {
    "one block": (Geometry(4, 32, 0), 700, 2),
    "last rows": (Geometry(4, 32, 64), 1500, 2),
    "wide": (Geometry(8, 200, 64), 4500, 16),
}


def operands(n, heads, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    counts = heads, heads // 2, heads // 2
    return [
        torch.randn(1, n, x, 64, device="cuda", dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for x in counts
    ]


def attend(qkv, geometry):
    from tmx_compile.lowering.triton.op import TRITON_OPERATOR

    return TRITON_OPERATOR(*qkv, None, None, *geometry.arguments(0.125))


def check(out, qkv, geometry):
    want, _ = oracle(*(x.cpu() for x in qkv), None, *geometry.counts, 0.125)
    torch.testing.assert_close(out.cpu().double(), want, atol=0.03, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_driver_launches_again_at_other_addresses(name):
    from tmx_compile.lowering.triton.launch import prepare
    from tmx_compile.lowering.triton.prepared import kind

    geometry, n, heads = CASES[name]
    seen = [operands(n, heads, seed) for seed in range(4)]
    outs = [attend(qkv, geometry) for qkv in seen]
    launch = prepare(*map(kind, seen[0]), None, None, geometry, 0.125, False, None, None, None, None, None)
    assert launch._launch._again is not None
    for out, qkv in zip(outs, seen, strict=True):
        check(out, qkv, geometry)
        assert torch.equal(attend(qkv, geometry), out)


@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_replays_it_on_what_its_inputs_hold_then(name):
    geometry, n, heads = CASES[name]
    qkv = operands(n, heads)
    attend(qkv, geometry)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(qkv, geometry)
        again = attend(qkv, geometry)
    for seed in (1, 2, 3):
        other = operands(n, heads, seed)
        for mine, theirs in zip(qkv, other, strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert torch.equal(out, again)
        assert torch.equal(out, attend(other, geometry))


def test_streams_and_threads_of_their_own():
    """Kernels that run at once count their splits apart."""
    geometry, n, heads = CASES["last rows"]
    problems = [operands(n, heads, seed) for seed in range(4)]
    want = [attend(qkv, geometry) for qkv in problems]
    torch.cuda.synchronize()
    wrong = []

    def work(index):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(attend(problems[index], geometry), want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_thread_that_never_used_the_gpu():
    geometry, n, heads = CASES["last rows"]
    qkv = operands(n, heads)
    want, found = attend(qkv, geometry), []
    thread = threading.Thread(target=lambda: found.append(attend(qkv, geometry)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(found[0], want)
