"""The prover: masks that are causal in whatever words, masks that are not, and the rules against real tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.reading import Record, evaluate
from tmx_compile.find import find_attention
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.graph.storages import Storages
from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import BATCH, KEY, Proof
from tmx_compile.proof.prove import Prover
from tmx_compile.proof.read import MaskReader
from tmx_compile.proof.rules import RULES
from tmx_compile.report import Reason, Rejected
from tmx_compile.testing import captured_graphs


def verdict(mask_of, n=24, batch=2, kv_len=None, dynamic=False, inputs=(), grow=None):
    """What the prover says of SDPA with ``mask_of(x, *inputs)``; x is (B, 2, N, 8)."""

    def call(q, k, *rest):
        mask = mask_of(q, *rest)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(batch, 2, n, 8), torch.randn(batch, 2, kv_len or n, 8)
    if dynamic:
        for x in (q, k):
            torch._dynamo.mark_dynamic(x, 2)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, x.dim() - 1)
    (gm,) = captured_graphs(call, q, k, *inputs, dynamic=None if dynamic else False)
    (site,) = find_attention(gm)
    assert not isinstance(site, Rejected), site
    return Prover.of(site.fake("query"), Storages(gm.graph)).prove(site)


def rows(x):
    return torch.arange(x.shape[2])[:, None]


def keys(x):
    return torch.arange(x.shape[2])[None, :]


def square(x):
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)


CAUSAL = {
    "tril": lambda x: square(x).tril(),
    "not triu": lambda x: ~square(x).triu(1),
    "key <= row": lambda x: keys(x) <= rows(x),
    "row >= key": lambda x: rows(x) >= keys(x),
    "key < row + 1": lambda x: keys(x) < rows(x) + 1,
    "not (key > row)": lambda x: ~(keys(x) > rows(x)),
    "row - key > -1": lambda x: rows(x) - keys(x) > -1,
    "2 * (row - key) >= 0 twice": lambda x: (rows(x) - keys(x) >= 0) & (keys(x) - rows(x) <= 0),
    "with a true side condition": lambda x: (keys(x) <= rows(x)) & (keys(x) >= 0) & (rows(x) < x.shape[2]),
    "additive minus infinity": lambda x: torch.where(keys(x) <= rows(x), 0.0, float("-inf")),
    "additive finfo.min": lambda x: torch.where(keys(x) > rows(x), torch.finfo(torch.float32).min, 0.0),
    "full and triu": lambda x: torch.full((x.shape[2], x.shape[2]), float("-inf")).triu(1),
    "masked_fill": lambda x: torch.zeros(x.shape[2], x.shape[2]).masked_fill(keys(x) > rows(x), float("-inf")),
    "four dimensions": lambda x: (keys(x) <= rows(x))[None, None].expand(x.shape[0], 1, -1, -1),
    "per head": lambda x: (keys(x) <= rows(x)).unsqueeze(0).expand(2, -1, -1),
    "one document": lambda x: (keys(x) <= rows(x)) & (torch.zeros_like(rows(x)) == torch.zeros_like(keys(x))),
    "shifted positions": lambda x: torch.arange(5, x.shape[2] + 5)[None, :] <= torch.arange(5, x.shape[2] + 5)[:, None],
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_however_it_is_written(name, dynamic):
    assert verdict(CAUSAL[name], dynamic=dynamic) == Proof()


NOT_CAUSAL = {
    "everything": (lambda x: keys(x) >= 0, Reason.NOT_CAUSAL),
    "nothing": (lambda x: keys(x) < 0, Reason.NOT_CAUSAL),
    "strictly before": (lambda x: keys(x) < rows(x), Reason.NOT_CAUSAL),
    "one ahead": (lambda x: keys(x) <= rows(x) + 1, Reason.NOT_CAUSAL),
    "one behind": (lambda x: keys(x) + 1 <= rows(x), Reason.NOT_CAUSAL),
    "anti-causal": (lambda x: keys(x) >= rows(x), Reason.NOT_CAUSAL),
    "window ahead": (lambda x: (keys(x) <= rows(x)) & (rows(x) - keys(x) < -5), Reason.NOT_CAUSAL),
    "prefix": (lambda x: (keys(x) <= rows(x)) | (keys(x) < 5), Reason.NOT_CAUSAL),
    "two rows a key": (lambda x: 2 * keys(x) <= rows(x), Reason.NOT_CAUSAL),
    "diagonal": (lambda x: keys(x) == rows(x), Reason.NOT_CAUSAL),
    "without the diagonal": (lambda x: (keys(x) <= rows(x)) & (keys(x) != rows(x)), Reason.NOT_CAUSAL),
    "chunks": (lambda x: (keys(x) <= rows(x)) & (keys(x) // 4 == rows(x) // 4), Reason.MASK_UNKNOWN),
    "triu of the wrong diagonal": (
        lambda x: ~square(x).triu(2),
        Reason.NOT_CAUSAL,
    ),
    "additive -1": (lambda x: torch.where(keys(x) <= rows(x), 0.0, -1.0), Reason.FLOAT_BIAS),
    "additive inside": (lambda x: torch.where(keys(x) <= rows(x), 0.5, float("-inf")), Reason.FLOAT_BIAS),
    "distance bias": (lambda x: (keys(x) - rows(x)).float(), Reason.FLOAT_BIAS),
    "by head": (lambda x: (keys(x) <= rows(x)) & (torch.arange(2) > 0)[:, None, None], Reason.NOT_CAUSAL),
    "in place": (
        lambda x: square(x).tril().logical_or_(keys(x) == 3),
        Reason.NOT_CAUSAL,
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_refused_with_its_reason(name, dynamic):
    mask_of, reason = NOT_CAUSAL[name]
    answer = verdict(mask_of, dynamic=dynamic)
    assert isinstance(answer, Rejected)
    assert answer.reason is reason, answer


def test_setitem_and_writes_through_a_view_are_seen():
    def by_item(x):
        mask = square(x).tril()
        mask[0, 5] = True
        return mask

    def by_view(x):
        mask = square(x).tril()
        mask[2:].fill_(True)
        return mask

    for mask_of in (by_item, by_view):
        answer = verdict(mask_of)
        assert isinstance(answer, Rejected)
        assert answer.reason is Reason.WRITTEN_IN_PLACE


PADDED = {
    "and-ed": lambda x, m: (keys(x) <= rows(x)) & m.bool()[:, None, None, :],
    "and-ed first": lambda x, m: m.to(torch.bool)[:, None, None, :] & (keys(x) <= rows(x)),
    "not equal to zero": lambda x, m: (keys(x) <= rows(x)) & (m != 0)[:, None, None, :],
    "gathered": lambda x, m: (keys(x) <= rows(x)) & m.bool()[torch.arange(x.shape[0])[:, None, None, None], keys(x)],
    "additive": lambda x, m: torch.where((keys(x) <= rows(x)) & m.bool()[:, None, None, :], 0.0, float("-inf")),
    "masked_fill twice": lambda x, m: (
        torch.zeros(x.shape[2], x.shape[2])
        .masked_fill(keys(x) > rows(x), float("-inf"))[None, None]
        .masked_fill(m[:, None, None, :] == 0, float("-inf"))
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_is_read(name, dynamic):
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    answer = verdict(PADDED[name], inputs=(mask,), dynamic=dynamic)
    assert isinstance(answer, Proof), answer
    assert len(answer.valid) == 1


def test_padding_by_rows_is_not_padding_by_keys():
    mask = torch.ones(2, 24, dtype=torch.long)
    answer = verdict(lambda x, m: (keys(x) <= rows(x)) & m.bool()[:, None, :, None], inputs=(mask,))
    assert isinstance(answer, Rejected)
    assert answer.reason is Reason.MASK_UNKNOWN


def test_a_per_key_tensor_is_taken_however_it_was_made():
    """Padding read backwards is still one value per key: the tensor that the mask code made is the key mask."""
    mask = torch.ones(2, 24, dtype=torch.long)

    def reverse(x, m):
        last = x.shape[2] - 1
        return (keys(x) <= rows(x)) & m.bool()[torch.arange(2)[:, None, None, None], last - keys(x)]

    answer = verdict(reverse, inputs=(mask,))
    assert isinstance(answer, Proof)
    (truth,) = answer.valid
    assert isinstance(truth, t.Truthy)
    assert t.coordinates(truth) == {KEY, BATCH}


def test_an_opaque_mask_names_the_input():
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool)
    answer = verdict(lambda x, m: m, inputs=(mask,))
    assert isinstance(answer, Rejected)
    assert answer.reason is Reason.MASK_UNKNOWN
    assert "the graph input" in answer.detail


def test_more_keys_than_rows():
    def bottom_right(x):
        return torch.arange(40)[None, :] <= (torch.arange(24) + 16)[:, None]

    def top_left(x):
        return torch.arange(40)[None, :] <= torch.arange(24)[:, None]

    assert verdict(bottom_right, kv_len=40) == Proof()
    assert verdict(top_left, kv_len=40) == Proof(offset=t.Lin(0))


def test_is_causal_with_more_keys_than_rows_is_top_left():
    def call(q, k):
        return F.scaled_dot_product_attention(q, k, k, is_causal=True)

    for kv_len, want in ((40, Reason.TOP_LEFT), (20, Reason.MORE_QUERIES), (24, None)):
        torch._dynamo.reset()
        (gm,) = captured_graphs(call, torch.randn(1, 2, 24, 8), torch.randn(1, 2, kv_len, 8))
        (site,) = find_attention(gm)
        answer = Prover.of(site.fake("query"), Storages(gm.graph)).prove(site)
        assert (answer.reason if isinstance(answer, Rejected) else None) is want


# The reading rules, against real tensors ----------------------------------------------------------------------------


def at_least_zero(lin):
    return (
        isinstance(lin.const, int) and lin.const >= 0 and not lin.atoms and all(factor > 0 for _, factor in lin.factors)
    )


N = 5
atoms = st.sampled_from(
    [
        lambda d: d["r"] >= d["k"],
        lambda d: d["k"] + 2 > d["r"],
        lambda d: d["r"] == d["k"] * 2,
        lambda d: d["m"][:, None, None, :].bool(),
        lambda d: d["m"].bool()[:, None, :, None],
        lambda d: d["m"].bool()[d["b"], d["k"]],
        lambda d: torch.ones(N, N, dtype=torch.bool).tril(1),
        lambda d: torch.zeros(N, N).masked_fill(d["k"] > d["r"], 1.0).bool(),
        lambda d: torch.ones(N, N, dtype=torch.bool).triu(-1).transpose(0, 1),
        lambda d: torch.where(d["r"] > 2, d["k"] < 3, d["k"] > 1),
        lambda d: (d["r"] - d["k"]).to(torch.bool),
        lambda d: torch.diff(d["p"], prepend=d["p"][:, :1] - 1, dim=-1)[:, None, None, :] != 1,
        lambda d: torch.full((N,), 2).cumsum(0)[:, None] > d["k"],
        lambda d: (torch.arange(N) // 2)[:, None] == (torch.arange(N) // 2)[None, :],
        lambda d: d["p"].view(1, 1, 1, N)[..., 1:].expand(2, 1, N, N - 1).sum(-1, keepdim=True) > 3,
    ]
)
programs = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda ab: lambda d: ab[0](d) & ab[1](d)),
        st.tuples(inner, inner).map(lambda ab: lambda d: ab[0](d) | ab[1](d)),
        inner.map(lambda a: lambda d: ~a(d)),
        inner.map(lambda a: lambda d: a(d).expand(2, 1, N, N)),
        inner.map(lambda a: lambda d: torch.where(a(d), 0.0, float("-inf")) == 0.0),
    ),
    max_leaves=5,
)


@given(programs)
@settings(max_examples=40, deadline=None)
def test_every_reading_agrees_with_the_tensors(program):
    """Whatever a mask program is read as, it is what the program computes, at every point and for every node."""
    torch._dynamo.reset()
    m = (torch.rand(2, N) < 0.6).long()

    def call(m):
        n = torch.arange(N)
        d = {"r": n[:, None], "k": n[None, :], "b": torch.arange(2)[:, None, None, None], "p": n[None], "m": m}
        return program(d)

    (gm,) = captured_graphs(call, m)
    recorded = Record(gm)
    recorded.run(m)
    reader = MaskReader(RULES, at_least_zero)
    for node in gm.graph.nodes:
        if tensor_of(node) is None or not torch.is_tensor(recorded.seen.get(node)):
            continue
        value = recorded.seen[node]
        view = reader.read(node)
        assert view.shape == tuple(value.shape)
        for index in torch.cartesian_prod(*(torch.arange(s) for s in value.shape)).reshape(-1, value.dim()).tolist():
            point = {value.dim() - 1 - d: i for d, i in enumerate(index)}
            got = evaluate(view.term, point, recorded.seen)
            assert got == value[tuple(index)].item(), (node, index, view.term)
