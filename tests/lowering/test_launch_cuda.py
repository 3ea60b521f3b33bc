"""Launches that are repeated on a real NVIDIA GPU: other addresses, streams, threads and CUDA graphs.

On a GPU: ``python -m pytest tests/lowering/test_launch_cuda.py``.
"""

import threading

import pytest
import torch

from tmx_compile import triangle_attention
from tmx_compile.lowering.triton.op import attend_into
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
    """By the operator in plain PyTorch, on the GPU too."""
    sink, window, last = geometry.counts
    want, _ = triangle_attention(*[x.float() for x in qkv], sink=sink, window=window, last=last, scale=0.125)
    torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0)


@pytest.fixture
def launched(monkeypatch):
    """What the driver said to each launch past Triton."""
    from tmx_compile.lowering.triton import driver

    said, launch = [], driver.Launch.__call__

    def watched(self, *arguments):
        said.append(launch(self, *arguments))
        return said[-1]

    monkeypatch.setattr(driver.Launch, "__call__", watched)
    return said


@pytest.mark.parametrize("name", CASES)
def test_the_driver_launches_again_at_other_addresses(name, launched):
    geometry, n, heads = CASES[name]
    seen = [operands(n, heads, seed) for seed in range(4)]
    attend(seen[0], geometry)
    launched.clear()
    outs = [attend(qkv, geometry) for qkv in seen]
    for out, qkv in zip(outs, seen, strict=True):
        check(out, qkv, geometry)
        assert torch.equal(attend(qkv, geometry), out)
    assert launched == [True] * 8


@pytest.mark.parametrize("name", CASES)
def test_what_the_driver_does_not_launch_triton_does(name, monkeypatch):
    from tmx_compile.lowering.triton import driver

    geometry, n, heads = CASES[name]
    qkv = operands(n, heads)
    want = attend(qkv, geometry)
    monkeypatch.setattr(driver.Launch, "__call__", lambda self, addresses, stream: False)
    for _ in range(3):
        assert torch.equal(attend(qkv, geometry), want)


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


# Splits and tiles of several numbers: a launch counts in what another left behind.
MIXED = [(Geometry(4, 32, last), n, heads) for last, n, heads in ((64, 1500, 2), (16, 900, 8), (200, 4096, 4))]
MIXED += [(Geometry(8, 200, 64), 4500, 16), (Geometry(8, 200, 1), 5000, 16)]


def problems():
    """Each with its result, which is right."""
    made = [(operands(n, heads, seed), geometry) for seed, (geometry, n, heads) in enumerate(MIXED)]
    for qkv, geometry in made:
        check(attend(qkv, geometry), qkv, geometry)
    return [(qkv, geometry, attend(qkv, geometry)) for qkv, geometry in made]


def assert_zeros_are_left():
    from tmx_compile.lowering.triton.prepared import allocator
    from tmx_compile.lowering.triton.splits import split_memory

    device = torch.device("cuda", torch.cuda.current_device())
    first, second = (split_memory(allocator(device), device.index, 4)[0] for _ in range(2))
    assert first.data_ptr() == second.data_ptr()
    assert not first.any()


def test_launches_on_a_stream_share_counters_that_they_leave_at_zero():
    mixed = problems()
    outs = [(attend(qkv, geometry), want) for _ in range(40) for qkv, geometry, want in mixed]
    assert all(torch.equal(out, want) for out, want in outs)
    assert_zeros_are_left()


def test_training_leaves_zeros_too():
    from tmx_compile.lowering.triton.op import TRAINING_OPERATOR

    leaves = [x.requires_grad_() for x in operands(4096, 4)]
    grad_out = torch.randn_like(leaves[0])
    found = []
    for _ in range(10):
        out, _ = TRAINING_OPERATOR(*leaves, None, None, *Geometry(4, 32, 64).arguments(0.125))
        found.append(torch.autograd.grad(out, leaves, grad_out))
        attend([x.detach() for x in leaves], Geometry(4, 32, 200))
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))
    assert_zeros_are_left()


ROUNDS = 20


def on_streams(streams, runs):
    """Each of ``runs`` on its stream, in every round, all at once: nothing waits before the end."""
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            # Until the host has queued all: the GPU gets through a launch sooner than the next one comes.
            torch.cuda._sleep(60_000_000)
    for index in range(ROUNDS):
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                run(index)
    torch.cuda.synchronize()


class IntoMemory:
    """A problem that is solved anew in each round, into memory that holds no result of another."""

    def __init__(self, qkv, geometry, want):
        self.qkv, self.geometry, self.want = qkv, geometry, want
        self.outs = [torch.full_like(want, float("nan")) for _ in range(ROUNDS)]

    def __call__(self, index):
        attend_into(*self.qkv, self.geometry, 0.125, self.outs[index])

    def right(self):
        return all(torch.equal(out, self.want) for out in self.outs)


def test_streams_that_run_at_once():
    """Kernels that run at once count their splits apart."""
    runs = [IntoMemory(*problem) for problem in (*problems(), *problems())]
    for run in runs:
        run(0)
    on_streams([torch.cuda.Stream() for _ in runs], runs)
    assert all(run.right() for run in runs)


@pytest.mark.parametrize("problem", range(len(MIXED)))
def test_graphs_that_are_replayed_beside_each_other_and_plain_calls(problem):
    """Captured on the very streams that plain calls use, and replayed on others."""
    qkv, geometry, want = problems()[problem]
    streams, graphs = [torch.cuda.Stream() for _ in range(3)], []
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    plain = IntoMemory(qkv, geometry, want)
    for stream, count in zip(streams, wrong, strict=False):
        with torch.cuda.stream(stream):
            plain(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outs = [attend(qkv, geometry) for _ in range(8)]
            for out in outs:
                count += (out != want).any()
                # No later replay finds the result of this one.
                out.fill_(float("nan"))
        graphs.append(graph)
    runs = [lambda _: graphs[0].replay(), lambda _: graphs[1].replay(), plain]
    # The plain calls where the first graph was captured, which itself is replayed elsewhere.
    on_streams([streams[2], streams[1], streams[0]], runs)
    assert plain.right()
    assert wrong.tolist() == [0, 0]
    del graphs[:], outs
    assert torch.equal(attend(qkv, geometry), want)
    assert_zeros_are_left()


def test_counters_outlive_the_pool_of_the_first_call():
    """A stream's first call may come while a graph is prepared, whose memory goes away."""
    qkv, geometry, want = problems()[1]
    stream = torch.cuda.Stream()
    pool = torch.cuda.MemPool()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):
        assert torch.equal(attend(qkv, geometry), want)
    torch.cuda.synchronize()
    del pool
    torch.cuda.empty_cache()
    filled = [torch.full((1 << 20,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    with torch.cuda.stream(stream):
        outs = [attend(qkv, geometry) for _ in range(20)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)
    assert all((x == -1).all() for x in filled)


def test_compiled_with_cuda_graphs_of_several_lengths():
    mixed = problems()[:3]
    operator = torch.ops.tmx.triangle_attention_triton
    compiled = torch.compile(
        lambda q, k, v, last: operator(q, k, v, None, None, 4, 32, last, 0.125) + 1, mode="reduce-overhead"
    )
    with torch.no_grad():
        for _ in range(4):
            for qkv, geometry, want in mixed:
                torch.compiler.cudagraph_mark_step_begin()
                assert torch.equal(compiled(*qkv, geometry.last).clone(), want + 1)
                assert torch.equal(attend(qkv, geometry), want)


def test_streams_and_threads_of_their_own():
    mixed, wrong = problems(), []

    def work(index):
        qkv, geometry, want = mixed[index % len(mixed)]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                outs = [attend(qkv, geometry) for _ in range(5)]
                if not all(torch.equal(out, want) for out in outs):
                    wrong.append(index)

    _in_threads(work, 8)
    assert wrong == []


def test_threads_on_one_stream():
    mixed, wrong = problems(), []

    def work(index):
        for step in range(60):
            qkv, geometry, want = mixed[(index + step) % len(mixed)]
            if not torch.equal(attend(qkv, geometry), want):
                wrong.append(index)

    _in_threads(work, 6)
    assert wrong == []
    assert_zeros_are_left()


def _in_threads(work, count):
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_thread_that_never_used_the_gpu():
    geometry, n, heads = CASES["last rows"]
    qkv = operands(n, heads)
    want, found = attend(qkv, geometry), []
    thread = threading.Thread(target=lambda: found.append(attend(qkv, geometry)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(found[0], want)
