"""Attention written out that stays as it is, each with its reason; and products and softmaxes that are no attention."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.eager_forms import INF, SCALE, additive, causal, masked, merged, tensors
from tests.support.graphs import found_in
from tests.support.layers import CONFIG, Stack, check_dense, qkv
from tmx_compile import tmx_backend
from tmx_compile.find import find_attention
from tmx_compile.report import Reason
from tmx_compile.testing import captured_graphs


def attention(change=lambda s, q: s, weigh=lambda w, q: w, scale=SCALE):
    """Causal attention with something else done to its scores or weights; on one tensor, as ``Stack`` calls it."""

    def attend(x):
        q, k, v = qkv(x)
        weights = change((q @ k.mT * scale).masked_fill(~causal(q), -1e9), q).softmax(-1)
        return weigh(weights, q) @ v

    return attend


def slopes(x):
    return torch.tensor([0.5, 0.25])[:, None, None] * torch.arange(x.shape[2])


def sinks(x):
    q, k, v = qkv(x)
    scores = masked(q @ k.mT * SCALE, q)
    scores = torch.cat([scores, torch.zeros(1, 1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return scores.softmax(-1)[..., :-1] @ v


def written_before(x):
    """What is written lies in a copy: the tensor below it is not the query."""
    q, k, v = qkv(x)
    q = q.clone()
    q.mul_(3.0)
    return masked(q @ k.mT, q).softmax(-1) @ v


def constant_written(x):
    number = torch.full((1,), 2.0)
    number.view(-1).fill_(3.0)
    return masked(x @ x.mT / number, x).softmax(-1) @ x


def set_item(x):
    q, k, v = qkv(x)
    scores = q @ k.mT
    scores[:, :, ~causal(q)] = -INF
    return scores.softmax(-1) @ v


def folded_group(x):
    """Both heads as rows of one."""
    rows = x.reshape(1, 1, 2 * N_ROWS, 16)
    scores = (rows @ x[:, :1].mT).view(1, 2, N_ROWS, N_ROWS)
    return masked(scores, x).softmax(-1).view(1, 1, -1, N_ROWS).matmul(x[:, :1]).view(x.shape)


def no_gradient(x):
    q, k, v = qkv(x)
    scores = masked(q @ k.mT, q)
    with torch.no_grad():
        weights = scores.softmax(-1)
    return weights @ v


def alibi_of_bloom(x):
    q, k, v = qkv(x)
    bias = slopes(x)[None].expand(x.shape[0], -1, -1, -1).reshape(-1, 1, x.shape[2])
    scores = bias.baddbmm(batch1=merged(q), batch2=merged(k).mT, beta=1.0, alpha=SCALE)
    return torch.bmm(masked(scores.view(*x.shape[:3], -1), x).softmax(-1).view(scores.shape), merged(v)).view(x.shape)


def transposed_weights(x):
    q, k, v = qkv(x)
    return masked(q @ k.mT, q).softmax(-1).mT @ v


def last_product_adds(x):
    q, k, v = qkv(x)
    weights = merged(masked(q @ k.mT, q).softmax(-1))
    return torch.baddbmm(merged(v), weights, merged(v)).view(x.shape)


def wide_scores(x):
    q, k, v = qkv(x.double())
    return x + (masked(q @ k.mT, q).softmax(-1).float() @ v.float())


REFUSED = {
    "an encoder": (lambda x: (x @ x.mT * SCALE).softmax(-1) @ x, Reason.NOT_CAUSAL),
    "softmax over the rows": (lambda x: F.softmax(masked(x @ x.mT, x), dim=2) @ x, Reason.FORM),
    "softmax over the heads": (lambda x: F.softmax((x @ x.mT).masked_fill(~causal(x), -1e9), 1) @ x, Reason.FORM),
    "an inner gradient mode": (no_gradient, Reason.FORM),
    "wider scores": (wide_scores, Reason.FORM),
    "one head": (
        lambda x: (torch.where(causal(x), x[0] @ x[0].mT, -INF).softmax(-1) @ x[0])[None],
        Reason.LAYOUT,
    ),
    "a group folded into rows": (folded_group, Reason.LAYOUT),
    "transposed weights": (transposed_weights, Reason.LAYOUT),
    "keys of one batch for all": (
        lambda x: masked(x.expand(2, -1, -1, -1) @ x.mT, x).softmax(-1).matmul(x)[:1],
        Reason.LAYOUT,
    ),
    "dropout": (attention(weigh=lambda w, q: F.dropout(w, 0.3)), Reason.DROPOUT),
    "dropout of the scores": (attention(lambda s, q: F.dropout(s, 0.3)), Reason.DROPOUT),
    "a scale from the data": (lambda x: masked(x @ x.mT / x.std(), x).softmax(-1) @ x, Reason.SCALE),
    "two scales from the data": (lambda x: masked(x @ x.mT * x.std() * x.mean(), x).softmax(-1) @ x, Reason.SCALE),
    "a scale for each head": (
        lambda x: masked(x @ x.mT * torch.tensor([1.0, 2.0])[:, None, None], x).softmax(-1) @ x,
        Reason.SCALE,
    ),
    "masked before a scale from the data": (attention(lambda s, q: s * q.std()), Reason.SCALE),
    "softcap": (attention(lambda s, q: torch.tanh(s / 50) * 50), Reason.SCORE_CHANGED),
    "clamped": (attention(lambda s, q: s.clamp(min=-1e4)), Reason.SCORE_CHANGED),
    "the mask's sign turned": (attention(lambda s, q: -s), Reason.SCORE_CHANGED),
    "squared": (attention(lambda s, q: s * s), Reason.SCORE_CHANGED),
    "a number added": (attention(lambda s, q: s + 1.0), Reason.SCORE_CHANGED),
    "added twice": (attention(lambda s, q: torch.add(s, additive(q), alpha=2)), Reason.SCORE_CHANGED),
    "subtracted from": (attention(lambda s, q: torch.zeros(()) - s), Reason.SCORE_CHANGED),
    "multiplied by a mask": (attention(lambda s, q: s * causal(q)), Reason.SCORE_CHANGED),
    "masked by itself": (attention(lambda s, q: s.tril()), Reason.SCORE_CHANGED),
    "reversed": (attention(lambda s, q: s.flip(-1)), Reason.SCORE_CHANGED),
    "divided with rounding": (
        attention(lambda s, q: torch.div(s, 0.1, rounding_mode="floor")),
        Reason.SCORE_CHANGED,
    ),
    "a divisor": (attention(lambda s, q: 1.0 / s), Reason.SCORE_CHANGED),
    "sinks": (sinks, Reason.SCORE_CHANGED),
    "masked after the softmax": (attention(weigh=lambda w, q: w * causal(q)), Reason.SCORE_CHANGED),
    "filled after the softmax": (attention(weigh=lambda w, q: w.masked_fill(causal(q), 0.0)), Reason.SCORE_CHANGED),
    "scaled after the softmax": (attention(weigh=lambda w, q: w / 2), Reason.SCORE_CHANGED),
    "normalised again": (attention(weigh=lambda w, q: w / w.sum(-1, keepdim=True)), Reason.SCORE_CHANGED),
    "rounded after the softmax": (attention(weigh=lambda w, q: w.round()), Reason.SCORE_CHANGED),
    "the last product adds": (last_product_adds, Reason.SCORE_CHANGED),
    "weights added to the result": (attention(weigh=lambda w, q: w + 0 * w.sum()), Reason.SCORE_CHANGED),
    "ALiBi": (attention(lambda s, q: s - slopes(q)), Reason.FLOAT_BIAS),
    "ALiBi by baddbmm": (alibi_of_bloom, Reason.FLOAT_BIAS),
    "a bool added": (attention(lambda s, q: s + causal(q)), Reason.FLOAT_BIAS),
    "a mask subtracted": (
        lambda x: (x @ x.mT - torch.where(causal(x), 0.0, INF)).softmax(-1) @ x,
        Reason.FLOAT_BIAS,
    ),
    "a small fill": (lambda x: (x @ x.mT).masked_fill(~causal(x), -100.0).softmax(-1) @ x, Reason.FLOAT_BIAS),
    "a fill made small": (
        lambda x: ((x @ x.mT).masked_fill(~causal(x), -2e4) * SCALE).softmax(-1) @ x,
        Reason.FLOAT_BIAS,
    ),
    "a fill from the data": (lambda x: torch.where(causal(x), x @ x.mT, x.min()).softmax(-1) @ x, Reason.MASK_UNKNOWN),
    "written item by item": (set_item, Reason.WRITTEN_IN_PLACE),
    "an operand written before": (written_before, Reason.WRITTEN_IN_PLACE),
    "a constant written": (constant_written, Reason.WRITTEN_IN_PLACE),
}
N_ROWS = 150


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, eager):
    attend, reason = REFUSED[name]
    report = check_dense(Stack(attend), reason, torch.randn(1, 2, N_ROWS, 16))
    assert len(report) == 2
    if name == "sinks":
        assert "sinks" in report.sites[1].detail


class Returned(Stack):
    """The second layer's weights, or scores, come back beside the result."""

    def __init__(self, attend):
        super().__init__(attend)

    def forward(self, x):
        beside = []
        for layer in self.layers:
            y, other = layer.attend(x)
            x = x + y
            beside.append(other)
        return torch.cat([x.flatten(), *(other.flatten() for other in beside)])


def both(what):
    def attend(x):
        q, k, v = qkv(x)
        scores = masked(q @ k.mT * SCALE, q)
        weights = scores.softmax(-1)
        return weights @ v, {"weights": weights, "scores": scores, "maximum": scores.amax(-1)}[what]

    return attend


@pytest.mark.parametrize("what", ["weights", "scores", "maximum"])
def test_what_is_used_beside_the_result(what, eager):
    backend = tmx_backend(CONFIG)
    model, x = Returned(both(what)), torch.randn(1, 2, N_ROWS, 16)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), atol=0, rtol=0)
    assert {site.reason for site in backend.report} == {Reason.WEIGHTS_USED.name}


def softmax_pooling(x):
    weights = (x @ torch.ones(16, 3)).softmax(2)
    return weights.mT @ x


OTHERS = {
    "a router": lambda x: torch.einsum(
        "bhne,hed->bhnd", F.softmax(F.linear(x, torch.ones(4, 16)), -1), torch.ones(2, 4, 16)
    ),
    "a square router": lambda x: F.softmax(F.linear(x, torch.ones(16, 16)), -1) @ torch.ones(1, 2, 16, 16),
    "a learned mixture": lambda x: torch.softmax(torch.ones(1, 2, 150, 150), -1) @ x,
    "pooling": softmax_pooling,
    "vocabulary": lambda x: F.log_softmax(x @ torch.ones(16, 50), -1),
    "no softmax": lambda x: (x @ x.mT).tril() @ x,
    "sigmoid attention": lambda x: masked(x @ x.mT, x).sigmoid() @ x,
    "softmax of the values": lambda x: (x @ x.mT) @ x.softmax(-1),
    "codebook": lambda x: F.softmax(x[0, 0] @ torch.ones(16, 7), -1) @ torch.ones(7, 16),
    "products without a batch": lambda x: torch.einsum("bnd,esd->bnes", x[0], x[0]).softmax(-1) @ torch.ones(150, 16),
    "dropout alone": lambda x: F.dropout(x.softmax(-1), 0.0) @ torch.ones(1, 2, 16, 16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention(name):
    (gm,) = captured_graphs(OTHERS[name], torch.randn(1, 2, 150, 16))
    assert list(find_attention(gm)) == []


def test_a_graph_without_shapes():
    assert list(find_attention(torch.fx.symbolic_trace(lambda q, k: (q @ k.mT).softmax(-1) @ k))) == []


def test_a_scale_that_is_no_number():
    """Its result is no number either, so it is only asked for."""
    answer = found_in(lambda x: masked(x @ x.mT / 0.0, x).softmax(-1) @ x, tensors()[0])
    assert answer.reason is Reason.SCALE
