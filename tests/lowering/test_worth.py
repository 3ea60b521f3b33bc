"""From which length on a prompt goes sparse, where dense kernels are fast."""

import json

import pytest
import torch

from benchmarks.common import RESULTS
from tests.support.layers import N, Stack, expected
from tests.support.oracle import attended
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.lowering.worth import break_even, least_for_width, least_length
from tmx_compile.mask.geometry import Geometry

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
WIDE = Geometry(64, 1024, 128)


@pytest.mark.parametrize("geometry", [(4, 8, 6), (20, 30, 10), (0, 0, 0), (3, 50, 0)], ids=str)
def test_break_even_is_where_half_of_the_pairs_are_left(geometry):
    def share(n):
        return float(attended(n, n, None, *geometry).sum()) / (n * (n + 1) / 2)

    n = break_even(Geometry(*geometry))
    assert share(n) <= 0.5
    assert n == 1 or share(n - 1) > 0.5
    assert share(2 * n) <= 0.5


def test_only_auto_on_cuda_waits_for_it():
    assert least_length("auto", CUDA, 2048, WIDE) == break_even(WIDE) - 1 > 4096
    assert least_length("auto", CUDA, 2048, Geometry(4, 32, 64)) == 2048
    assert least_length("triton", CUDA, 2048, WIDE) == 2048
    assert least_length("auto", CPU, 2048, WIDE) == 2048


def test_narrow_attention_waits_for_longer_prompts():
    """Work is pairs x query heads x head dim."""
    narrow, wide = (least_length("auto", CUDA, 2048, Geometry(4, 32, 64), width) for width in (576, 4096))
    assert narrow**2 / 2 * 576 <= 6e9 < (narrow + 1) ** 2 / 2 * 576
    assert wide == 2048
    assert least_length("auto", CUDA, 2048, Geometry(4, 32, 64), 4096, True) > wide
    assert least_length("auto", CUDA, 2048, WIDE, 4096) == break_even(WIDE) - 1
    assert least_length("triton", CUDA, 2048, Geometry(4, 32, 64), 576, True) == 2048
    assert least_length("auto", CPU, 2048, Geometry(4, 32, 64), 576, True) == 2048


@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamo_traces_the_width(dynamic, eager):
    def longer(query):
        return query + (query.shape[2] > least_for_width(query.shape[1] * query.shape[3], False))

    traced = torch.compile(longer, backend="eager", fullgraph=True, dynamic=dynamic)
    assert traced(torch.zeros(1, 9, 300, 64)).max() == 0
    assert traced(torch.zeros(1, 900, 600, 64)).max() == 1


def test_auto_lost_no_measured_case_that_it_takes():
    """The stored table of plain calls and CUDA graphs, forward alone and with backward."""
    records = json.loads((RESULTS / "short_prompts.json").read_text(encoding="utf-8"))["records"]
    cases = [x for x in records if x["pass"] in ("forward", "both")]
    taken = []
    for x in cases:
        width = x["heads"] * x["head_dim"]
        if x["n"] > least_length("auto", CUDA, 256, Geometry(*x["geometry"]), width, x["pass"] == "both"):
            taken.append(x)
    assert len(taken) > 200
    assert {x["pass"] for x in taken} == {"forward", "both"}
    assert [x for x in taken if min(x["speedup"], x["graph_speedup"]) < 1] == []
    # There is something to lose.
    assert any(x["speedup"] < 1 for x in cases if x not in taken)


CONFIG = TriangleMixConfig(4, 16, 8, triangle_layer_indices=[1], min_seq_len=100)
DENSE = TriangleMixConfig(4, 16, 8, triangle_layer_indices=[])
LIMIT = 300


@pytest.fixture
def limited(monkeypatch):
    """A machine whose dense kernels are the faster ones up to 300 tokens."""
    monkeypatch.setattr("tmx_compile.passes.judge.least_length", lambda *_: LIMIT)


def check(compiled, x):
    want = expected(x, CONFIG if x.shape[2] > LIMIT else DENSE)
    torch.testing.assert_close(compiled(x).double(), want, atol=1e-5, rtol=0)


def test_prompts_up_to_it_stay_dense_and_say_why(limited, eager):
    """One graph with both sides of the limit, whatever the length."""
    backend = tmx_backend(CONFIG)
    compiled = torch.compile(Stack(), backend=backend)
    for n in (250, 120, LIMIT, LIMIT + 1, 500, 350):
        x = torch.randn(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2)
        check(compiled, x)
    assert [site.reason for site in backend.report] == ["NOT_SELECTED", ""]
    assert list(backend.report)[1].detail == f"dense up to {LIMIT} tokens"
    torch._dynamo.reset()
    check(torch.compile(Stack(), backend=backend, dynamic=False), torch.randn(1, 2, 250, 16))
    last = list(backend.report)[-1]
    assert (last.reason, last.detail) == ("NOT_FASTER", f"up to {LIMIT} tokens")


def test_strict_mode_accepts_it(limited, eager):
    backend = tmx_backend(CONFIG, strict=True)
    check(torch.compile(Stack(), backend=backend, dynamic=False), torch.randn(1, 2, N, 16))
    assert [site.decision for site in backend.report] == ["dense", "dense"]


def test_a_short_prompt_is_still_called_short(limited, eager):
    backend = tmx_backend(CONFIG)
    check(torch.compile(Stack(), backend=backend, dynamic=False), torch.randn(1, 2, 100, 16))
    assert list(backend.report)[1].reason == "SHORT_PROMPT"


def test_a_range_across_it_picks_by_length(limited, eager):
    compiled = torch.compile(Stack(), backend=tmx_backend(CONFIG))
    for n in (400, 200, LIMIT + 1, LIMIT):
        x = torch.randn(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2, min=150, max=1000)
        check(compiled, x)
