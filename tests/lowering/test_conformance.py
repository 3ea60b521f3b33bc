"""The one suite that every lowering passes unchanged: the operator's numbers on every kind of problem.

Eager runs of the emitted graphs cover many problems; compiled runs cover what Inductor may get wrong. A lowering that
has no eager meaning (flex would form all scores) runs compiled only.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.oracle import oracle
from tests.support.problems import CASES, check, check_static, f32, f64
from tmx_compile.lowering.table import ASCEND, BLOCKED, FLEX, NAMED, OPERATOR, REFERENCE, TRITON
from tmx_compile.report import Rejected

# triton runs in Triton's interpreter here (conftest.py), compiled on a GPU in test_cuda.py, and there alone.
EAGER = [BLOCKED, REFERENCE, OPERATOR, *([] if torch.cuda.is_available() else [TRITON])]
# float64 has no CPU FlexAttention; everything else must pass compiled.
COMPILED = [FLEX, BLOCKED]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lowering", EAGER, ids=lambda low: low.name)
def test_emitted_graph(lowering, name):
    check_static(CASES[name], lowering, inductor=False)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lowering", COMPILED, ids=lambda low: low.name)
def test_compiled(lowering, name):
    check_static(CASES[name], lowering, inductor=True)


@pytest.mark.parametrize("name", ["no valid key", "left padding", "prime length", "more keys than rows"])
@pytest.mark.parametrize("lowering", [BLOCKED, REFERENCE, OPERATOR], ids=lambda low: low.name)
def test_float64_to_the_last_digits(lowering, name):
    check_static(replace(CASES[name], dtype=f64), lowering, inductor=False)


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("geometry", [(4, 32, 16), (70, 200, 100), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("lowering", [FLEX, BLOCKED, OPERATOR], ids=lambda low: low.name)
def test_one_compile_serves_every_length(lowering, geometry, valid):
    """Dynamic lengths: several, some shorter than the last rows and the window, through one compiled graph."""
    backend = LoweringBackend(lowering, inductor=True)
    compiled = torch.compile(OneCall(geometry, 0.25), backend=backend)
    for n in (300, 61, 777, 150, 64, 1030):
        ranges = ((n // 3, n), (0, n - n // 4)) if valid else None
        check(Case(n, n, *geometry, batch=2, heads=4, kv_heads=2, valid=ranges), compiled, dynamic=True)
    assert backend.compiles == 1


@pytest.mark.parametrize("lowering", [FLEX, BLOCKED], ids=lambda low: low.name)
def test_one_compile_serves_more_keys_than_rows(lowering):
    backend = LoweringBackend(lowering, inductor=True)
    compiled = torch.compile(OneCall((4, 32, 16), 0.25), backend=backend)
    for q_len, kv_len in ((300, 500), (61, 1000), (200, 230)):
        check(Case(q_len, kv_len, 4, 32, 16), compiled, dynamic=True)
    assert backend.compiles == 1


@pytest.mark.parametrize(
    "case", ["prime length", "left padding", "shorter than sinks and last", "holes", "no valid key"]
)
@pytest.mark.parametrize("inductor", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("lowering", [BLOCKED, OPERATOR], ids=lambda low: low.name)
def test_gradients(lowering, inductor, case):
    case = CASES[case]
    backend = LoweringBackend(lowering, inductor)
    *qkv, key_mask = case.tensors(requires_grad=True)
    out = torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False)(*qkv, key_mask)
    weight = torch.randn_like(out)
    want, _ = oracle(*qkv, key_mask, *case.arguments)
    got = torch.autograd.grad(out, qkv, weight)
    for mine, theirs in zip(got, torch.autograd.grad(want, qkv, weight.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-4, rtol=1e-4)


def test_the_suite_covers_every_named_lowering():
    # ascend takes no float32: test_ascend.py runs the same cases in its own dtypes, and in float32 by an opened door.
    assert set(NAMED.values()) == {*EAGER, *COMPILED, ASCEND}


@pytest.mark.parametrize(
    ("lowering", "changes", "reason"),
    [
        (FLEX, dict(dtype=f64), "float64 is not"),
        (FLEX, dict(needs_grad=True), "no backward"),
        (FLEX, dict(batch=0), "empty"),
        (FLEX, dict(last=5000, n=6000), "last=5000 is more than"),
        (BLOCKED, dict(window=5000, n=6000), "window=5000 is more than"),
        (BLOCKED, dict(sink=5000, n=6000), "sink=5000 is more than"),
        (BLOCKED, dict(last=5000, n=6000), "last=5000 is more than"),
        (REFERENCE, dict(n=6000), "a mask of 6000 x 6000 is too large"),
    ],
)
def test_refusals_have_reasons(lowering, changes, reason):
    from tmx_compile.lowering.base import AttentionCall
    from tmx_compile.mask.geometry import Geometry

    given = dict(batch=1, n=64, dtype=f32, sink=4, window=4, last=4, needs_grad=False) | changes
    x = torch.empty(given["batch"], 2, given["n"], 16, dtype=given["dtype"], device="cpu")
    geometry = Geometry(given["sink"], given["window"], given["last"])
    call = AttentionCall(x, x, x, None, geometry, 0.25, given["needs_grad"])
    answer = lowering.supports(call)
    assert isinstance(answer, Rejected)
    assert reason in answer.detail
