"""Learned sinks and a softcap through every lowering that takes them, against float64 with both written out."""

from dataclasses import replace

import pytest
import torch

from tests.support.calls import LoweringBackend, OneCall
from tests.support.flex_eager import CudaFlexInEager
from tests.support.oracle import oracle
from tests.support.problems import SCORES, check_static, f64
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import ASCEND, BLOCKED, DECODE, DENSE, FLEX, OPERATOR, REFERENCE, TRITON
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Rejected

SINKS = [name for name, case in SCORES.items() if case.softcap is None]


def pairs(*lowerings):
    return [(low, name) for low, names in lowerings for name in names]


@pytest.mark.parametrize(
    ("lowering", "name"),
    pairs(
        (BLOCKED, SINKS),
        (REFERENCE, SCORES),
        (OPERATOR, SCORES),
        (TRITON, SCORES),
        (CudaFlexInEager(), [name for name in SCORES if "every" not in name]),
        (DECODE, ["both, one row"]),
    ),
    ids=lambda x: getattr(x, "name", x),
)
def test_emitted_graph(lowering, name):
    check_static(SCORES[name], lowering, inductor=False)


@pytest.mark.parametrize(
    ("lowering", "name"),
    pairs(
        (FLEX, ["softcap of Gemma 2, bfloat16", "softcap, padding on both sides"]), (BLOCKED, ["sinks, left padding"])
    ),
    ids=lambda x: getattr(x, "name", x),
)
def test_compiled(lowering, name):
    check_static(SCORES[name], lowering, inductor=True)


@pytest.mark.parametrize("lowering", [BLOCKED, REFERENCE, OPERATOR], ids=lambda low: low.name)
def test_float64_to_the_last_digits(lowering):
    check_static(replace(SCORES["sinks, holes and a reach"], dtype=f64), lowering, inductor=False)


@pytest.mark.parametrize(
    ("lowering", "name", "inductor"),
    [(BLOCKED, "sinks", True), (BLOCKED, "sinks, left padding", False), (OPERATOR, "both", True)],
    ids=lambda x: getattr(x, "name", x),
)
def test_gradients(lowering, name, inductor):
    case = SCORES[name]
    *qkv, key_mask = case.tensors(requires_grad=True)
    leaves = [*qkv, case.sink_logits(requires_grad=True)]
    call = torch.compile(OneCall(*case.one_call), backend=LoweringBackend(lowering, inductor), dynamic=False)
    out = call(*qkv, key_mask, leaves[3])
    weight = torch.randn_like(out)
    want, _ = oracle(*qkv, key_mask, *case.arguments, sink_logits=leaves[3], softcap=case.softcap)
    got = torch.autograd.grad(out, leaves, weight)
    for mine, theirs in zip(got, torch.autograd.grad(want, leaves, weight.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-4, rtol=1e-4)


def test_the_logits_of_a_layer_are_its_own():
    """What one layer's lowering wrote is copied for the next one, with that one's sinks."""

    class Layers(torch.nn.Module):
        def forward(self, q, k, v, sinks):
            for each in sinks:
                q = q + torch.ops.tmx.triangle_attention(q, k, v, None, 4, 20, 8, 0.25, None, each)[0]
            return q

    q, k, v, _ = SCORES["sinks"].tensors()
    sinks = torch.randn(3, 6) * 2
    with torch.no_grad():
        got = torch.compile(Layers(), backend=LoweringBackend(BLOCKED, inductor=False), dynamic=False)(q, k, v, sinks)
    for each in sinks:
        q = q + oracle(q, k, v, None, 4, 20, 8, 0.25, sink_logits=each)[0]
    torch.testing.assert_close(got.double(), q, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sink", [-float("inf"), -80.0, 80.0])
def test_sinks_that_take_all_or_nothing(sink):
    case = replace(SCORES["sinks, no valid key"], dtype=f64)
    *qkv, key_mask = case.tensors(requires_grad=True)
    logits = torch.full((case.heads,), sink, dtype=f64, requires_grad=True)
    out, _ = torch.ops.tmx.triangle_attention(*qkv, key_mask, *case.arguments, None, logits)
    want, _ = oracle(*qkv, key_mask, *case.arguments, sink_logits=None if sink == -float("inf") else logits)
    torch.testing.assert_close(out, want, atol=1e-11, rtol=0)
    grads = torch.autograd.grad(out.sum(), [*qkv, logits])
    assert all(bool(x.isfinite().all()) for x in grads)
    assert grads[3].abs().max() < 1e-12 or sink == 80.0


@pytest.mark.parametrize(
    ("lowering", "changes", "detail"),
    [
        (BLOCKED, dict(softcap=50.0), "blocked: SDPA has no softcap"),
        (
            FLEX,
            dict(sink_logits=torch.zeros(2)),
            "flex: learned sinks",
        ),
        (DENSE, dict(sink_logits=torch.zeros(2), softcap=50.0), "sdpa: learned sinks and a softcap"),
        (ASCEND, dict(softcap=50.0), "ascend: a softcap"),
        (ASCEND, dict(sink_logits=torch.zeros(2)), "ascend: learned sinks"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_refusals_have_reasons(lowering, changes, detail, monkeypatch):
    monkeypatch.setattr("tmx_compile.lowering.ascend.lowering.missing", lambda: "")
    x = torch.empty(1, 2, 64, 16, dtype=torch.float16 if lowering is ASCEND else torch.float32)
    answer = lowering.supports(AttentionCall(x, x, x, None, Geometry(4, 4, 4), 0.25, False, **changes))
    assert isinstance(answer, Rejected)
    assert answer.detail.startswith(detail)


def test_a_plain_call_has_the_graph_that_it_had():
    """Without sinks and softcap the operator's node ends with the scale, or the reach."""
    assert Geometry(4, 5, 6).arguments(0.25) == (4, 5, 6, 0.25)
    assert Geometry(4, 5, 6, 9).arguments(0.25) == (4, 5, 6, 0.25, 9)
    assert Geometry(4, 5, 6).arguments(0.25, softcap=50.0) == (4, 5, 6, 0.25, None, None, 50.0)
