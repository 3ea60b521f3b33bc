"""Attention written out: every way of writing it is found and computed, everything else is refused with its reason."""

import pytest
import torch
from torch import nn

from tests.support.eager_forms import (
    CONFIG,
    FORMS,
    INF,
    KV,
    SCALE,
    B,
    D,
    H,
    N,
    causal,
    gpt_j,
    hugging_face,
    masked,
    positions,
    tensors,
    with_scores,
)
from tests.support.graphs import found_in, squares
from tests.support.layers import OneLayer
from tests.support.oracle import oracle, tolerance
from tmx_compile import tmx_backend
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.nodes import value_of
from tmx_compile.operator import OPERATOR


def check(call, args, graphs, want, *, key_heads, atol=2e-5, dynamic=False):
    """The rewritten call gives the oracle's numbers, reads unrepeated keys, and forms no scores."""
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    out = torch.compile(OneLayer(call), backend=backend, dynamic=dynamic)(*args)
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    (node,) = [node for node in graphs[-1].graph.nodes if node.target is OPERATOR]
    assert value_of(node.args[1]).shape[1] == key_heads
    if not dynamic:
        assert squares(graphs[-1], N) == []
    assert [site.decision for site in backend.report] == ["triangle"]


def dense(q, k, v, scale=SCALE):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.double().mT * scale).masked_fill(~causal(q), -INF)
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, eager):
    call, kv_heads = FORMS[name]
    q, k, v = tensors(kv_heads)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)
    torch.testing.assert_close(call(q, k, v).double(), dense(q, k, v), atol=1e-5, rtol=0)
    check(call, (q, k, v), eager, want, key_heads=kv_heads)


def at_any_length(name):
    """Forms with the sizes of their tensors in the place of constants, on one packed tensor."""
    call, kv_heads = FORMS[name]

    def packed(qkv):
        return call(*qkv.split([H, kv_heads, kv_heads], 1))

    return packed, kv_heads


@pytest.mark.parametrize("name", ["hugging face", "grouped by einsum", "bmm", "in place", "one key head by broadcast"])
def test_forms_with_a_dynamic_length(name, eager):
    """The numbers of rows and keys are one symbol: one graph for all lengths."""
    call, kv_heads = at_any_length(name)
    compiled = torch.compile(OneLayer(call), backend=tmx_backend(CONFIG, lowering="operator", strict=True))
    for n in (N, N + 7, N + 30):
        qkv = torch.randn(B, H + 2 * kv_heads, n, D)
        torch._dynamo.mark_dynamic(qkv, 2)
        out = compiled(qkv)
        want, _ = oracle(*qkv.split([H, kv_heads, kv_heads], 1), None, *CONFIG.geometry.counts, SCALE)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert len(eager) == 1
    (node,) = [node for node in eager[0].graph.nodes if node.target is OPERATOR]
    assert isinstance(value_of(node.args[1]).shape[2], torch.SymInt)
    assert value_of(node.args[1]).shape[1] == kv_heads


# What is said of a site -----------------------------------------------------------------------------------------------


def test_scale_masks_and_factor():
    """Exact bookkeeping: what comes later multiplies what came before, fills included."""

    def call(q, k, v, factor, bias):
        scores = (q * 0.5) @ (k / 4).mT * factor + bias
        scores = torch.where(causal(q), scores * 3, -2e4) / 0.5 - bias
        scores = scores.masked_fill(positions(q), -7.0)
        return (scores.softmax(-1) @ v).permute(2, 0, 1, 3)

    site = found_in(call, *tensors(), torch.tensor(0.3), torch.randn(N, N))
    assert isinstance(site, AttentionSite), site
    assert site.scale == pytest.approx(0.5 / 4 * 3 / 0.5)
    assert site.factor.name == "l_factor_"
    masks = [(part.how, part.number) for part in site.masks]
    assert masks == [("add", 6.0), ("keep", -4e4), ("add", -1.0), ("drop", -7.0)]
    assert (site.is_causal, site.form, site.result_order) == (False, "eager", None)
    assert [x.node.name for x in (site.query, site.key, site.value)] == ["l_q_", "l_k_", "l_v_"]


def test_the_order_of_the_result():
    def call(q, k, v):
        return torch.einsum("bhqk,bhkd->qbdh", masked(q @ k.mT, q).softmax(-1), v)

    site = found_in(call, *tensors())
    assert site.result_order == (2, 0, 3, 1)
    assert site.scale == 1.0


def test_no_mask_is_an_encoder():
    site = found_in(lambda q, k, v: (q @ k.mT * SCALE).softmax(-1) @ v, *tensors())
    assert (site.masks, site.is_causal) == ((), False)


def test_a_value_of_another_width(eager):
    q, k, v = tensors(v_dim=5)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)
    check(with_scores(lambda q, k: masked(q @ k.mT * SCALE, q)), (q, k, v), eager, want, key_heads=H)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("call", [hugging_face, gpt_j], ids=["hugging face", "GPT-J"])
def test_dtypes(call, dtype, eager):
    if call is gpt_j and dtype == torch.float64:
        dtype = torch.float32
    kv_heads = KV if call is hugging_face else H
    q, k, v = tensors(kv_heads, dtype=dtype)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)
    check(call, (q, k, v), eager, want, key_heads=kv_heads, atol=tolerance(dtype))
    (node,) = [node for node in eager[-1].graph.nodes if node.target is OPERATOR]
    # Casts up are not kept: nothing is lost by reading the tensors themselves.
    assert [value_of(arg).dtype for arg in node.args[:3]] == [dtype] * 3


def test_autocast(eager):
    q, k, v = tensors()
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(OneLayer(FORMS["masked_fill"][0]), backend=backend)(q, k, v)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=tolerance(torch.bfloat16), rtol=0)


@pytest.mark.parametrize("scale", [SCALE, 0.7])
def test_a_scale_that_tracing_lifts(scale, eager):
    """dynamic=True makes a float attribute a symbol: it is read with a guard."""

    class Attention(nn.Module):
        scaling = 0.3

        def forward(self, q, k, v):
            return masked(q @ k.mT * self.scaling, q).softmax(-1) @ v

    model, args = OneLayer(None), tensors()
    model.layers[0] = Attention()
    compiled = torch.compile(model, backend=tmx_backend(CONFIG, lowering="operator", strict=True), dynamic=True)
    for again in (scale, 0.11):
        model.layers[0].scaling = again
        want, _ = oracle(*args, None, *CONFIG.geometry.counts, again)
        torch.testing.assert_close(compiled(*args).double(), want, atol=2e-5, rtol=0)


def test_gradients(eager):
    q, k, v = (x.requires_grad_() for x in tensors(KV))
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    torch.compile(OneLayer(hugging_face), backend=backend)(q, k, v).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE)[0].square().sum().backward()
    for mine, x in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, x.grad, atol=2e-4, rtol=1e-3)
