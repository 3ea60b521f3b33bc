"""Masks beyond causal and padding: windows, caches, documents, positions from data, the promise. Numbers and refusals.

Every positive case runs through the backend and is compared with the mask written out: the model's own mask, as plain
PyTorch computes it, and-ed with the triangle of the definition.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tmx_compile import TriangleMixConfig, explain, tmx_backend
from tmx_compile.errors import TriangleMixError
from tmx_compile.operator import OPERATOR
from tmx_compile.report import Reason

B, H, KV, N, D = 2, 4, 2, 120, 8
SINK, WINDOW, LAST = 3, 7, 5
CONFIG = TriangleMixConfig(
    num_sink_tokens=SINK,
    sliding_window_size=WINDOW,
    num_last_tokens=LAST,
    triangle_layer_indices=[0],
    min_seq_len=50,
)
INF = float("-inf")


class Layer(nn.Module):
    def __init__(self, mask_of):
        super().__init__()
        self.mask_of = mask_of

    def forward(self, q, k, v, *rest):
        if q.shape[2] == k.shape[2]:  # one symbol for both lengths
            q = q + 0 * k[:, :1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_of(q, k, *rest), enable_gqa=True)


class Model(nn.Module):
    def __init__(self, mask_of):
        super().__init__()
        self.layers = nn.ModuleList([Layer(mask_of)])

    def forward(self, *args):
        return self.layers[0](*args)


def tensors(kv_len=N, batch=B):
    return torch.randn(batch, H, N, D), torch.randn(batch, KV, kv_len, D), torch.randn(batch, KV, kv_len, D)


def expected(q, k, v, mask, first=None, document=None):
    """Attention in float64 under ``mask`` (bool, or added) and-ed with the triangle.

    ``first`` is the position of row 0, ``document`` (B, Skv) the number of each key's document.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    first = kv_len - q_len if first is None else first
    seen = mask if mask.dtype == torch.bool else mask > -9000
    seen = seen.expand(q.shape[0], 1, q_len, kv_len)[:, 0]
    document = torch.zeros(q.shape[0], kv_len) if document is None else document
    allowed = torch.zeros_like(seen)
    for b in range(q.shape[0]):
        valid = seen[b].any(0)
        for i in range(q_len):
            p = first + i
            mine = (valid & (document[b] == document[b, p])).nonzero().flatten().tolist()
            if not mine:
                continue
            final = mine[-1] + 1 - LAST <= p <= mine[-1]
            for j in mine:
                kept = j < mine[0] + SINK or p - j <= WINDOW or final
                allowed[b, i, j] = kept and seen[b, i, j]
    k, v = (x.double().repeat_interleave(H // KV, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * D**-0.5).masked_fill(~allowed[:, None], INF)
    alive = allowed.any(-1)[:, None, :, None]
    return torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive @ v


def check(mask_of, args, *rest, eager, first=None, document=None, lowering="operator", dynamic=False, **options):
    """The compiled model's numbers; returns the operator's node."""
    backend = tmx_backend(CONFIG, lowering=lowering, strict=True, **options)
    if dynamic:
        for x in (*args, *rest):
            if x.dim():
                torch._dynamo.mark_dynamic(x, 2 if x.dim() == 4 and x.shape[-1] == D else x.dim() - 1)
    got = torch.compile(Model(mask_of), backend=backend)(*args, *rest)
    want = expected(*args, mask_of(*args[:2], *rest), first, document)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    (site,) = backend.report
    assert site.decision == "triangle"
    sizes = {args[0].shape[2], args[1].shape[2]}
    nodes = [node for node in eager[-1].graph.nodes if node.target is OPERATOR]
    if not options and lowering == "operator":
        for node in eager[-1].graph.nodes:
            value = node.meta.get("example_value")
            if torch.is_tensor(value) and value.dim() >= 2:
                assert sum(int(size) in sizes for size in value.shape) < 2, f"{node} {value.shape} is N x N"
    return nodes


def rows(q, first=0):
    return (torch.arange(q.shape[2]) + first)[:, None]


def keys(k):
    return torch.arange(k.shape[2])[None, :]


def causal(q, k):
    return keys(k) <= rows(q, k.shape[2] - q.shape[2])


# A layer's own window ---------------------------------------------------------------------------------------------

WINDOWS = {
    "key > row - w": lambda q, k: causal(q, k) & (keys(k) > rows(q) - 20),
    "row - key < w": lambda q, k: causal(q, k) & (rows(q) - keys(k) < 20),
    "not (row - key >= w)": lambda q, k: ~((keys(k) > rows(q)) | (rows(q) - keys(k) >= 20)),
    "two windows": lambda q, k: causal(q, k) & (keys(k) > rows(q) - 20) & (rows(q) < keys(k) + 40),
    "triu of tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-19),
    "additive": lambda q, k: torch.where(causal(q, k) & (rows(q) - keys(k) < 20), 0.0, INF),
    "masked_fill twice": lambda q, k: (
        torch.zeros(q.shape[2], k.shape[2])
        .masked_fill(~causal(q, k), INF)
        .masked_fill(rows(q) - keys(k) >= 20, INF)[None, None]
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_windowed_layer_gets_the_intersection(name, dynamic, eager):
    (node,) = check(WINDOWS[name], tensors(), eager=eager, dynamic=dynamic)
    assert node.args[8] == 19


@pytest.mark.parametrize("lowering", ["reference", "blocked"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_windowed_layers_in_the_lowerings(lowering, padded, eager):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :40], valid[1, -3:] = 0, 0

    def mask_of(q, k, m):
        mask = causal(q, k) & (rows(q) - keys(k) < 20)
        return mask & m.bool()[:, None, None, :] if padded else mask

    check(mask_of, tensors(), valid, eager=eager, lowering=lowering)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_windowed_layer_compiled_with_flex(padded):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :40] = 0

    def mask_of(q, k, m):
        mask = causal(q, k) & (rows(q) - keys(k) < 20)
        return mask & m.bool()[:, None, None, :] if padded else mask

    args = tensors()
    got = torch.compile(Model(mask_of), backend=tmx_backend(CONFIG, lowering="flex", strict=True))(*args, valid)
    torch.testing.assert_close(got.double(), expected(*args, mask_of(*args[:2], valid)), atol=2e-5, rtol=0)


def test_a_window_no_longer_than_the_triangles_saves_nothing(eager):
    def mask_of(q, k):
        return causal(q, k) & (rows(q) - keys(k) <= WINDOW)

    report = explain(Model(mask_of), *tensors(), config=CONFIG)
    (site,) = report
    assert site.reason == Reason.WINDOWED.name
    assert site.detail == f"{WINDOW + 1} keys"


# Caches -------------------------------------------------------------------------------------------------------------


def test_a_static_cache_with_rows_from_its_start(eager):
    """Keys beyond the rows are never attended: they are cut off."""
    (node,) = check(lambda q, k: keys(k) <= rows(q), tensors(300), eager=eager, first=0)
    assert node.args[1].meta["example_value"].shape[2] == N


def test_a_static_cache_at_a_known_offset(eager):
    (node,) = check(lambda q, k: keys(k) <= rows(q, 30), tensors(300), eager=eager, first=30)
    assert node.args[1].meta["example_value"].shape[2] == N + 30


def test_a_static_cache_of_dynamic_length(eager):
    check(lambda q, k: keys(k) <= rows(q), tensors(300), eager=eager, first=0, dynamic=True)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("first", [0, 30, 180])
def test_a_static_cache_at_an_offset_that_the_run_tells(first, padded, eager):
    valid = torch.ones(B, 300, dtype=torch.long)
    valid[1, : first + 20] = 0

    def mask_of(q, k, start, m):
        mask = keys(k) <= rows(q) + start
        return mask & m.bool()[:, None, None, :] if padded else mask

    args = tensors(300)
    args[1][:, :, first + N :] = float("nan")  # what lies beyond the rows must not matter
    args = (args[0], args[1].nan_to_num(1e4), args[2])
    check(mask_of, args, torch.tensor(first), valid, eager=eager, first=first)


def test_a_chunk_after_a_cache(eager):
    check(lambda q, k: keys(k) <= rows(q, 60), tensors(N + 60), eager=eager)


def test_a_row_beyond_the_cache_fails_loudly(eager):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    model = torch.compile(Model(lambda q, k, start: keys(k) <= rows(q) + start), backend=backend)
    with pytest.raises(ValueError, match=f"start at key 11, and {N} rows among {N + 10} keys start at 0 to 10"):
        model(*tensors(N + 10), torch.tensor(11))


# Documents ----------------------------------------------------------------------------------------------------------


def numbers():
    """Three documents in one sequence, two in the other; of very different lengths."""
    document = torch.zeros(B, N, dtype=torch.long)
    document[0, 50:], document[0, 53:] = 1, 2
    document[1, 7:] = 5
    return document


DOCUMENTS = {
    "equal numbers": lambda q, k, d: causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]),
    "difference": lambda q, k, d: causal(q, k) & ((d[:, None, None, :] - d[:, None, :, None]) == 0),
    "not different": lambda q, k, d: ~((keys(k) > rows(q)) | (d[:, None, None, :] != d[:, None, :, None])),
    "additive": lambda q, k, d: torch.where(causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]), 0.0, INF),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed_documents(name, dynamic, eager):
    document = numbers()
    check(DOCUMENTS[name], tensors(), document, eager=eager, document=document, dynamic=dynamic)


def test_packed_documents_with_padding(eager):
    document, valid = numbers(), torch.ones(B, N, dtype=torch.bool)
    valid[0, 60:70], valid[1, -9:] = False, False

    def mask_of(q, k, d, m):
        return causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]) & m[:, None, None, :]

    check(mask_of, tensors(), document, valid, eager=eager, document=document)


def test_documents_of_other_keys_are_refused(eager):
    """Rows and keys read different numbers: not one document condition."""

    def mask_of(q, k, d):
        return causal(q, k) & (d[:, None, :, None] == d[:, None, None, :].flip(-1))

    (site,) = explain(Model(mask_of), *tensors(), numbers(), config=CONFIG)
    assert site.reason == Reason.MASK_UNKNOWN.name


# Keys named by numbers ----------------------------------------------------------------------------------------------

BY_LENGTH = {
    "key < length": lambda q, k, n: causal(q, k) & (keys(k) < n[:, None, None, None]),
    "key >= start": lambda q, k, n: causal(q, k) & (keys(k) >= n[:, None, None, None] - 80),
    "between": lambda q, k, n: (
        causal(q, k) & (keys(k) < n[:, None, None, None]) & (keys(k) + 80 >= n[:, None, None, None])
    ),
    "either": lambda q, k, n: causal(q, k) & ((keys(k) < 30) | (keys(k) >= n[:, None, None, None] - 50)),
    "not one key": lambda q, k, n: causal(q, k) & (keys(k) != 17),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_valid_keys_by_number(name, eager):
    check(BY_LENGTH[name], tensors(), torch.tensor([100, 90]), eager=eager)


# Additive masks in the ways models write them -----------------------------------------------------------------------


def big(number):
    return lambda q, k, m: torch.where(causal(q, k) & m.bool()[:, None, None, :], 0.0, number)


ADDITIVE = {
    "-1e4": big(-1e4),
    "-1e9": big(-1e9),
    "finfo.min": big(torch.finfo(torch.float32).min),
    "sum of two": lambda q, k, m: (
        torch.where(causal(q, k), 0.0, -1e9) + torch.where(m.bool(), 0.0, -1e9)[:, None, None, :]
    ),
    "one minus": lambda q, k, m: (1.0 - (causal(q, k) & m.bool()[:, None, None, :]).float()) * -10000.0,
    "rsub": lambda q, k, m: torch.rsub((causal(q, k) & m.bool()[:, None, None, :]).to(torch.float32), 1.0) * -1e9,
    "inverted": lambda q, k, m: (~(causal(q, k) & m.bool()[:, None, None, :])).to(torch.float32) * torch.finfo().min,
    "nested where": lambda q, k, m: torch.where(
        causal(q, k), torch.where(m.bool()[:, None, None, :], 0.0, INF), torch.tensor(INF)
    ),
    "min of a full": lambda q, k, m: (
        torch.full((q.shape[2], k.shape[2]), torch.finfo().min)
        .triu(1)[None, None]
        .masked_fill(m[:, None, None, :] == 0, torch.finfo().min)
    ),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_masks(name, eager):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :33] = 0
    check(ADDITIVE[name], tensors(), valid, eager=eager)


def test_not_low_enough_is_a_bias(eager):
    (site,) = explain(Model(big(-1000.0)), *tensors(), torch.ones(B, N), config=CONFIG)
    assert (site.reason, site.detail) == (Reason.FLOAT_BIAS.name, "adds -1000 to scores")


# The promise --------------------------------------------------------------------------------------------------------


def handed(q, k, mask):
    return mask


def whole_mask(kv_len=N, first=0, dtype=torch.bool):
    valid = torch.ones(B, kv_len, dtype=torch.bool)
    valid[1, :33] = False
    mask = (torch.arange(kv_len)[None, :] <= torch.arange(first, first + N)[:, None]) & valid[:, None, None, :]
    if dtype is torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
def test_a_mask_that_is_handed_in_needs_the_promise(dtype, eager):
    args, mask = tensors(), whole_mask(dtype=dtype)
    (site,) = explain(Model(handed), *args, mask, config=CONFIG)
    assert site.reason == (Reason.MASK_UNKNOWN if dtype is torch.bool else Reason.FLOAT_BIAS).name
    torch._dynamo.reset()
    check(handed, args, mask, eager=eager, assume_causal=True)


@pytest.mark.parametrize("first", [0, 25])
def test_a_promised_mask_over_a_static_cache(first, eager):
    check(handed, tensors(300), whole_mask(300, first), eager=eager, first=first, assume_causal=True)


BROKEN = {
    "a later key": lambda mask: mask.index_put(
        (torch.tensor(0), torch.tensor(0), torch.tensor(3), torch.tensor(9)), torch.tensor(True)
    ),
    "an earlier key is missing": lambda mask: mask.index_put(
        (torch.tensor(0), torch.tensor(0), torch.tensor(30), torch.tensor(9)), torch.tensor(False)
    ),
    "a window": lambda mask: mask & ~whole_mask().roll(50, 2),
    "everything": torch.ones_like,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_fails_loudly(name, eager):
    model = torch.compile(Model(handed), backend=tmx_backend(CONFIG, lowering="operator", assume_causal=True))
    args = tensors()
    model(*args, whole_mask())
    with pytest.raises(ValueError, match="assume_causal was promised, but a mask is not causal"):
        model(*args, BROKEN[name](whole_mask()))


def test_a_promised_bias_fails_loudly(eager):
    model = torch.compile(Model(handed), backend=tmx_backend(CONFIG, lowering="operator", assume_causal=True))
    with pytest.raises(ValueError, match="other than 0 and minus infinity"):
        model(*tensors(), whole_mask(dtype=torch.float32) - 0.5)


def by_positions(q, k, positions):
    return keys(k) <= positions[:, None]


def from_buffer(q, k, positions):
    return torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()[positions]


@pytest.mark.parametrize("behind", [-3, 2])
def test_a_constant_beside_the_promised_positions_counts(behind, eager):
    """Rows at their position plus a number: as where a prefix stands before the tokens that are counted."""

    def shifted(q, k, positions):
        return keys(k) <= positions[:, None] + behind

    args, positions = tensors(300), torch.arange(20, 20 + N)
    check(shifted, args, positions, eager=eager, first=20 + behind, assume_causal=True)


@pytest.mark.parametrize("mask_of", [by_positions, from_buffer])
def test_row_positions_that_are_handed_in_need_the_promise(mask_of, eager):
    args, positions = tensors(300), torch.arange(20, 20 + N)
    (site,) = explain(Model(mask_of), *args, positions, config=CONFIG)
    assert site.reason in (Reason.POSITIONS_UNKNOWN.name, Reason.MASK_UNKNOWN.name)
    torch._dynamo.reset()
    backend = tmx_backend(CONFIG, lowering="operator", strict=True, assume_causal=True)
    model = torch.compile(Model(mask_of), backend=backend)
    want = expected(*args, mask_of(*args[:2], positions), 20)
    torch.testing.assert_close(model(*args, positions).double(), want, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="the positions of the rows are not consecutive"):
        model(*args, positions.flip(0))


# Buffers whose values are known ------------------------------------------------------------------------------------


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
        (site,) = explain(Model(Buffered(mask)), *tensors(), config=CONFIG)
        assert site.reason == Reason.MASK_UNKNOWN.name


def test_a_changed_buffer_fails_loudly_and_the_same_again_does_not(eager):
    mask_of = Buffered(lower.clone())
    model = torch.compile(Model(mask_of), backend=tmx_backend(CONFIG, lowering="operator", strict=True))
    args = tensors()
    want = model(*args)
    mask_of.mask.copy_(lower)
    assert torch.equal(model(*args), want)
    mask_of.mask[3, 200] = True
    with pytest.raises(TriangleMixError, match="mask_ has changed since the model was compiled"):
        model(*args)


# Position ids that start again with every document -------------------------------------------------------------------


def positions_of(document):
    """The position ids of packed documents: counted from 0 in each."""
    place = torch.arange(document.shape[1]).expand_as(document)
    first = torch.where(document.diff(dim=1, prepend=document[:, :1] - 1) != 0, place, 0).cummax(1).values
    return place - first


def packed(q, k, p, step=1, causal_by=None):
    """Documents as the running count of breaks; causality in the position ids themselves."""
    number = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != step).cumsum(-1)
    same = number[:, None, :, None] == number[:, None, None, :]
    return same & (causal(q, k) if causal_by is None else causal_by(p))


PACKED = {
    "causal by place": lambda q, k, p: packed(q, k, p),
    "causal by position": lambda q, k, p: packed(
        q, k, p, causal_by=lambda p: p[:, None, None, :] <= p[:, None, :, None]
    ),
    "causal and windowed by position": lambda q, k, p: packed(
        q,
        k,
        p,
        causal_by=lambda p: (
            (p[:, None, None, :] <= p[:, None, :, None]) & (p[:, None, :, None] - p[:, None, None, :] < 20)
        ),
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PACKED)
def test_documents_given_by_position_ids(name, dynamic, eager):
    document = numbers()
    positions = positions_of(document)
    assert positions[0, 48:56].tolist() == [48, 49, 0, 1, 2, 0, 1, 2]
    check(PACKED[name], tensors(), positions, eager=eager, document=document, dynamic=dynamic)


def test_position_ids_prove_nothing_across_documents(eager):
    """Without the document condition, or with counts of other breaks, a smaller position id is no earlier place."""

    def alone(q, k, p):
        return p[:, None, None, :] <= p[:, None, :, None]

    def by_twos(q, k, p):
        return packed(q, k, p, step=2, causal_by=lambda p: p[:, None, None, :] <= p[:, None, :, None])

    for mask_of in (alone, by_twos):
        torch._dynamo.reset()
        (site,) = explain(Model(mask_of), *tensors(), positions_of(numbers()), config=CONFIG)
        assert site.decision == "dense"
        assert site.reason in (Reason.POSITIONS_UNKNOWN.name, Reason.MASK_UNKNOWN.name)


# Masks and writes in place -------------------------------------------------------------------------------------------


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
