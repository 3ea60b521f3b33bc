"""Masks of buffers whose values are known, and of a buffer that is written in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.masked import CONFIG, INF, N, check, expected, keys, model_with, rows, tensors
from tmx_compile import explain, tmx_backend
from tmx_compile.errors import TriangleMixError
from tmx_compile.report import Reason


class Buffered(nn.Module):
    """A mask cut out of a buffer, as older models keep it; rows from ``start``, keys from 0."""

    def __init__(self, mask, start=0):
        super().__init__()
        self.register_buffer("mask", mask)
        self.start = start

    def forward(self, q, k):
        rows = torch.arange(self.start, self.start + q.shape[2])
        return self.mask[..., rows, : k.shape[2]] if self.mask.dim() == 2 else self.mask[:, :, rows, : k.shape[2]]


lower = torch.ones(400, 400, dtype=torch.bool).tril()
BUFFERS = {
    "tril": lower,
    "tril of GPT-2": lower[None, None],
    "additive": torch.zeros(400, 400).masked_fill(~lower, INF),
    "triu of finfo.min": torch.full((400, 400), torch.finfo().min).triu(1)[None, None],
    "windowed": lower.triu(-20),
}


@pytest.mark.parametrize("start", [0, 100])
@pytest.mark.parametrize("name", [name for name in BUFFERS if name != "windowed"])
def test_a_buffer_is_read_by_its_values(name, start, eager):
    check(Buffered(BUFFERS[name], start), tensors(300), eager=eager, first=start)


def test_a_buffer_of_no_simple_rule_stays_unknown(eager):
    for mask in (BUFFERS["windowed"], lower ^ (torch.rand(400, 400) < 0.1)):
        (site,) = explain(model_with(Buffered(mask)), *tensors(), config=CONFIG)
        assert site.reason == Reason.MASK_UNKNOWN.name


def test_a_changed_buffer_fails_loudly_and_the_same_again_does_not(eager):
    mask_of = Buffered(lower.clone())
    model = torch.compile(model_with(mask_of), backend=tmx_backend(CONFIG, lowering="operator", strict=True))
    args = tensors()
    want = model(*args)
    mask_of.mask.copy_(lower)
    assert torch.equal(model(*args), want)
    mask_of.mask[3, 200] = True
    with pytest.raises(TriangleMixError, match="mask_ has changed since the model was compiled"):
        model(*args)


class Advancing(nn.Module):
    """A static cache that counts its tokens: the mask is built from the count before the count is raised."""

    def __init__(self, late=False):
        super().__init__()
        self.late = late
        self.layers = nn.ModuleList([nn.Identity()])
        self.layers[0].forward = self.attend

    def attend(self, q, k, v, count):
        if self.late:
            count.add_(q.shape[2])
        mask = keys(k) <= rows(q) + count
        if not self.late:
            count.add_(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def forward(self, *args):
        return self.layers[0](*args)


@pytest.mark.parametrize("late", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("first", [0, 40])
def test_a_count_that_is_raised_before_or_after_the_mask_was_built(first, late, eager):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    model, args, count = torch.compile(Advancing(late), backend=backend), tensors(300), torch.tensor(first)
    got = model(*args, count)
    first += N if late else 0
    mask = keys(args[1]) <= rows(args[0], first)
    torch.testing.assert_close(got.double(), expected(*args, mask, first), atol=2e-5, rtol=0)
    assert count == (first if late else first + N)
