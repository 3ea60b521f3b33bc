"""Exported programs with a cache in buffers that they write, as ExecuTorch exports them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tmx_compile import TriangleMixConfig, rewrite
from tmx_compile.report import Reason

N, ROOM = 150, 400
CONFIG = TriangleMixConfig(triangle_layer_indices=[0, 1], sliding_window_size=4000, min_seq_len=100)


def begin(position, tokens):
    """The first position as a number of the graph."""
    first = position[0].item()
    torch._check_is_size(first)
    torch._check(first < ROOM - tokens)
    return first


def index_put(held, position, new):
    held[:, :, position] = new


def index_copy(held, position, new):
    held.index_copy_(2, position, new)


def narrow(held, position, new):
    held.narrow(2, begin(position, new.shape[2]), new.shape[2]).copy_(new)


def by_index(layer, position, tokens):
    return layer.causal[None, None, position]


def by_narrow(layer, position, tokens):
    return layer.causal.narrow(0, begin(position, tokens), tokens)


def by_comparison(layer, position, tokens):
    return (torch.arange(ROOM) <= position[:, None])[None, None]


class Layer(nn.Module):
    def __init__(self, write, mask_of, persistent):
        super().__init__()
        self.write, self.mask_of = write, mask_of
        self.register_buffer("keys", torch.zeros(1, 2, ROOM, 16))
        self.register_buffer("values", torch.zeros(1, 2, ROOM, 16))
        causal = torch.ones(ROOM, ROOM, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=persistent)
        self.project = nn.Linear(32, 96)

    def forward(self, x, position):
        b, n, d = x.shape
        q, k, v = (y.view(b, n, 2, 16).transpose(1, 2) for y in self.project(x).chunk(3, -1))
        self.write(self.keys, position, k)
        self.write(self.values, position, v)
        mask = self.mask_of(self, position, n)
        out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return x + out.transpose(1, 2).reshape(b, n, d)


class Model(nn.Module):
    def __init__(self, write, mask_of, persistent=False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(write, mask_of, persistent) for _ in range(2))

    def forward(self, x, position):
        for layer in self.layers:
            x = layer(x, position)
        return x


def rewritten(model, decompose, **options):
    """The program, and its rewriting with the report."""
    args = torch.randn(1, N, 32), torch.arange(N)
    with torch.no_grad():
        program = torch.export.export(model.eval(), args, strict=False)
        if decompose:
            program = program.run_decompositions({})
        return program, *rewrite(program, CONFIG, lowering="operator", **options)


@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize(
    ("write", "mask_of", "promised"),
    [
        (index_put, by_index, True),
        (index_copy, by_comparison, True),
        (index_put, by_narrow, False),
        (narrow, by_narrow, False),
    ],
)
def test_a_program_with_a_cache_goes_sparse(write, mask_of, promised, decompose):
    model = Model(write, mask_of)
    program, done, report = rewritten(model, decompose, assume_causal=promised)
    assert [site.decision for site in report] == ["triangle", "triangle"]
    mine, theirs = done.module(), program.module()
    with torch.no_grad():
        for first in (0, N):
            x, position = torch.randn(1, N, 32), torch.arange(first, first + N)
            want = theirs(x, position)
            torch.testing.assert_close(mine(x, position), want, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(model(x, position), want, atol=2e-5, rtol=1e-5)
    for name, value in theirs.named_buffers():
        torch.testing.assert_close(dict(mine.named_buffers())[name], value, atol=2e-5, rtol=1e-5)


def test_a_mask_that_may_be_loaded_anew_is_not_relied_on():
    _, _, report = rewritten(Model(index_put, by_narrow, persistent=True), decompose=True)
    assert [site.reason for site in report] == [Reason.MASK_UNKNOWN.name] * 2
