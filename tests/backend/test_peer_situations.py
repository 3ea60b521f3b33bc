"""Situations in which PyTorch tests its own attention, under this backend.

Shapes, strides, masks and ways of writing come up there because something once went wrong in them: SDPA's tests
(causal to the upper left and lower right, masks that broadcast, rows without keys, other numbers of keys, strides of 0,
head dims that differ) and those of Inductor's fused attention (scales as products and quotients, permutations, casts,
masks that are less than they seem). The window holds every key, so the result has to be that of the function itself;
and whether the site goes sparse is on record here: what is plainly causal does, what is not never does.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.support.layers import OneLayer
from tmx_compile import TriangleMixConfig, tmx_backend

B, H, N, D = 2, 2, 48, 16
CONFIG = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4000, min_seq_len=32)
INF = float("inf")
TRIANGLE = "triangle"
sdpa = F.scaled_dot_product_attention


def heads_first(batch=B, heads=H, rows=N, keys=N, dim=D, v_dim=D, kv_heads=None, dtype=torch.float32):
    few = heads if kv_heads is None else kv_heads
    shapes = (batch, heads, rows, dim), (batch, few, keys, dim), (batch, few, keys, v_dim)
    return [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes]


def tokens_first(**kwargs):
    return [x.transpose(1, 2).contiguous() for x in heads_first(**kwargs)]


def tril(rows=N, keys=N, diagonal=0):
    return torch.ones(rows, keys, dtype=torch.bool).tril(diagonal)


def additive(mask, low=-INF):
    return torch.zeros(mask.shape).masked_fill(~mask, low)


def check(attend, args, expected, tolerance=2e-5, rows=None):
    """The compiled function equals the function, and its site has the expected decision or reason."""
    backend = tmx_backend(CONFIG)
    want = attend(*args)
    with torch.no_grad():
        got = torch.compile(OneLayer(attend), backend=backend)(*args)
    told = [site.reason or site.decision for site in backend.report]
    seen = want.isfinite() if rows is None else torch.zeros_like(want, dtype=torch.bool)
    if rows is not None:
        seen[:, :, rows] = True
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got[seen], want[seen], atol=tolerance, rtol=tolerance)
    assert told == [expected]


# One call: SDPA -----------------------------------------------------------------------------------------------------


def padded(q, k, v, lengths=(N, 30)):
    shown = torch.arange(N) < torch.tensor(lengths)[:, None]
    return sdpa(q, k, v, attn_mask=tril() & shown[:, None, None])


MASKS = {
    "is_causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), TRIANGLE),
    "is_causal and a scale": (lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.37), TRIANGLE),
    "(N, N)": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril()), TRIANGLE),
    "(1, N, N)": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril()[None]), TRIANGLE),
    "(1, 1, N, N)": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril()[None, None]), TRIANGLE),
    "(B, 1, N, N)": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril().expand(B, 1, N, N)), TRIANGLE),
    "(B, H, N, N)": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril().expand(B, H, N, N).clone()), TRIANGLE),
    "(H, N, N) floats": (lambda q, k, v: sdpa(q, k, v, attn_mask=additive(tril()).expand(H, N, N)), TRIANGLE),
    "floats": (lambda q, k, v: sdpa(q, k, v, attn_mask=additive(tril())), TRIANGLE),
    "floats, finite": (lambda q, k, v: sdpa(q, k, v, attn_mask=additive(tril(), -1e9)), TRIANGLE),
    "floats, triu": (lambda q, k, v: sdpa(q, k, v, attn_mask=torch.full((N, N), -INF).triu(1)), TRIANGLE),
    "transposed": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril().transpose(0, 1)), "NOT_CAUSAL"),
    "transposed twice": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril().t().transpose(-1, -2)), TRIANGLE),
    "none": (sdpa, "NOT_CAUSAL"),
    "everything": (lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(N, N, dtype=torch.bool)), "NOT_CAUSAL"),
    "keys alone (B, 1, 1, N)": (
        lambda q, k, v: sdpa(q, k, v, attn_mask=(torch.arange(N) < torch.tensor([[N], [30]]))[:, None, None]),
        "NOT_CAUSAL",
    ),
    "rows alone (N, 1)": (
        lambda q, k, v: sdpa(q, k, v, attn_mask=(torch.arange(N) >= 0)[:, None].expand(N, N)),
        "NOT_CAUSAL",
    ),
    "one key too many": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril(diagonal=1)), "NOT_CAUSAL"),
    "a bias": (lambda q, k, v: sdpa(q, k, v, attn_mask=additive(tril()) + torch.linspace(0, 1, N)), "FLOAT_BIAS"),
    "bool written as floats": (lambda q, k, v: sdpa(q, k, v, attn_mask=tril().float()), "FLOAT_BIAS"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_one_call(name, eager):
    attend, expected = MASKS[name]
    check(attend, heads_first(), expected)


def test_lengths_of_sequences(eager):
    """Rows beyond a sequence's length are padding, and no business of anyone."""
    q, k, v = heads_first()
    check(padded, (q, k, v), TRIANGLE, rows=slice(0, 30))


def test_rows_without_a_key(eager):
    """One key too few: row 0 sees none. What PyTorch gives there has changed over time; the others have one answer."""

    def attend(q, k, v):
        return sdpa(q, k, v, attn_mask=tril(diagonal=-1))

    args = heads_first()
    backend = tmx_backend(CONFIG)
    got = torch.compile(OneLayer(attend), backend=backend)(*args)
    torch.testing.assert_close(got[:, :, 1:], attend(*args)[:, :, 1:], atol=2e-5, rtol=0)
    assert [site.decision for site in backend.report] == ["dense"]


def test_left_padding_leaves_rows_without_a_key(eager):
    def attend(q, k, v):
        shown = torch.arange(N) >= torch.tensor([[0], [9]])
        return sdpa(q, k, v, attn_mask=additive(tril() & shown[:, None, None]))

    check(attend, heads_first(), TRIANGLE, rows=slice(9, None))


BIASES = {"upper left": causal_upper_left, "lower right": causal_lower_right}


@pytest.mark.parametrize("keys", [N, N + 17])
@pytest.mark.parametrize("name", BIASES)
def test_causal_variants(name, keys, eager):
    """The two alignments are one with as many keys as rows; with more, keys beyond the last row are seen by none."""

    def attend(q, k, v):
        diagonal = 0 if name == "upper left" else k.shape[2] - q.shape[2]
        return sdpa(q, k, v, attn_mask=tril(q.shape[2], k.shape[2], diagonal))

    args = heads_first(keys=keys)
    torch.testing.assert_close(sdpa(*args, attn_mask=BIASES[name](N, keys)), attend(*args), atol=1e-5, rtol=0)
    check(attend, args, TRIANGLE)
    torch._dynamo.reset()
    # The tensor subclass by itself: whatever becomes of it, its numbers are its own.
    backend = tmx_backend(CONFIG)
    bias = BIASES[name](N, keys)
    got = torch.compile(OneLayer(lambda q, k, v: sdpa(q, k, v, attn_mask=bias)), backend=backend)(*args)
    torch.testing.assert_close(got, attend(*args), atol=2e-5, rtol=0)


def test_fewer_keys_than_rows(eager):
    args = heads_first(keys=N - 9)
    check(lambda q, k, v: sdpa(q, k, v), args, "MORE_QUERIES")


@pytest.mark.parametrize("v_dim", [8, 40])
def test_values_of_another_head_dim(v_dim, eager):
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True), heads_first(v_dim=v_dim), TRIANGLE)


@pytest.mark.parametrize("dim", [1, 3, 33])
def test_odd_head_dims(dim, eager):
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True), heads_first(dim=dim, v_dim=dim), TRIANGLE)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (6, 3)])
def test_grouped_queries(heads, kv_heads, eager):
    args = heads_first(heads=heads, kv_heads=kv_heads)
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), args, TRIANGLE)


STRIDED = {
    "tokens first": lambda: [x.transpose(1, 2) for x in tokens_first()],
    "heads last": lambda: [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in heads_first()],
    "every other token": lambda: [x[:, :, ::2] for x in heads_first(rows=2 * N, keys=2 * N)],
    "a slice of one projection": lambda: list(torch.randn(B, N, 3 * H, D).transpose(1, 2).chunk(3, 1)),
    "one head for all (stride 0)": lambda: [torch.randn(B, 1, N, D).expand(B, H, N, D) for _ in range(3)],
    "one sequence for all (stride 0)": lambda: [torch.randn(1, H, N, D).expand(B, H, N, D) for _ in range(3)],
    "one token for all (stride 0)": lambda: [torch.randn(B, H, 1, D).expand(B, H, N, D) for _ in range(3)],
    "one tensor thrice": lambda: [torch.randn(B, H, N, D)] * 3,
    "unaligned": lambda: [torch.randn(B * H * N * D + 1)[1:].view(B, H, N, D) for _ in range(3)],
    "flipped": lambda: [x.flip(2) for x in heads_first()],
}  # fmt: skip


@pytest.mark.parametrize("name", STRIDED)
def test_strides(name, eager):
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True), STRIDED[name](), TRIANGLE)


BROADCAST = {
    "queries of one sequence": (lambda q, k, v: sdpa(q[:1], k, v, is_causal=True), "LAYOUT"),
    "keys of one sequence": (lambda q, k, v: sdpa(q, k[:1], v[:1], is_causal=True), "LAYOUT"),
    "three dimensions": (lambda q, k, v: sdpa(q[0], k[0], v[0], is_causal=True), "LAYOUT"),
    "five dimensions": (lambda q, k, v: sdpa(q[None], k[None], v[None], is_causal=True), "LAYOUT"),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_batches_that_broadcast(name, eager):
    attend, expected = BROADCAST[name]
    args = heads_first()
    backend = tmx_backend(CONFIG)
    got = torch.compile(OneLayer(attend), backend=backend)(*args)
    torch.testing.assert_close(got, attend(*args), atol=2e-5, rtol=0)
    assert [site.reason for site in backend.report] == [expected]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, eager):
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    check(lambda q, k, v: sdpa(q, k, v, is_causal=True), heads_first(dtype=dtype), TRIANGLE, tolerance)


def test_a_bool_mask_beside_half_precision(eager):
    check(lambda q, k, v: sdpa(q, k, v, attn_mask=tril()), heads_first(dtype=torch.bfloat16), TRIANGLE, 3e-2)


# Written out: the forms of Inductor's fused attention ----------------------------------------------------------------


def causal_add(s):
    return s + additive(tril(s.shape[-2], s.shape[-1]))


def transposed(attend):
    return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def by_tensor_scale(q, k, v):
    """GPT-2's way: the scale and the mask's value are tensors of no dimension."""
    s = torch.matmul(q, k.permute(0, 1, 3, 2)).div(torch.full((), math.sqrt(v.size(-1)), dtype=q.dtype))
    s = torch.where(tril(), s, torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype))
    return F.dropout(s.softmax(-1), 0.0).matmul(v)


def by_bmm(q, k, v):
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    w = causal_add(torch.bmm(q, k.transpose(1, 2))).softmax(-1)
    return torch.bmm(F.dropout(w, 0.5, training=False), v).view(B, H, N, D)


def emptied_mask(q, k, v):
    """A bool mask filled with -inf is True everywhere, and adds 1 to every score: nothing is masked."""
    mask = tril()
    mask = mask.masked_fill(torch.logical_not(mask), -INF)
    return torch.softmax(q @ k.mT / math.sqrt(D) + mask, -1) @ v


def masked_batch(q, k, v):
    """(B, N) lower triangle as a padding mask: one valid key in the first sequence, two in the second."""
    s = q @ k.mT / 3.0
    hidden = (torch.ones(B, N, dtype=torch.bool).tril() == 0).view(B, 1, 1, N).expand_as(s)
    return s.masked_fill(hidden, -INF).softmax(-1) @ v


WRITTEN = {
    "div": (lambda q, k, v: causal_add((q @ k.mT).div(math.sqrt(D))).softmax(-1) @ v, TRIANGLE),
    "mul": (lambda q, k, v: causal_add((q @ k.mT).mul(1 / math.sqrt(D))).softmax(-1).matmul(v), TRIANGLE),
    "div 3": (lambda q, k, v: F.dropout(causal_add(q @ k.mT / 3.0).softmax(-1), 0.4, False).matmul(v), TRIANGLE),
    "mul 0.4": (lambda q, k, v: F.dropout(causal_add((q @ k.mT) * 0.4).softmax(-1), 0.0, True) @ v, TRIANGLE),
    "query first": (lambda q, k, v: causal_add((q / math.sqrt(D)) @ k.mT).float().softmax(-1) @ v, TRIANGLE),
    "clone": (lambda q, k, v: causal_add((q @ k.mT) * 0.3).softmax(-1).clone().matmul(v), TRIANGLE),
    "expanded": (
        lambda q, k, v: torch.bmm(
            causal_add(torch.bmm(q.expand(B, H, N, D).reshape(-1, N, D), k.reshape(-1, N, D).mT).view(B, H, N, N))
            .softmax(-1)
            .reshape(-1, N, N),
            v.reshape(-1, N, D),
        ).view(B, H, N, D),
        TRIANGLE,
    ),
    "tensor scale": (by_tensor_scale, TRIANGLE),
    "masked_fill expand_as": (
        lambda q, k, v: (s := q @ k.mT / 3.0).masked_fill((tril() == 0).expand_as(s), -INF).softmax(-1) @ v,
        TRIANGLE,
    ),
    "no mask": (lambda q, k, v: (q @ k.mT).div(4.0).softmax(-1) @ v, "NOT_CAUSAL"),
    "a mask that masks nothing": (emptied_mask, None),
    "zeros as a mask": (
        lambda q, k, v: torch.softmax(q @ k.mT / 4.0 + torch.zeros(N, N, dtype=torch.bool), -1) @ v,
        None,
    ),
    "a number as a mask": (lambda q, k, v: torch.softmax(q @ k.mT / 4.0 + 2.0, -1) @ v, None),
    "integers as a mask": (lambda q, k, v: torch.softmax(q @ k.mT / 4.0 + torch.ones(N, N).tril().int(), -1) @ v, None),
    "a triangle over the batch": (masked_batch, "NOT_CAUSAL"),
    "a factor for each head": (
        lambda q, k, v: causal_add((q @ k.mT) * torch.tensor([0.5, 2.0])[:, None, None]).softmax(-1) @ v,
        None,
    ),
    "softmax over rows": (lambda q, k, v: causal_add(q @ k.mT).nan_to_num(neginf=-1e9).softmax(-2) @ v, None),
    "weights doubled": (lambda q, k, v: (causal_add(q @ k.mT).softmax(-1) * 2) @ v, None),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_attention_written_out(name, eager):
    attend, expected = WRITTEN[name]
    args = heads_first()
    if expected is not None:
        check(attend, args, expected)
        return
    backend = tmx_backend(CONFIG)
    got = torch.compile(OneLayer(attend), backend=backend)(*args)
    torch.testing.assert_close(got, attend(*args), atol=2e-5, rtol=2e-5)
    assert backend.report.triangle() == []


@pytest.mark.parametrize("name", ["div", "query first", "tensor scale", "masked_fill expand_as"])
def test_tokens_before_heads(name, eager):
    """(B, N, H, D), permuted inside."""
    attend, expected = WRITTEN[name]
    check(transposed(attend), tokens_first(), expected)


def test_three_dimensions_written_with_bmm(eager):
    args = heads_first()
    backend = tmx_backend(CONFIG)
    got = torch.compile(OneLayer(by_bmm), backend=backend)(*args)
    torch.testing.assert_close(got, by_bmm(*args), atol=2e-5, rtol=0)


def test_half_precision_with_a_float32_softmax(eager):
    def attend(q, k, v):
        return causal_add((q @ k.mT / math.sqrt(D)).float()).softmax(-1).to(torch.float16) @ v

    check(attend, heads_first(dtype=torch.float16), TRIANGLE, 4e-3)


def test_weights_that_are_returned_stay(eager):
    def attend(q, k, v):
        w = causal_add(q @ k.mT).softmax(-1)
        return w @ v, w

    args = heads_first()
    backend = tmx_backend(CONFIG)
    got = torch.compile(OneLayer(attend), backend=backend)(*args)
    for mine, theirs in zip(got, attend(*args), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=0)
    assert [site.reason for site in backend.report] == ["WEIGHTS_USED"]


def test_a_checkpoint_around_it(eager):
    from torch.utils.checkpoint import checkpoint

    def attend(q, k, v):
        return checkpoint(WRITTEN["div"][0], q, k, v, use_reentrant=False)

    check(attend, heads_first(), TRIANGLE)


# Through Inductor, and equal to what Inductor makes of it by itself ---------------------------------------------------

THROUGH = {
    "masks of every shape": lambda q, k, v: sum(MASKS[name][0](q, k, v) for name in ("(B, H, N, N)", "floats, finite")),
    "written out in every form": lambda q, k, v: sum(
        WRITTEN[name][0](q, k, v) for name in ("query first", "tensor scale")
    ),
    "what is not causal": lambda q, k, v: sum(
        one(q, k, v) for one in (MASKS["none"][0], MASKS["one key too many"][0], emptied_mask, masked_batch)
    ),
}


@pytest.mark.parametrize("name", THROUGH)
def test_equals_inductor(name):
    attend, args, backend = THROUGH[name], heads_first(), tmx_backend(CONFIG)
    with torch.no_grad():
        ours = torch.compile(OneLayer(attend), backend=backend)(*args)
        torch._dynamo.reset()
        theirs = torch.compile(OneLayer(attend))(*args)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    decisions = {site.decision for site in backend.report}
    assert decisions == {"dense" if name == "what is not causal" else "triangle"}
