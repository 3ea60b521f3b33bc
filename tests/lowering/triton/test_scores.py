"""Learned sinks and a softcap in the general kernel and the backward kernels, against float64.

In Triton's interpreter where there is no GPU; on one: ``python -m pytest tests/lowering/triton/test_scores.py -n 8``.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.calls import Case
from tests.support.gradients import worst_errors
from tests.support.oracle import oracle, tolerance
from tests.support.problems import SCORES, bf16, f16, f32
from tmx_compile.lowering.triton import launch, tuning
from tmx_compile.lowering.triton.lowering import extents
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR, TRITON_OPERATOR

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest number in a gradient. TF32 in three parts is not float32 to the last digit.
ERROR = {f32: 1e-3, f16: 5e-3, bf16: 4e-2}
CASES = {
    **SCORES,
    "softcap, half precision": Case(90, 90, 4, 20, 8, heads=4, kv_heads=2, dim=32, dtype=f16, softcap=1.5),
    "sinks, head dim 80": Case(90, 90, 4, 20, 8, heads=3, kv_heads=3, dim=80, dtype=f16, sinks=True),
}


def call(case):
    """The operator's arguments on the device, and what a gradient is asked of."""
    *qkv, key_mask = case.tensors(requires_grad=True, device=DEVICE)
    sinks = case.sink_logits(requires_grad=True, device=DEVICE)
    extent = None if key_mask is None else extents(key_mask, case.kv_len, case.last)
    arguments = (*qkv, key_mask, extent, *case.mask.arguments(case.scale, sinks, case.softcap))
    return arguments, qkv if sinks is None else [*qkv, sinks]


def reference(case, key_mask, leaves):
    """out, lse and the leaves that they come from, on the CPU in float64."""
    copies = [x.detach().cpu().double().requires_grad_() for x in leaves]
    learned = dict(sink_logits=copies[3] if case.sinks else None, softcap=case.softcap)
    return oracle(*copies[:3], None if key_mask is None else key_mask.cpu(), *case.arguments, **learned), copies


if DEVICE == "cuda":
    # The heads of the models that have these: other block shapes.
    CASES["sinks of gpt-oss"] = Case(600, 600, 4, 128, 64, heads=64, kv_heads=8, dim=64, dtype=bf16, sinks=True)
    CASES["softcap of Gemma 2's heads"] = Case(
        300, 300, 4, 64, 32, heads=4, kv_heads=2, dim=256, dtype=f16, softcap=9.0
    )
# The interpreter is slow.
UNFORESEEN = list(CASES) if DEVICE == "cuda" else ["both"]


@pytest.mark.parametrize(
    ("operator", "name"),
    [(TRAINING_OPERATOR, name) for name in CASES] + [(TRITON_OPERATOR, name) for name in UNFORESEEN],
    ids=lambda x: x if isinstance(x, str) else ["unforeseen", "foreseen"][x is TRAINING_OPERATOR],
)
def test_result_and_gradients(operator, name):
    case = CASES[name]
    arguments, leaves = call(case)
    (want, want_lse), copies = reference(case, arguments[3], leaves)
    seen, close = want_lse.isfinite(), max(2e-4, tolerance(case.dtype))
    grad_out = torch.randn(want.shape, dtype=case.dtype)
    if operator is TRAINING_OPERATOR:
        out, lse = operator(*arguments)
        grad_lse = torch.randn(lse.shape) * seen
        torch.testing.assert_close(lse.cpu().double()[seen], want_lse[seen], atol=close, rtol=0)
        got = torch.autograd.grad((out, lse), leaves, (grad_out.to(DEVICE), grad_lse.to(DEVICE)))
        loss = (want * grad_out.double()).sum() + (want_lse.masked_fill(~seen, 0.0) * grad_lse).sum()
    else:
        out = operator(*arguments)
        got = torch.autograd.grad(out, leaves, grad_out.to(DEVICE))
        loss = (want * grad_out.double()).sum()
    torch.testing.assert_close(out.cpu().double(), want, atol=close, rtol=0)
    expected = [x.nan_to_num(0.0) for x in torch.autograd.grad(loss, copies)]
    assert max(worst_errors([x.cpu() for x in got], expected)) < ERROR[case.dtype]


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_share_one_sink(splits, monkeypatch):
    """The parts of the last rows are merged first: the sink counts once."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    launch.forget()
    arguments, leaves = call(CASES["sinks"])
    (want, _), _ = reference(CASES["sinks"], None, leaves)
    torch.testing.assert_close(TRITON_OPERATOR(*arguments).detach().cpu().double(), want.detach(), atol=2e-4, rtol=0)
    launch.forget()


def test_logits_of_another_dtype_and_stride():
    case = replace(CASES["sinks, head dim 80"], dtype=f32, dim=16)
    arguments, leaves = call(case)
    (want, _), _ = reference(case, None, leaves)
    apart = torch.stack([leaves[3].detach().double()] * 2, 1)[:, 0]
    assert apart.stride() != (1,)
    with torch.no_grad():
        got = TRITON_OPERATOR(*arguments[:10], apart, None)
    torch.testing.assert_close(got.cpu().double(), want, atol=2e-4, rtol=0)


@pytest.mark.parametrize("operator", [TRAINING_OPERATOR, TRITON_OPERATOR], ids=["foreseen", "unforeseen"])
def test_opcheck(operator):
    case = Case(18, 20, 2, 5, 4, batch=2, valid=((3, 20), (0, 18)), sinks=True, softcap=1.5)
    arguments, _ = call(case)
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}
