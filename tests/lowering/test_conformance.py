"""The one suite that every lowering passes unchanged: the operator's numbers on every kind of problem.

Eager runs of the emitted graphs cover many problems; compiled runs cover what Inductor may get wrong. A lowering that
has no eager meaning (flex would form all scores) runs compiled only.
"""

import pytest
import torch
from support import Case, LoweringBackend, OneCall, oracle, tolerance

from tmx_compile.lowering.table import ASCEND, BLOCKED, FLEX, NAMED, OPERATOR, REFERENCE, TRITON
from tmx_compile.report import Rejected

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

CASES = {
    "one token": Case(1, 1, 4, 32, 64),
    "two tokens": Case(2, 2, 1, 0, 0),
    "prime length": Case(331, 331, 4, 32, 16, heads=6, kv_heads=2),
    "no sinks": Case(200, 200, 0, 17, 5),
    "no last rows": Case(200, 200, 3, 17, 0),
    "own key only": Case(130, 130, 0, 0, 0),
    "sinks beyond the end": Case(70, 70, 500, 3, 2),
    "window beyond the end": Case(70, 70, 2, 500, 2),
    "last rows beyond the end": Case(70, 70, 2, 3, 500),
    "everything beyond the end": Case(2, 2, 9, 9, 9),
    "huge counts": Case(65, 65, 2**31 - 1, 2**31 - 1, 2**31 - 1),
    "window of many blocks": Case(700, 700, 8, 256, 32),
    "sinks across a block border": Case(300, 300, 70, 10, 8),
    "multi-query": Case(150, 150, 4, 20, 8, heads=5, kv_heads=1),
    "batch": Case(129, 129, 4, 20, 8, batch=3, heads=4, kv_heads=4),
    "head dim 8": Case(100, 100, 4, 20, 8, dim=8),
    "head dim 80": Case(100, 100, 4, 20, 8, dim=80),
    "odd head dim": Case(100, 100, 4, 20, 8, dim=33),
    "head dim 256": Case(100, 100, 4, 20, 8, dim=256),
    "value dim differs": Case(100, 100, 4, 20, 8, dim=24, v_dim=16),
    "bfloat16": Case(257, 257, 4, 32, 16, heads=6, kv_heads=2, dim=64, dtype=bf16),
    "float16": Case(257, 257, 4, 32, 16, heads=6, kv_heads=2, dim=64, dtype=f16),
    "more keys than rows": Case(90, 240, 4, 20, 8),
    "one row, many keys": Case(1, 240, 4, 20, 0),
    "strided": Case(200, 200, 4, 20, 8, heads=4, kv_heads=2, strided=True),
    "left padding": Case(200, 200, 4, 20, 8, batch=3, valid=((0, 200), (60, 200), (199, 200))),
    "right padding": Case(200, 200, 4, 20, 8, batch=3, valid=((0, 200), (0, 130), (0, 1))),
    "padding on both sides": Case(200, 200, 40, 20, 30, batch=2, valid=((67, 140), (3, 150))),
    "shorter than sinks and last": Case(200, 200, 40, 20, 30, batch=2, valid=((190, 200), (100, 105))),
    "no valid key": Case(100, 100, 4, 20, 8, batch=2, valid=((0, 100), (0, 0))),
    "holes": Case(200, 200, 10, 20, 8, batch=2, valid=((10, 190), (0, 200)), holes=True),
    "holes, own key only": Case(100, 100, 0, 0, 0, batch=1, valid=((5, 100),), holes=True),
    "padding and more keys than rows": Case(90, 240, 4, 20, 8, batch=2, valid=((0, 240), (150, 240))),
    "padding, bfloat16": Case(200, 200, 4, 20, 8, batch=2, valid=((0, 200), (60, 200)), dtype=bf16),
    "a window of the layer's own": Case(200, 200, 4, 20, 8, heads=4, kv_heads=2, reach=50),
    "a reach of two blocks, no last rows": Case(300, 300, 70, 20, 0, reach=128),
    "a reach inside the last rows": Case(200, 200, 4, 20, 100, reach=30),
    "padding and a reach": Case(200, 200, 10, 20, 30, batch=2, valid=((0, 200), (60, 190)), holes=True, reach=70),
    "more keys than rows and a reach": Case(90, 240, 40, 20, 8, reach=110),
    "right padding, window beyond the end": Case(120, 120, 4, 500, 8, batch=2, valid=((0, 120), (0, 70))),
    "right padding, last rows beyond the end": Case(90, 90, 2, 3, 500, batch=3, valid=((0, 90), (5, 60), (0, 1))),
    "right padding, all rows are last rows": Case(90, 90, 0, 0, 2**31 - 1, batch=2, valid=((0, 90), (5, 60))),
    "rows behind the keys": Case(40, 130, 4, 50, 8, batch=3, valid=((0, 130), (7, 80), (0, 95)), holes=True),
    "padding, multi-query": Case(150, 150, 4, 20, 8, batch=2, heads=4, valid=((20, 150), (0, 90))),
}
# triton runs in Triton's interpreter here (conftest.py), compiled on a GPU in test_cuda.py.
EAGER = [BLOCKED, REFERENCE, OPERATOR, TRITON]
# float64 has no CPU FlexAttention; everything else must pass compiled.
COMPILED = [FLEX, BLOCKED]


def check(case, compiled, tol=None, dynamic=False):
    *qkv, key_mask = case.tensors()
    if dynamic:
        for x, dim in ((qkv[0], 2), (qkv[1], 2), (qkv[2], 2), (key_mask, 1)):
            if x is not None:
                torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        out = compiled(*qkv, key_mask)
    want, _ = oracle(*qkv, key_mask, *case.arguments)
    assert out.shape == want.shape
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), want, atol=tol or tolerance(case.dtype), rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lowering", EAGER, ids=lambda low: low.name)
def test_emitted_graph(lowering, name):
    case = CASES[name]
    backend = LoweringBackend(lowering, inductor=False)
    check(case, torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lowering", COMPILED, ids=lambda low: low.name)
def test_compiled(lowering, name):
    case = CASES[name]
    backend = LoweringBackend(lowering, inductor=True)
    check(case, torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False))


@pytest.mark.parametrize("name", ["no valid key", "left padding", "prime length", "more keys than rows"])
@pytest.mark.parametrize("lowering", [BLOCKED, REFERENCE, OPERATOR], ids=lambda low: low.name)
def test_float64_to_the_last_digits(lowering, name):
    from dataclasses import replace

    case = replace(CASES[name], dtype=f64)
    backend = LoweringBackend(lowering, inductor=False)
    check(case, torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False))


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
