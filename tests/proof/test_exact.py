"""Masks whose numbers are exact in their dtype, and those that wrap around or round; forms of indices."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.support.layers import OneLayer
from tests.support.masked import CONFIG
from tests.support.oracle import oracle
from tmx_compile import Report, TriangleMixConfig, tmx_backend
from tmx_compile.report import Reason

B, H, N, MORE, D = 1, 2, 120, 24, 8
WIDE = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4 * N, min_seq_len=50)


def masked(mask_of):
    return lambda q, k, *rest: F.scaled_dot_product_attention(q, k, k, attn_mask=mask_of(*rest))


def compiled(form, args, config=CONFIG):
    report = Report()
    out = torch.compile(OneLayer(form), backend=tmx_backend(config, report=report))(*args)
    return out, [(site.decision, site.reason) for site in report]


def want_of(q, k):
    """Causal attention and the triangle of the definition, in float64."""
    return oracle(q, k, k, None, *CONFIG.geometry.counts, q.shape[-1] ** -0.5)[0]


def qk(more=0):
    return torch.randn(B, H, N, D), torch.randn(B, H, N + more, D)


def check_triangle(form, q, k, *rest):
    """The site goes sparse, with the oracle's numbers."""
    out, sites = compiled(form, (q, k, *rest))
    assert sites == [("triangle", "")]
    torch.testing.assert_close(out.double(), want_of(q, k), atol=2e-5, rtol=0)


def ones(n, **kwargs):
    return torch.ones(n, n, **kwargs)


def grid(indexing, *tensors):
    return torch.meshgrid(*tensors, indexing=indexing)


def floats(dtype, n=N):
    return torch.arange(n, dtype=dtype)


CAUSAL = {
    "upper.T": lambda: ones(N, dtype=torch.bool).triu().T,
    "upper.mT": lambda: ones(N, dtype=torch.bool).triu()[None].mT,
    "upper.mH": lambda: ones(N, dtype=torch.bool).triu().mH,
    "upper.H": lambda: ones(N).triu().H != 0,
    "meshgrid ij": lambda: (lambda row, key: key <= row)(*grid("ij", torch.arange(N), torch.arange(N))),
    "meshgrid xy": lambda: (lambda key, row: key <= row)(*grid("xy", torch.arange(N), torch.arange(N))),
    "meshgrid of a list": lambda: (lambda row, key: key <= row)(*grid("ij", [torch.arange(N), torch.arange(N)])),
    "float32 positions": lambda: floats(torch.float32)[None] <= floats(torch.float32)[:, None],
    "float64 and int64": lambda: torch.arange(0.0, N, dtype=torch.float64) - 1 <= (torch.arange(N) - 1)[:, None],
    "float positions, shifted": lambda: torch.arange(3.0, N + 3.0)[None] * 2 <= torch.arange(3, N + 3)[:, None] * 2.0,
    "bfloat16 positions": lambda: floats(torch.bfloat16)[None] <= floats(torch.bfloat16)[:, None],
    "cast to float": lambda: torch.arange(N).half()[None] <= torch.arange(N).float()[:, None],
    "int32 times 3": lambda: torch.arange(N, dtype=torch.int32) * 3 <= torch.arange(N, dtype=torch.int32)[:, None] * 3,
    "by keyword": lambda: torch.le(
        input=torch.unsqueeze(input=torch.arange(end=N), dim=0), other=torch.transpose(torch.arange(N)[None], 0, 1)
    ),
}
LONGER = {
    "last rows of tril": lambda: torch.tril(ones(N + MORE, dtype=torch.bool))[-N:],
    "last rows of tril, by floats": lambda: torch.tril(ones(N + MORE))[-N:, : N + MORE] != 0,
    "last rows of positions": lambda: torch.arange(N + MORE)[None] <= torch.arange(N + MORE)[-N:, None],
}


@pytest.mark.parametrize("name", CAUSAL)
def test_written_forms(name):
    check_triangle(masked(CAUSAL[name]), *qk())


@pytest.mark.parametrize("name", LONGER)
def test_written_forms_with_more_keys_than_rows(name):
    check_triangle(masked(LONGER[name]), *qk(MORE))


@pytest.mark.parametrize("more", [0, MORE])
def test_a_causal_bias_of_torch(more):
    """It has to come from outside: a graph breaks where one is made, and what follows belongs to no layer."""
    q, k = qk(more)
    check_triangle(masked(lambda bias: bias), q, k, causal_lower_right(N, N + more))


# Where the tensors are not what the numbers would be. Every row has a key.
OTHERWISE = {
    "int32 that wraps": lambda: (
        torch.arange(N, dtype=torch.int32)[None] * 40_000_000
        <= torch.arange(N, dtype=torch.int32)[:, None] * 40_000_000
    ),
    "int32 wrapped by a sum": lambda: (
        torch.arange(N, dtype=torch.int32)[None] + 2_147_483_600
        <= torch.arange(N, dtype=torch.int32)[:, None] + 2_147_483_600
    ),
    "int8 that wraps": lambda: (
        torch.arange(N, dtype=torch.int8)[None] * 2 <= torch.arange(N, dtype=torch.int8)[:, None] * 2
    ),
    "cut to int32": lambda: (
        (torch.arange(N) * 40_000_000).to(torch.int32)[None] <= (torch.arange(N) * 40_000_000).to(torch.int32)[:, None]
    ),
    "a number cut to int32": lambda: (
        torch.arange(N, dtype=torch.int32)[None] - torch.tensor((1 << 32) + 1)
        <= torch.arange(N, dtype=torch.int32)[:, None] - 1
    ),
    "bfloat16 that rounds": lambda: floats(torch.bfloat16)[None] + 250 <= floats(torch.bfloat16)[:, None] + 250,
    "float32 that rounds": lambda: (
        torch.arange(1 << 24, (1 << 24) + N, dtype=torch.int64).float()[None]
        <= torch.arange(1 << 24, (1 << 24) + N, dtype=torch.int64).float()[:, None]
    ),
    "compared where it rounds": lambda: (
        (torch.arange(N) + (1 << 24))[None] <= (torch.arange(N) + (1 << 24)).to(torch.float32)[:, None]
    ),
    "uint8 below 0": lambda: ones(N, dtype=torch.bool).tril() & (torch.zeros(N, dtype=torch.uint8) - 1 > 0)[None],
    "an upper left bias": lambda: causal_upper_left(N, N + MORE),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_wraps_or_rounds_is_not_read_as_if_it_did_not(name):
    mask_of = OTHERWISE[name]
    q, k = qk(MORE if "bias" in name else 0)
    out, sites = compiled(masked(mask_of), (q, k), WIDE)
    # Inductor computes 16-bit arithmetic in float32: what it makes of the model is what has to come out.
    want = torch.compile(OneLayer(masked(mask_of)))(q, k)
    torch.testing.assert_close(out, want, atol=2e-5, rtol=0)
    # Of the keys alone it is data.
    assert sites[0][0] == ("triangle" if name == "uint8 below 0" else "dense")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_and_keys_numbered_to_the_ends_of_their_dtype(dtype):
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    numbers = torch.tensor([low] * 30 + [-1] * 20 + [0] * 20 + [5] * 20 + [high] * 30, dtype=dtype)
    ends = torch.tensor([high, low, 1, -1] * 30, dtype=dtype)
    ends[0::30] = 1

    def mask_of(numbers, ends):
        causal = torch.arange(N)[None] <= torch.arange(N)[:, None]
        return causal & (numbers[:, None] == numbers[None]) & (ends[None] > 0)

    q, k = qk()
    out, sites = compiled(masked(mask_of), (q, k, numbers, ends), WIDE)
    assert sites == [("triangle", "")]
    # A row whose own key is invalid is padding.
    seen = mask_of(numbers, ends).any(1) & (ends > 0)
    want = masked(mask_of)(q.double(), k.double(), numbers, ends)
    assert seen.sum() > N / 3
    torch.testing.assert_close(out.double()[:, :, seen], want[:, :, seen], atol=2e-5, rtol=0)


LEAST = torch.finfo(torch.float32).min
CLAMPED = {
    "torch.max": lambda s: torch.max(s, torch.tensor(LEAST)),
    "maximum": lambda s: torch.maximum(torch.tensor(LEAST), s),
    "clamp": lambda s: s.clamp(min=LEAST),
    "clamp_min": lambda s: torch.clamp_min(s, LEAST),
    "from below at minus infinity": lambda s: s.clamp(-math.inf),
}
CUT = {
    "at a score": (lambda s: s.clamp(min=-0.1), Reason.SCORE_CHANGED),
    "at what masks": (lambda s: s.clamp(min=-1e5), Reason.SCORE_CHANGED),
    "from above": (lambda s: s.clamp(LEAST, 0.2), Reason.SCORE_CHANGED),
    "at another score": (lambda s: torch.maximum(s, s.flip(-1)), Reason.SCORE_CHANGED),
}


def eager(change):
    def form(q, k):
        scores = q @ k.mT * D**-0.5 + torch.full((N, N), LEAST).triu(1)
        return change(scores).softmax(-1) @ k

    return form


@pytest.mark.parametrize("name", CLAMPED)
def test_scores_clamped_where_nothing_is_lower(name):
    """As XGLM and OPT do it: the mask's numbers may have overflowed to minus infinity."""
    check_triangle(eager(CLAMPED[name]), *qk())


@pytest.mark.parametrize("name", CUT)
def test_scores_clamped_elsewhere(name):
    change, reason = CUT[name]
    q, k = qk()
    out, sites = compiled(eager(change), (q, k), WIDE)
    assert sites == [("dense", reason.name)]
    torch.testing.assert_close(out, eager(change)(q, k), atol=2e-5, rtol=0)
