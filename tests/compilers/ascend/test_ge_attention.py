"""FusedInferAttentionScore and AttentionUpdate of the interpreter, against loops in float64, and their refusals."""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.support.ascend.ge.build import Graph, run_one
from tests.support.ascend.ge.node import GraphError
from tests.support.ascend.standin.process import unsupported

pytestmark = pytest.mark.skipif(unsupported() is not None, reason=str(unsupported()))

FIA, UPDATE = "FusedInferAttentionScore", "AttentionUpdate"
MAX = 2**31 - 1
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def fia(query, key, value, mask=None, lengths=None, kv_lengths=None, lse=True, extra=None, **attrs):
    """The operator's two outputs; shapes in BNSD unless ``input_layout`` says otherwise."""
    inputs = {"query": query, "key": [key], "value": [value], "pse_shift": None, "atten_mask": mask}
    for name, given in (("actual_seq_lengths", lengths), ("actual_seq_lengths_kv", kv_lengths)):
        inputs[name] = None if given is None else torch.tensor(given, dtype=torch.int64)
    settings = dict(input_layout="BNSD", num_heads=query.shape[1], num_key_value_heads=key.shape[1], inner_precise=0)
    outputs = {"attention_out": query.dtype, "softmax_lse": torch.float32}
    return run_one(FIA, inputs | (extra or {}), settings | attrs | {"softmax_lse_flag": lse}, outputs)


def sees(mode, i, j, rows, keys, pre, next_, hidden):
    """Whether row i of ``rows`` sees key j of ``keys``, in the manual's words."""
    if mode in (0, 1) and hidden is not None and hidden[i, j]:
        return False
    if mode == 0:
        return hidden is None or (i - pre <= j <= i + next_)
    if mode == 2:
        return j <= i
    stands = keys - 1 - (rows - 1 - i)  # the last row stands at the last key
    if mode == 3:
        return j <= stands
    if mode == 4:
        return stands - pre <= j <= stands + next_
    return True


def brute(q, k, v, scale, mode, pre=MAX, next_=MAX, hidden=None, lengths=None, kv_lengths=None):
    """Output and log-sum-exp in float64, row by row; ``hidden`` is (Q_S, KV_S) or None."""
    b, n, s, _ = q.shape
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((b, n, s, 1), math.inf, dtype=torch.float64)
    for x in range(b):
        rows, keys = (lengths or [s] * b)[x], (kv_lengths or [k.shape[2]] * b)[x]
        for h in range(n):
            g = h * k.shape[1] // n
            for i in range(rows):
                row = [j for j in range(keys) if sees(mode, i, j, rows, keys, pre, next_, hidden)]
                if not row:
                    continue
                scores = (k[x, g, row].double() @ q[x, h, i].double()) * scale
                lse[x, h, i, 0] = torch.logsumexp(scores, 0)
                out[x, h, i] = torch.softmax(scores, 0) @ v[x, g, row].double()
    return out, lse


def qkv(q_len, kv_len, batch=1, heads=2, kv_heads=1, dim=16, dtype=torch.float16):
    made = [torch.randn(batch, h, n, dim) for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len))]
    return [x.to(dtype) for x in made]


def close(got, expected, dtype=torch.float16):
    out, lse = got
    torch.testing.assert_close(out, expected[0].to(dtype), rtol=0, atol=2e-3 if dtype == torch.float16 else 2e-2)
    torch.testing.assert_close(lse, expected[1].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", [0, 2, 3])
@pytest.mark.parametrize(("q_len", "kv_len"), [(7, 7), (5, 9), (9, 5), (2, 33)])
def test_modes_against_loops(mode, q_len, kv_len, dtype):
    q, k, v = qkv(q_len, kv_len, batch=2, heads=4, kv_heads=2, dtype=dtype)
    # Modes 2 and 3 do not read the tokens, mode 0 not without a mask.
    got = fia(q, k, v, TRIANGLE if mode else None, scale=0.25, sparse_mode=mode, pre_tokens=1, next_tokens=0)
    close(got, brute(q, k, v, 0.25, mode), dtype)


@pytest.mark.parametrize("seed", range(12))
def test_bands_against_loops(seed):
    choose = random.Random(seed)
    q_len, kv_len = choose.randint(2, 12), choose.randint(1, 12)
    pre, next_ = choose.choice([0, 1, 3, MAX]), choose.choice([0, 1, 2, MAX])
    if seed % 3 == 0:
        pre, next_ = 3, -min(2, kv_len - 1)
    q, k, v = qkv(q_len, kv_len)
    got = fia(q, k, v, TRIANGLE[None], scale=0.3, sparse_mode=4, pre_tokens=pre, next_tokens=next_)
    close(got, brute(q, k, v, 0.3, 4, pre, next_))


def test_a_band_sees_both_ends():
    """pre_tokens = w with next_tokens = 0 sees w + 1 keys, the row's own among them."""
    q, k, v = qkv(8, 8)
    _, lse = fia(q, torch.zeros_like(k), v, TRIANGLE, sparse_mode=4, pre_tokens=3, next_tokens=0)
    torch.testing.assert_close(lse[0, 0, :, 0].exp(), torch.tensor([1.0, 2, 3, 4, 4, 4, 4, 4]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8])
@pytest.mark.parametrize("mode", [0, 1])
def test_whole_masks(mode, dtype):
    q, k, v = qkv(5, 6, batch=2)
    hidden = torch.rand(5, 6) < 0.4
    hidden[:, 0] = False
    expected = brute(q, k, v, 0.25, mode, 2, 1, hidden)
    # Rows 3 and 4 of mode 0 do not reach key 0.
    for shape in ((5, 6), (1, 5, 6), (1, 1, 5, 6)):
        mask = hidden.to(dtype).reshape(shape)
        got = fia(q, k, v, mask, scale=0.25, sparse_mode=mode, pre_tokens=2, next_tokens=1, inner_precise=2)
        close(got, expected)
    padded = torch.ones(16, 32, dtype=dtype)
    padded[:5, :6] = hidden
    got = fia(q, k, v, padded, scale=0.25, sparse_mode=mode, pre_tokens=2, next_tokens=1, inner_precise=3)
    close(got, expected)


def test_a_mask_for_each_sequence():
    q, k, v = qkv(3, 4, batch=2)
    hidden = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    hidden[1, 0, :, 2:] = True
    out, lse = fia(q, k, v, hidden, sparse_mode=1)
    for b in range(2):
        expected = brute(*(x[b : b + 1] for x in (q, k, v)), 1.0, 1, hidden=hidden[b, 0])
        close((out[b : b + 1], lse[b : b + 1]), expected)


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
@pytest.mark.parametrize("lengths", [None, [3, 6], [0, 4]])
@pytest.mark.parametrize("kv_lengths", [None, [2, 7], [5, 0]])
def test_lengths_for_each_sequence(mode, lengths, kv_lengths):
    q, k, v = qkv(6, 7, batch=2)
    mask = TRIANGLE if mode else None
    got = fia(q, k, v, mask, lengths, kv_lengths, sparse_mode=mode, pre_tokens=2, next_tokens=0)
    close(got, brute(q, k, v, 1.0, mode, 2, 0, None, lengths, kv_lengths))


def test_one_length_for_all_and_more_than_needed():
    q, k, v = qkv(6, 7, batch=2)
    one = fia(q, k, v, kv_lengths=[5])
    many = fia(q, k, v, kv_lengths=[5, 5, 1])
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))
    close(one, brute(q, k, v, 1.0, 0, kv_lengths=[5, 5]))


def test_rows_without_keys():
    q, k, v = qkv(5, 2)
    out, lse = fia(q, k, v, TRIANGLE, sparse_mode=3)
    assert torch.equal(lse[0, 0, :, 0].isposinf(), torch.tensor([True, True, True, False, False]))
    assert not out[:, :, :3].any()
    assert out[:, :, 3:].all()


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_one_row_ignores_the_mode(mode):
    q, k, v = qkv(1, 9, batch=2)
    got = fia(q, k, v, lengths=[0], sparse_mode=mode, pre_tokens=1, next_tokens=0)
    close(got, brute(q, k, v, 1.0, 1))


def test_one_row_takes_a_mask_over_keys():
    q, k, v = qkv(1, 9, batch=2)
    hidden = torch.rand(2, 9) < 0.5
    hidden[:, 3] = False
    out, lse = fia(q, k, v, hidden.reshape(2, 1, 1, 9), kv_lengths=[9, 7])
    for b in range(2):
        one = [x[b : b + 1] for x in (q, k, v)]
        close((out[b : b + 1], lse[b : b + 1]), brute(*one, 1.0, 1, hidden=hidden[b : b + 1], kv_lengths=[[9], [7]][b]))


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_one_row_refuses_the_compressed_mask(mode):
    q, k, v = qkv(1, 9)
    with pytest.raises(GraphError, match="one query row: sparse_mode is ignored"):
        fia(q, k, v, TRIANGLE, sparse_mode=mode, pre_tokens=1, next_tokens=0)


@pytest.mark.parametrize("shape", [(1, 9), (1, 2, 9), (2, 10), (2, 2, 9), (18,), (9, 2)])
def test_one_row_refuses_other_masks(shape):
    q, k, v = qkv(1, 9, batch=2)
    with pytest.raises(GraphError, match="one query row"):
        fia(q, k, v, torch.zeros(shape, dtype=torch.bool))


def test_layouts_agree():
    q, k, v = qkv(6, 8, batch=2, heads=4, kv_heads=2)
    out, lse = fia(q, k, v, TRIANGLE, sparse_mode=3)
    attrs = dict(sparse_mode=3, num_heads=4, num_key_value_heads=2)
    bsnd = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    other = fia(*bsnd, TRIANGLE, input_layout="BSND", **attrs)
    assert torch.equal(other[0], out.transpose(1, 2))
    assert torch.equal(other[1], lse)
    other = fia(*(x.flatten(2) for x in bsnd), TRIANGLE, input_layout="BSH", **attrs)
    assert torch.equal(other[0], out.transpose(1, 2).flatten(2))
    assert torch.equal(other[1], lse)
    other = fia(q, k, v, TRIANGLE, input_layout="BNSD_BSND", **attrs)
    assert torch.equal(other[0], out.transpose(1, 2))
    assert torch.equal(other[1], lse)


def test_defaults_of_the_prototype():
    """BSH, scale 1, as many key heads as query heads, no mode, no log-sum-exp."""
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(4, 5, kv_heads=2))
    outputs = {"attention_out": torch.float16, "softmax_lse": torch.float32}
    out, lse = run_one(FIA, {"query": q, "key": [k], "value": [v]}, {"num_heads": 2}, outputs)
    heads = [x.unflatten(2, (2, 16)).transpose(1, 2) for x in (q, k, v)]
    expected = brute(*heads, 1.0, 0)[0].transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected.half(), rtol=0, atol=2e-3)
    assert torch.equal(lse, torch.zeros(1))


REFUSED = [
    (dict(mask=None), "sparse_mode 4 needs atten_mask"),
    (dict(mask=None, sparse_mode=3), "sparse_mode 3 needs atten_mask"),
    (dict(mask=None, sparse_mode=2), "sparse_mode 2 needs atten_mask"),
    (dict(mask=None, sparse_mode=1), "sparse_mode 1 needs atten_mask"),
    (dict(mask=TRIANGLE[:1024, :1024].clone()), r"needs atten_mask \(2048, 2048\)"),
    (dict(mask=TRIANGLE.float()), "must be of bool, int8, uint8"),
    (dict(mask=TRIANGLE.half()), "must be of bool, int8, uint8"),
    (dict(mask=~TRIANGLE), "strict upper triangle"),
    (dict(mask=torch.ones(2048, 2048, dtype=torch.bool).triu(0)), "strict upper triangle"),
    (dict(mask=TRIANGLE, sparse_mode=0), "atten_mask must be"),
    (dict(mask=torch.zeros(4, 5, dtype=torch.bool), sparse_mode=0), "atten_mask must be"),
    (dict(mask=torch.zeros(2, 1, 4, 4, dtype=torch.bool), sparse_mode=0), "atten_mask must be"),
    (dict(mask=torch.eye(4) < 2, sparse_mode=1), "hides a whole row"),
    (dict(sparse_mode=5), "sparse_mode must be"),
    (dict(sparse_mode=9), "sparse_mode must be"),
    (dict(pre_tokens=0, next_tokens=-1), "the band is empty"),
    (dict(pre_tokens=-1, next_tokens=-1), "both negative"),
    (dict(pre_tokens=9, next_tokens=-4), "leaves nothing"),
    (dict(pre_tokens=-4, next_tokens=9), "leaves nothing"),
    (dict(num_heads=4), "num_heads is 4, query has 2"),
    (dict(num_heads=2, num_key_value_heads=2), "num_key_value_heads is 2, key has 1"),
    (dict(num_key_value_heads=0), "num_key_value_heads is 2, key has 1"),
    (dict(input_layout="TND"), "'TND' is not implemented"),
    (dict(input_layout="SBH"), "'SBH' is not implemented"),
    (dict(input_layout="BSH"), "BSH needs rank 3"),
    (dict(block_size=128), "'block_size'"),
    (dict(antiquant_mode=1), "'antiquant_mode'"),
    (dict(inner_precise=4), "inner_precise must be"),
    (dict(unknown_attribute=1), "attribute 'unknown_attribute' is not implemented"),
    (dict(extra={"pse_shift": torch.zeros(1, 2, 4, 4).half()}), "input 'pse_shift' is not implemented"),
    (dict(extra={"query_rope": torch.zeros(1, 2, 4, 64).half()}), "input 'query_rope' is not implemented"),
    (dict(lengths=[5]), "actual_seq_lengths must be from 0 to 4"),
    (dict(kv_lengths=[-1]), "actual_seq_lengths_kv must be from 0 to 4"),
    (dict(kv_lengths=[]), "has 0 entries for batch 1"),
    (dict(extra={"actual_seq_lengths": torch.tensor([4], dtype=torch.int32)}), "must be of int64"),
    (dict(value=torch.zeros(1, 1, 5, 16).half()), "must have one shape"),
    (dict(value=torch.zeros(1, 1, 4, 32).half()), "must have one shape"),
    (dict(key=torch.zeros(1, 1, 4, 16).bfloat16()), "'key0' must be of float16"),
    (dict(key=torch.zeros(2, 1, 4, 16).half(), value=torch.zeros(2, 1, 4, 16).half()), "query .* key"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), REFUSED)
def test_refusals(change, text):
    q, k, v = qkv(4, 4)
    call = dict(query=q, key=k, value=v, mask=TRIANGLE, sparse_mode=4, pre_tokens=1, next_tokens=0) | change
    with pytest.raises(GraphError, match=text) as caught:
        fia(**call)
    assert str(caught.value).startswith(f"{FIA} '{FIA}_")


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (dict(dim=24), "multiple of 16"),
        (dict(dim=528), "at most 512"),
        (dict(heads=65, kv_heads=1), "at most 64 query heads"),
        (dict(heads=257, kv_heads=257), "256 heads"),
        (dict(heads=3, kv_heads=2), "must divide"),
        (dict(dtype=torch.float32), "must be of float16, bfloat16"),
    ],
)
def test_limits_of_shapes(shape, text):
    with pytest.raises(GraphError, match=text):
        fia(*qkv(2, 2, **shape))


def test_limits_of_one_row():
    q, k, v = qkv(1, 4)
    for attrs, text in ((dict(inner_precise=2), "0 or 1"), (dict(input_layout="BNSD_BSND"), "more than one query row")):
        with pytest.raises(GraphError, match=text):
            fia(q, k, v, **attrs)
    with pytest.raises(GraphError, match="262144"):
        fia(q, *(torch.zeros(1, 1, 262160, 16).half(),) * 2)


def test_wide_rows_need_another_layout():
    q = torch.zeros(1, 2, 128, 512).half()
    with pytest.raises(GraphError, match="below 65535"):
        fia(q, q, q, input_layout="BSND", num_heads=128, num_key_value_heads=128)


def update(lses, outs, kind=0, sp=None):
    dtypes = {"output": outs[0].dtype} | ({"lse_m": torch.float32} if kind else {})
    if kind:
        return run_one(UPDATE, {"lse": lses, "go": outs}, {"update_type": kind, "sp": sp or len(lses)}, dtypes)
    # lse_m is described, and read by nobody.
    graph = Graph()
    inputs = {
        "lse": [graph.data(x.dtype, x.shape) for x in lses],
        "go": [graph.data(x.dtype, x.shape) for x in outs],
    }
    out = graph.op(UPDATE, inputs, {"update_type": kind, "sp": sp or len(lses)}, ["output", "lse_m"])
    graph.outputs((out, outs[0].dtype))
    return graph.run(*lses, *outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_update_merges_disjoint_keys(parts, dtype):
    """Attention over all keys equals the merge of attention over its parts."""
    q, k, v = qkv(5, 12, heads=1, dtype=torch.float16)
    whole, whole_lse = brute(q, k, v, 0.25, 0)
    lses, outs = [], []
    for piece in torch.arange(12).chunk(parts):
        out, lse = brute(q, k[:, :, piece], v[:, :, piece], 0.25, 0)
        lses.append(lse.reshape(-1).float())
        outs.append(out.reshape(-1, 16).to(dtype))
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    out, lse = update(lses, outs, 1)
    torch.testing.assert_close(out.double(), whole.reshape(-1, 16), rtol=0, atol=tolerance)
    torch.testing.assert_close(lse.double(), whole_lse.reshape(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(update(lses, outs)[0], out)


def test_update_with_one_empty_part():
    lse, out = torch.zeros(3), torch.randn(3, 8)
    (got,) = update([lse, lse - math.inf], [out, torch.zeros(3, 8)])
    assert torch.equal(got, out)


def test_the_invalid_output_is_not_read():
    graph = Graph()
    lse, go = graph.data(torch.float32), graph.data(torch.float32)
    out = graph.op(UPDATE, {"lse": [lse], "go": [go]}, {"update_type": 0, "sp": 1}, ["output", "lse_m"])
    graph.outputs((out.replace(":0", ":1"), torch.float32))
    with pytest.raises(GraphError, match="lse_m is computed with update_type 1 alone"):
        graph.run(torch.zeros(3), torch.zeros(3, 8))


L, G = torch.zeros(3), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("lses", "outs", "kind", "sp", "text"),
    [
        ([L, L], [G], 0, 2, "sp is 2"),
        ([L], [G], 0, 2, "sp is 2"),
        ([L] * 17, [G] * 17, 0, 17, "from 1 to 16"),
        ([L], [G], 2, 1, "update_type must be 0 or 1"),
        ([L], [torch.zeros(3, 12)], 0, 1, "multiple of 8"),
        ([L], [torch.zeros(3, 520)], 0, 1, "multiple of 8"),
        ([L], [torch.zeros(4, 8)], 0, 1, "must be"),
        ([L.reshape(3, 1)], [G], 0, 1, "must be"),
        ([L, L], [G, G.half()], 0, 2, "must be"),
        ([L.half()], [G], 0, 1, "must be of float32"),
        ([L, L + math.inf], [G, G], 0, 2, r"\+inf or NaN"),
        ([L - math.inf], [G], 0, 1, "no finite lse"),
    ],
)
def test_update_refusals(lses, outs, kind, sp, text):
    with pytest.raises(GraphError, match=text):
        update(lses, outs, kind, sp)
