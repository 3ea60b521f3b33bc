"""The sums over the Middle section of one call, and what goes back, against attention maps written out in float64."""

import pytest
import torch

from tests.support.calls import Case
from tests.support.memory import Largest
from tests.support.oracle import attended
from tmx_compile.analysis.capture import sections
from tmx_compile.analysis.capture.sections import AttentionInputs, RecordMiddle, middle_output, middle_sums
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import ALL_ROWS

CASES = {
    "plain": Case(40, 40, 2, 5, 7),
    "grouped": Case(40, 40, 2, 5, 7, batch=2, heads=6, kv_heads=2, dim=8, v_dim=12),
    "bfloat16": Case(40, 40, 2, 5, 7, dtype=torch.bfloat16),
    "padding": Case(40, 40, 2, 5, 7, batch=3, valid=((5, 40), (0, 33), (40, 40))),
    "holes": Case(48, 48, 1, 4, 5, batch=2, valid=((5, 48), (0, 40)), holes=True),
    "more keys": Case(30, 50, 2, 5, 7),
    "reach": Case(40, 40, 2, 5, 7, reach=15),
    "documents": Case(60, 60, 2, 3, 4, batch=2, documents=True, holes=True),
    "no window": Case(33, 33, 0, 0, 0),
    "strided": Case(40, 40, 2, 5, 7, heads=4, kv_heads=2, strided=True),
}


def explicit(case, tensors):
    """The oracle: the four sums per sequence and head, the cells, and the gradients of query, key and value."""
    q, k, v, key_mask, d_out = tensors
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = case.heads // case.kv_heads
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    dense = attended(case.q_len, case.kv_len, key_mask, 0, 0, case.kv_len, case.reach)
    kept = attended(case.q_len, case.kv_len, key_mask, *case.geometry, case.reach)
    middle = (dense & ~kept)[:, None]
    alive = dense.any(-1)[:, None, :, None]
    scores = (q @ keys.transpose(2, 3) * case.scale).masked_fill(~dense[:, None], float("-inf"))
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    gate = torch.ones_like(weights, requires_grad=True)
    before = torch.ones_like(weights, requires_grad=True)
    again = weights * before
    again = again / again.sum(-1, keepdim=True).masked_fill(~alive, 1.0)
    found = [
        torch.autograd.grad((x @ values * d_out.double()).sum(), gates, retain_graph=True)[0] * middle
        for x, gates in ((weights * gate, gate), (again, before))
    ]
    sums = torch.stack([f(x).sum((2, 3)) for x in found for f in (lambda x: x, torch.abs)])
    grads = torch.autograd.grad((weights @ values * d_out.double()).sum(), (q, k, v))
    return sums, middle.sum((1, 2, 3)).expand(q.shape[0]), grads


def problem(case):
    torch.manual_seed(3)
    q, k, v, key_mask = case.tensors()
    return q, k, v, key_mask, torch.randn(*q.shape[:3], v.shape[3], dtype=q.dtype)


@pytest.mark.parametrize("budget", [1 << 21, 1], ids=["one block", "small blocks"])
@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_are_those_of_explicit_maps(monkeypatch, name, budget):
    monkeypatch.setattr(sections, "SCORE_BUDGET", budget)
    case = CASES[name]
    q, k, v, key_mask, d_out = problem(case)
    inputs = AttentionInputs(q, k, v, key_mask, case.scale, case.reach)
    out = inputs.dense()
    found, grads = middle_sums(inputs, Geometry(*case.geometry), out, d_out)
    sums, cells, expected = explicit(case, (q, k, v, key_mask, d_out))
    assert cells.sum() > 0
    assert torch.equal(found.cells, cells)
    tolerance = dict(rtol=3e-2, atol=0.5) if case.dtype == torch.bfloat16 else dict(rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(found.sums, sums, **tolerance)
    for got, want, x in zip(grads, expected, (q, k, v), strict=True):
        assert got.dtype == x.dtype
        torch.testing.assert_close(got.double(), want, **tolerance)
    assert middle_sums(inputs, Geometry(*case.geometry), out, d_out, gradients=False)[1] == (None, None, None)


@pytest.mark.parametrize("name", ["plain", "grouped", "padding", "more keys", "reach", "documents"])
def test_signed_sums_follow_from_two_log_sum_exps(name):
    case = CASES[name]
    q, k, v, key_mask, d_out = problem(case)
    inputs = AttentionInputs(q, k, v, key_mask, case.scale, case.reach)
    middle, share = middle_output(inputs, Geometry(*case.geometry))
    out = inputs.triangle(Geometry(0, 0, ALL_ROWS))[0]
    sums = explicit(case, (q, k, v, key_mask, d_out))[0]
    signed = (middle * d_out).sum((2, 3)).double()
    torch.testing.assert_close(signed, sums[0], rtol=2e-4, atol=2e-4)
    again = ((middle - share[..., None] * out) * d_out).sum((2, 3)).double()
    torch.testing.assert_close(again, sums[2], rtol=2e-4, atol=2e-4)


def test_the_function_is_dense_attention_and_records_once():
    case = CASES["grouped"]
    q, k, v, key_mask, d_out = problem(case)
    recorded = []
    gate = torch.zeros((), requires_grad=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    rest = (case.scale, None, None, None, recorded.append)
    out = RecordMiddle.apply(gate, *leaves, key_mask, Geometry(*case.geometry), *rest)
    torch.testing.assert_close(out, AttentionInputs(q, k, v, key_mask, case.scale, None).dense())
    assert recorded == []
    grads = torch.autograd.grad(out, (gate, *leaves), d_out)
    sums, _, expected = explicit(case, (q, k, v, key_mask, d_out))
    (found,) = recorded
    torch.testing.assert_close(found.sums, sums, rtol=2e-4, atol=2e-4)
    for got, want in zip(grads[1:], expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


def test_no_score_matrix_is_ever_whole():
    n = 6144
    q, k, v, d_out = (torch.randn(1, 1, n, 8) for _ in range(4))
    inputs = AttentionInputs(q, k, v, None, 1.0, None)
    out = inputs.dense()
    with Largest() as largest:
        middle_sums(inputs, Geometry(4, 32, 64), out, d_out)
    assert largest.elements <= sections.SCORE_BUDGET < n * n / 16
