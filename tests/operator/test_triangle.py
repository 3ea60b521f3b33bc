"""The operator: numbers and gradients against float64, opcheck, errors, linear memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.calls import Case
from tests.support.oracle import oracle, tolerance
from tests.support.problems import SHORT, cases
from tmx_compile import triangle_attention
from tmx_compile.operator import kernel


def run(case, *tensors):
    sink, window, last = case.geometry
    counts = dict(sink=sink, window=window, last=last, scale=case.scale, reach=case.reach, softcap=case.softcap)
    return triangle_attention(*tensors[:4], **counts, sink_logits=tensors[4] if len(tensors) == 5 else None)


@given(cases(**SHORT), st.sampled_from([200, 5000, 1 << 22]))
@settings(max_examples=60, deadline=None)
def test_forward_and_gradients_against_float64(case, budget):
    # Small score budgets make many row blocks out of few rows, so that every border between blocks is exercised.
    before, kernel.SCORE_BUDGET = kernel.SCORE_BUDGET, budget
    try:
        *qkv, key_mask = case.tensors(requires_grad=True)
        sinks = case.sink_logits(requires_grad=True)
        out, lse = run(case, *qkv, key_mask, sinks)
        want, want_lse = oracle(*qkv, key_mask, *case.arguments, sink_logits=sinks, softcap=case.softcap)
        torch.testing.assert_close(out, want, atol=1e-11, rtol=0)
        torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-6)
        seen = torch.isfinite(want_lse)
        weight, lse_weight = torch.randn_like(out), torch.randn_like(want_lse) * seen
        got_loss = (out * weight).sum() + (lse.masked_fill(~seen, 0) * lse_weight).sum()
        want_loss = (want * weight).sum() + (want_lse.masked_fill(~seen, 0) * lse_weight).sum()
        leaves = qkv if sinks is None else [*qkv, sinks]
        got = torch.autograd.grad(got_loss, leaves)
        # The lse is returned in float32, and so is its gradient.
        for mine, theirs in zip(got, torch.autograd.grad(want_loss, leaves), strict=True):
            torch.testing.assert_close(mine, theirs.nan_to_num(0.0), atol=1e-5, rtol=1e-5)
    finally:
        kernel.SCORE_BUDGET = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_float32(dtype):
    case = Case(300, 300, 4, 32, 16, batch=2, heads=6, kv_heads=2, dim=64, dtype=dtype)
    *qkv, key_mask = case.tensors()
    out, _ = run(case, *qkv, key_mask)
    assert out.dtype == dtype
    want, _ = oracle(*qkv, key_mask, *case.arguments)
    torch.testing.assert_close(out.double(), want, atol=tolerance(dtype), rtol=0)


def test_a_row_without_keys_is_zero_and_its_lse_minus_infinity():
    case = Case(6, 6, 0, 1, 1, valid=((2, 4),))
    out, lse = run(case, *case.tensors())
    assert out[:, :, [0, 1, 5]].abs().max() == 0
    assert (lse[:, :, [0, 1, 5]] == float("-inf")).all()
    # Row 4 stands behind the last valid key, which its window still reaches.
    assert torch.isfinite(lse[:, :, 2:5]).all()


def test_a_sequence_without_valid_keys_is_zero():
    case = Case(5, 5, 2, 2, 2, batch=2, valid=((0, 5), (0, 0)))
    out, lse = run(case, *case.tensors())
    assert out[1].abs().max() == 0
    assert (lse[1] == float("-inf")).all()


@pytest.mark.parametrize("kind", ["plain", "padded", "documents", "reach", "scores"])
def test_opcheck(kind):
    changes = {"padded": {"valid": ((3, 48), (0, 40))}, "documents": {"documents": True}, "reach": {"reach": 20}}
    changes["scores"] = {"sinks": True, "softcap": 1.5, "valid": ((3, 48), (0, 0))}
    case = Case(40, 48, 2, 5, 7, batch=2, heads=4, kv_heads=2, **changes.get(kind, {}))
    *qkv, key_mask = case.tensors(requires_grad=True)
    arguments = case.mask.arguments(case.scale, case.sink_logits(requires_grad=True), case.softcap)
    results = torch.library.opcheck(torch.ops.tmx.triangle_attention, (*qkv, key_mask, *arguments))
    assert set(results.values()) == {"SUCCESS"}


def test_fake_kernel_keeps_symbolic_sizes():
    seen = []

    def backend(gm, example_inputs):
        seen.extend(n.meta["example_value"] for n in gm.graph.nodes if "triangle" in str(n.target))
        return gm.forward

    def call(q, k, v):
        return triangle_attention(q, k, v, sink=1, window=2, last=3)[0]

    compiled = torch.compile(call, backend=backend, dynamic=True, fullgraph=True)
    for n in (40, 50, 60):
        compiled(*Case(n, n, 0, 0, 0).tensors()[:3])
    ((out, lse),) = seen
    assert isinstance(out.shape[2], torch.SymInt)
    assert isinstance(lse.shape[2], torch.SymInt)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.zeros(2, 8, 4)), r"query must be \(batch, heads, tokens, head_dim\), got shape \(2, 8, 4\)"),
        (dict(q=torch.zeros(1, 2, 8, 4, dtype=torch.int64)), "query must be a floating point tensor, got torch.int64"),
        (
            dict(k=torch.zeros(1, 2, 8, 4, dtype=torch.float64)),
            "key must have query's dtype torch.float32",
        ),
        (dict(k=torch.zeros(1, 2, 8, 4, device="meta")), "key must be on query's device cpu, got meta"),
        (dict(k=torch.zeros(1, 2, 8, 5)), "key must have query's head_dim 4, got 5"),
        (dict(q=torch.zeros(1, 3, 8, 4)), "key heads must divide query heads, got 2 and 3"),
        (dict(q=torch.zeros(1, 2, 9, 4)), "query must not have more tokens than key, got 9 and 8"),
        (dict(v=torch.zeros(1, 2, 7, 4)), "share the batch"),
        (dict(m=torch.zeros(1, 8)), "key_mask must be bool"),
        (
            dict(m=torch.zeros(2, 8, dtype=torch.bool)),
            r"key_mask must be \(batch, kv tokens\) = \(1, 8\), got",
        ),
        (dict(sink=-1), "sink must not be negative, got -1"),
        (dict(window=-2), "window must not be negative, got -2"),
        (dict(last=-3), "last must not be negative, got -3"),
        (dict(sinks=torch.zeros(3)), r"sink_logits must be \(query heads,\) = \(2,\), got shape \(3,\)"),
        (dict(sinks=torch.zeros(1, 2)), r"sink_logits must be \(query heads,\) = \(2,\), got shape \(1, 2\)"),
        (dict(sinks=torch.zeros(2, dtype=torch.int32)), "sink_logits must be a floating point tensor, got torch.int32"),
        (dict(sinks=torch.zeros(2, device="meta")), "sink_logits must be on query's device cpu, got meta"),
        (dict(softcap=0.0), "softcap must be positive and finite, or None, got 0.0"),
        (dict(softcap=float("inf")), "softcap must be positive and finite, or None, got inf"),
    ],
)
def test_bad_arguments_name_themselves(changes, message):
    x = torch.zeros(1, 2, 8, 4)
    given = dict(q=x, k=x, v=x, m=None, sink=1, window=1, last=1) | changes
    with pytest.raises(ValueError, match=message):
        triangle_attention(
            given["q"],
            given["k"],
            given["v"],
            given["m"],
            sink=given["sink"],
            window=given["window"],
            last=given["last"],
            sink_logits=given.get("sinks"),
            softcap=given.get("softcap"),
        )


def test_batch_of_zero():
    q = torch.zeros(0, 2, 8, 4)
    out, lse = triangle_attention(q, q, q, sink=1, window=1, last=1)
    assert out.shape == (0, 2, 8, 4)
    assert lse.shape == (0, 2, 8)


_LONG = """
import resource, sys, torch
from tmx_compile import triangle_attention
n = int(sys.argv[1])
q, k, v = (torch.randn(1, h, n, 64, requires_grad=True) for h in (4, 2, 2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out, lse = triangle_attention(q, k, v, sink=8, window=512, last=128)
(out.sum() + lse.sum()).backward()
i = n - 200  # a streaming row against the definition, in float64
keys = [j for j in range(i + 1) if j < 8 or i - j <= 512]
s = (q[0, 3, i].double() @ k[0, 1, keys].double().T) / 8
assert torch.allclose(torch.softmax(s, 0) @ v[0, 1, keys].double(), out[0, 3, i].double(), atol=1e-5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_linear_at_65536_tokens():
    """Forward and backward at 65,536 tokens: N x N scores of one head would take 17 GB."""
    peaks = {}
    for n in (16384, 65536):
        run = subprocess.run([sys.executable, "-c", _LONG, str(n)], capture_output=True, text=True, check=True)
        peaks[n] = int(run.stdout) / 1024
    # Inputs, output and gradients at 65,536 are 64 + 2 * 32 MiB and as much again, plus float32 accumulators.
    assert peaks[65536] < 700, peaks
    assert peaks[65536] < 8 * max(peaks[16384], 60), peaks
