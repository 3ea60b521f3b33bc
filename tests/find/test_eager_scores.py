"""Learned sinks and a softcap in attention written out: found and computed, and every near miss refused."""

import pytest
import torch

from tests.support.eager_forms import AOT, CONFIG, KV, SCALE, B, D, H, N, R, additive, masked, repeat_kv, tensors
from tests.support.graphs import found_in, squares
from tests.support.layers import OneLayer
from tests.support.oracle import oracle
from tmx_compile import tmx_backend
from tmx_compile.find import find_attention
from tmx_compile.find.site import AttentionSite
from tmx_compile.report import Reason, Rejected

CAP = 1.5


def sunk(scores, sinks):
    """Scores with a column of (H,) sinks behind the keys."""
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)], -1)


def capped(scores, cap=CAP):
    return torch.tanh(scores / cap) * cap


def gpt_oss(q, k, v, sinks):
    scores = sunk(q @ repeat_kv(k).mT * SCALE + additive(q), sinks)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1, dtype=scores.dtype)[..., :-1].to(v.dtype) @ repeat_kv(v)


def grouped(q, k, v, sinks):
    """By the model's authors: heads by groups, and the sinks with them."""
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.unflatten(1, (KV, R)), k) * SCALE + additive(q)[:, :, None]
    column = sinks.reshape(KV, R, 1, 1).expand(-1, -1, scores.shape[3], -1)
    weights = torch.cat([scores, column[None].expand(scores.shape[0], -1, -1, -1, -1)], -1).softmax(-1).narrow(-1, 0, N)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).reshape(q.shape)


def gemma(q, k, v, sinks):
    return (capped(q @ repeat_kv(k).mT * SCALE) + additive(q)).softmax(-1) @ repeat_kv(v) + 0 * sinks.sum()


def in_other_words(q, k, v, sinks):
    """Both at once, in place, with the scale on the queries and a sink in double precision."""
    scores = ((q * (SCALE / CAP)) @ repeat_kv(k).mT).tanh_().mul_(CAP)
    scores = torch.cat((masked(scores, q).double(), sinks.double()[:, None, None].expand(B, H, N, 1)), dim=3)
    return scores.softmax(3)[:, :, :, :N].to(v.dtype) @ repeat_kv(v)


FORMS = {
    "gpt-oss": (gpt_oss, True, None),
    "grouped": (grouped, True, None),
    "Gemma 2": (gemma, False, CAP),
    "in other words": (in_other_words, True, CAP),
}


def operands():
    return *tensors(KV), torch.randn(H) * 2


@pytest.mark.parametrize("name", FORMS)
def test_forms(name, eager):
    call, has_sinks, softcap = FORMS[name]
    q, k, v, sinks = operands()
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    got = torch.compile(OneLayer(call), backend=backend)(q, k, v, sinks)
    learned = dict(sink_logits=sinks if has_sinks else None, softcap=softcap)
    torch.testing.assert_close(
        got.double(), oracle(q, k, v, None, *CONFIG.geometry.counts, SCALE, **learned)[0], **CLOSE
    )
    torch.testing.assert_close(
        call(q, k, v, sinks).double(), oracle(q, k, v, None, 0, 0, N, SCALE, **learned)[0], **CLOSE
    )
    assert [site.decision for site in backend.report] == ["triangle"]
    assert squares(eager[-1], N) == []


CLOSE = dict(atol=2e-5, rtol=0)


@pytest.mark.parametrize("how", AOT)
@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 2"])
def test_aten_forms(how, name):
    call, has_sinks, softcap = FORMS[name]
    gm, _ = AOT[how](call, operands())
    (site,) = find_attention(gm)
    assert isinstance(site, AttentionSite), site
    assert (site.sink_logits is not None, site.softcap) == (has_sinks, softcap)
    assert site.scale == pytest.approx(SCALE)


def test_a_dynamic_length(eager):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)

    def packed(qkv, sinks):
        return gpt_oss(*qkv.split([H, KV, KV], 1), sinks)

    compiled = torch.compile(OneLayer(packed), backend=backend)
    for n in (N, N + 13):
        qkv, sinks = torch.randn(B, H + 2 * KV, n, D), torch.randn(H)
        torch._dynamo.mark_dynamic(qkv, 2)
        want, _ = oracle(*qkv.split([H, KV, KV], 1), None, *CONFIG.geometry.counts, SCALE, sink_logits=sinks)
        torch.testing.assert_close(compiled(qkv, sinks).double(), want, **CLOSE)
    assert backend.report.graphs == 1


def form(change, weigh=lambda w: w[..., :-1]):
    """A form that differs in what it does to the scaled product, given the sinks."""

    def call(q, k, v, sinks):
        return weigh(change(q @ repeat_kv(k).mT * SCALE, q, sinks).softmax(-1)) @ repeat_kv(v)

    return call


def kept(w):
    return w


REFUSED = {
    "joined in front": form(lambda s, q, sinks: sunk(masked(s, q), sinks).flip(-1)),
    "the first column dropped": form(lambda s, q, sinks: sunk(masked(s, q), sinks), lambda w: w[..., 1:]),
    "joined to shifted scores": form(lambda s, q, sinks: sunk((m := masked(s, q)) - m.amax(-1, keepdim=True), sinks)),
    "scaled with the scores": form(lambda s, q, sinks: sunk(masked(s, q), sinks) * 2.0),
    "masked with the scores": form(
        lambda s, q, sinks: sunk(s, sinks).masked_fill(~torch.ones(N, N + 1, dtype=torch.bool).tril(), -float("inf"))
    ),
    "a mask subtracted from both": form(lambda s, q, sinks: sunk(masked(s, q), sinks) - sinks.sum()),
    "sinks of the rows": form(lambda s, q, sinks: torch.cat([masked(s, q), q[..., :1]], -1)),
    "one for all heads": form(lambda s, q, sinks: torch.cat([masked(s, q), sinks[0].expand(B, H, N, 1)], -1)),
    "two columns": form(lambda s, q, sinks: torch.cat([masked(s, q), q[..., :2]], -1), lambda w: w[..., :-2]),
    "joined twice": form(lambda s, q, sinks: sunk(sunk(masked(s, q), sinks), sinks), lambda w: w[..., :-2]),
    "capped behind the mask": form(lambda s, q, sinks: capped(masked(s, q)), kept),
    "capped twice": form(lambda s, q, sinks: masked(capped(capped(s)), q), kept),
    "capped by a negative number": form(lambda s, q, sinks: masked(-2.0 * torch.tanh(s), q), kept),
    "a cap from the data": form(lambda s, q, sinks: masked(torch.tanh(s) * q.std(), q), kept),
    "capped behind a shift": form(lambda s, q, sinks: masked(capped(s - s.amax(-1, keepdim=True)), q), kept),
    "capped with its sinks": form(lambda s, q, sinks: capped(sunk(masked(s, q), sinks))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, eager):
    found = found_in(REFUSED[name], *operands())
    assert isinstance(found, Rejected), found
    assert found.reason in (Reason.SCORE_CHANGED, Reason.SCALE)


def test_sinks_that_are_not_dropped(eager):
    """Values with a row for the sink are the keys of another problem."""

    def call(q, k, v, sinks):
        v = torch.cat([repeat_kv(v), torch.zeros(B, H, 1, D)], 2)
        return sunk(masked(q @ repeat_kv(k).mT * SCALE, q), sinks).softmax(-1) @ v

    assert isinstance(found_in(call, *operands()), Rejected)
