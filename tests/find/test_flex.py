"""FlexAttention: what makes a site, and what its mask_mod is read as."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, flex_attention, or_masks

from tests.support.flex_calls import (
    CONFIG,
    FIRST_KEY,
    PADDING,
    B,
    D,
    N,
    attend,
    block_mask,
    causal,
    check,
    tensors,
    triangle,
)
from tests.support.graphs import found_in
from tests.support.layers import Call, OneLayer
from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import explain, tmx_backend
from tmx_compile.find.site import AttentionSite
from tmx_compile.report import Reason, Rejected

WINDOW = 40


def reason_of(call, *args):
    """Why the call stays as it is; its numbers are its own."""
    backend = tmx_backend(CONFIG, lowering="operator")
    out = torch.compile(OneLayer(call), backend=backend, dynamic=False)(*args)
    torch.testing.assert_close(out, call(*args), atol=1e-5, rtol=0)
    (site,) = backend.report
    assert site.decision == "dense"
    return site.reason


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """Uncompiled flex_attention warns that it is slow; the tensors are tiny."""


# Masks --------------------------------------------------------------------------------------------------------------


def padded(b, h, row, key):
    return (key <= row) & PADDING[b, key]


def not_padded_by_start(b, h, row, key):
    return (key <= row) & (key >= FIRST_KEY[b])


CAUSAL = {
    "row >= key": causal,
    "a difference": lambda b, h, row, key: row - key > -1,
    "not later": lambda b, h, row, key: ~(key > row),
    "both moved by a constant": lambda b, h, row, key: (row + 7) >= (key + 7),
    "and_masks": and_masks(causal, lambda b, h, row, key: key >= 0),
    "or_masks": or_masks(causal, lambda b, h, row, key: key < 0),
    "where": lambda b, h, row, key: torch.where(key > row, False, True),
    "logical functions": lambda b, h, row, key: torch.logical_and(torch.ge(row, key), torch.ones_like(row) > 0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name, dynamic, eager):
    q, k, v = tensors()
    out = triangle(attend, (q, k, v, block_mask(CAUSAL[name])), dynamic=dynamic)
    check(out, q, k, v)
    assert not any("flex" in str(node.target) for node in eager[-1].graph.nodes)


PADDED = {
    "a bool tensor": padded,
    "a number tensor": lambda b, h, row, key: (key <= row) & (PADDING.long()[b, key] != 0),
    "one index after another": lambda b, h, row, key: (key <= row) & PADDING[b][key],
    "a 4-d tensor": lambda b, h, row, key: (key <= row) & PADDING[:, None, None][b, 0, 0, key],
    "row and key": lambda b, h, row, key: (key <= row) & PADDING[b, row] & PADDING[b, key],
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PADDED)
def test_causal_and_padding(name, dynamic, eager):
    q, k, v = tensors()
    out = triangle(attend, (q, k, v, block_mask(PADDED[name], batch=B)), dynamic=dynamic)
    check(out, q, k, v, PADDING)


def test_the_first_valid_key_of_each_sequence(eager):
    q, k, v = tensors()
    out = triangle(attend, (q, k, v, block_mask(not_padded_by_start, batch=B)))
    check(out, q, k, v, torch.arange(N) >= FIRST_KEY[:, None])


def test_a_sliding_window(eager):
    q, k, v = tensors()
    mod = and_masks(causal, lambda b, h, row, key: row - key < WINDOW)
    check(triangle(attend, (q, k, v, block_mask(mod))), q, k, v, reach=WINDOW - 1)


def test_documents(eager):
    """Each document by itself: what the operator gives for it alone."""
    q, k, v = tensors()
    document = torch.zeros(B, N, dtype=torch.int64)
    document[0, 70:] = 1
    document[1, 30:100] = 4
    document[1, 100:] = 9

    def mod(b, h, row, key):
        return (row >= key) & (document[b, row] == document[b, key])

    out = triangle(attend, (q, k, v, block_mask(mod, batch=B)))
    for b, cuts in enumerate(([0, 70, N], [0, 30, 100, N])):
        for start, end in pairwise(cuts):
            part = [x[b : b + 1, :, start:end] for x in (q, k, v)]
            check(out[b : b + 1, :, start:end], *part)


def test_more_keys_than_rows(eager):
    q, k, v = tensors(60, N)
    offset = N - 60

    def mod(b, h, row, key):
        return row + offset >= key

    check(triangle(attend, (q, k, v, block_mask(mod, 60, N))), q, k, v)


def test_rows_from_key_zero_on(eager):
    """Rows stand at the first keys: later keys are attended by nobody."""
    q, k, v = tensors(60, N)
    check(triangle(attend, (q, k, v, block_mask(causal, 60, N))), q, k[:, :, :60], v[:, :, :60])


@pytest.mark.parametrize(
    ("block", "separate"), [(128, True), ((32, 64), True), (48, False), (32, False), (512, True)], ids=str
)
def test_blocks(block, separate, eager):
    q, k, v = tensors()
    mask = block_mask(padded, batch=B, BLOCK_SIZE=block, separate_full_blocks=separate)
    check(triangle(attend, (q, k, v, mask)), q, k, v, PADDING)


def test_a_block_mask_made_in_the_graph(eager):
    def call(q, k, v):
        return attend(q, k, v, block_mask(causal, q.shape[2], k.shape[2]))

    q, k, v = tensors()
    check(triangle(call, (q, k, v)), q, k, v)


# Other arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [0.3, -0.5])
def test_the_scale(scale, dynamic, eager):
    q, k, v = tensors()

    def call(q, k, v, mask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=scale)

    check(triangle(call, (q, k, v, block_mask(causal)), dynamic=dynamic), q, k, v, scale=scale)


@pytest.mark.parametrize(
    ("mod", "factor", "softcap"),
    [
        (lambda score, b, h, row, key: score, 1, None),
        (lambda score, b, h, row, key: score * 2.0, 2, None),
        (lambda score, b, h, row, key: 3 * (score / 2), 1.5, None),
        (lambda score, b, h, row, key: 2.0 * torch.tanh(score / 2.0), 1, 2.0),
        (lambda score, b, h, row, key: torch.tanh(score * 3.0) / 0.5, 6.0, 2.0),
    ],
)
def test_a_score_mod_that_is_a_factor_and_a_softcap(mod, factor, softcap, eager):
    q, k, v = tensors()

    def call(q, k, v, mask):
        return flex_attention(q, k, v, score_mod=mod, block_mask=mask, enable_gqa=True)

    check(triangle(call, (q, k, v, block_mask(causal))), q, k, v, scale=factor * D**-0.5, softcap=softcap)


SCORES = {
    "a softcap of a softcap": lambda score, b, h, row, key: 20 * torch.tanh(torch.tanh(score) / 20),
    "a softcap turned": lambda score, b, h, row, key: -20 * torch.tanh(score / 20),
    "a softcap moved": lambda score, b, h, row, key: 20 * torch.tanh(score / 20) + 1,
    "a bias": lambda score, b, h, row, key: score - 0.1 * (row - key),
    "a mask": lambda score, b, h, row, key: torch.where(row - key < 30, score, -float("inf")),
    "by head": lambda score, b, h, row, key: score * h,
    "squared": lambda score, b, h, row, key: score * score,
    "divided by it": lambda score, b, h, row, key: 1 / (score + 2),
}


@pytest.mark.parametrize("name", SCORES)
def test_other_score_mods(name, eager):
    q, k, v = tensors()

    def call(q, k, v, mask):
        return flex_attention(q, k, v, score_mod=SCORES[name], block_mask=mask, enable_gqa=True)

    found = found_in(call, q, k, v, block_mask(causal))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.SCORE_CHANGED
    torch._dynamo.reset()
    report = explain(OneLayer(call), q, k, v, block_mask(causal), config=CONFIG)
    assert [(site.layer, site.decision, site.reason) for site in report] == [(0, "dense", "SCORE_CHANGED")]


def test_the_log_sum_exp_is_used(eager):
    def call(q, k, v, mask):
        out, lse = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)
        return out * lse[..., None]

    assert reason_of(call, *tensors(), block_mask(causal)) == Reason.WEIGHTS_USED.name


def test_the_log_sum_exp_is_returned_and_not_used(eager):
    def call(q, k, v, mask):
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_lse=True)[0]

    q, k, v = tensors()
    check(triangle(call, (q, k, v, block_mask(causal))), q, k, v)


@pytest.mark.parametrize(
    ("mod", "reason"),
    [
        (lambda b, h, row, key: key >= row, Reason.NOT_CAUSAL),
        (lambda b, h, row, key: key <= row + 1, Reason.NOT_CAUSAL),
        (lambda b, h, row, key: (key <= row) | (key < 5), Reason.NOT_CAUSAL),
        (lambda b, h, row, key: (key <= row) & ((row - key) % 2 == 0), Reason.MASK_UNKNOWN),
        (lambda b, h, row, key: (key <= row) & (h >= key), Reason.NOT_CAUSAL),
        (lambda b, h, row, key: (key <= row) & (torch.abs(row - key) < 9), Reason.MASK_UNKNOWN),
        (lambda b, h, row, key: (key <= row) & PADDING[b, row], Reason.MASK_UNKNOWN),
        (lambda b, h, row, key: (key <= row) & PADDING[b, row - key], Reason.MASK_UNKNOWN),
        (lambda b, h, row, key: (key <= row) & PADDING[b, (row + key) // 2], Reason.MASK_UNKNOWN),
        (lambda b, h, row, key: FIRST_KEY[b] <= key, Reason.NOT_CAUSAL),
        (lambda b, h, row, key: PADDING.long()[b, key] <= PADDING.long()[b, row], Reason.MASK_UNKNOWN),
    ],
)
def test_other_masks(mod, reason):
    found = found_in(attend, *tensors(), block_mask(causal, batch=B))
    assert isinstance(found, AttentionSite)
    torch._dynamo.reset()
    mask = block_mask(causal, batch=B)
    mask.mask_mod = mod
    report = explain(OneLayer(attend), *tensors(), mask, config=CONFIG)
    assert [site.reason for site in report] == [reason.name]


def test_no_block_mask(eager):
    def call(q, k, v):
        return flex_attention(q, k, v, enable_gqa=True)

    assert reason_of(call, *tensors()) == Reason.NOT_CAUSAL.name


def test_another_batch_for_keys(eager):
    def call(q, k, v, mask):
        return flex_attention(q, k[:1], v[:1], block_mask=mask, enable_gqa=True)

    found = found_in(call, *tensors(), block_mask(causal, batch=B))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.LAYOUT


def test_other_layers_keep_flex_attention(eager):
    """Nothing is gained by another kernel where the layer stays dense: the user's choice stands, without a check."""
    config = CONFIG.replace(triangle_layer_indices=[1])

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Call(attend), Call(attend)])

        def forward(self, q, k, v, mask):
            return self.layers[0](q, k, v, mask) + self.layers[1](q, k, v, mask)

    args = (*tensors(), block_mask(causal))
    backend = tmx_backend(config, lowering="operator", strict=True)
    torch.compile(Two(), backend=backend)(*args)
    assert [(site.decision, site.lowering) for site in backend.report] == [
        ("dense", "as written"),
        ("triangle", "operator"),
    ]
    names = [str(node.target) for node in eager[-1].graph.nodes]
    assert sum(name == "flex_attention" for name in names) == 1


# Hugging Face -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_hugging_face(padding, eager):
    ids = torch.randint(0, 128, (B, N))
    attention_mask = torch.ones(B, N, dtype=torch.int64)
    if padding == "left":
        attention_mask[0, :37] = 0
    if padding == "right":
        attention_mask[1, 120:] = 0
    model = tiny_qwen3(2, "flex_attention")
    config = CONFIG.replace(triangle_layer_indices=[1])
    want = masked_oracle(tiny_qwen3(2), config, ids, attention_mask)
    backend = tmx_backend(config, lowering="operator", strict=True)
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(ids, attention_mask=attention_mask).logits
    valid = attention_mask.bool()
    torch.testing.assert_close(got.double()[valid], want[valid], atol=2e-4, rtol=0)
    assert [(site.layer, site.decision) for site in backend.report] == [(0, "dense"), (1, "triangle")]
