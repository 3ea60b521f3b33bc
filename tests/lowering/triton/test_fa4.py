"""The ``fa4`` lowering: what it asks of FlashAttention-4, which runs on GPUs only, and what it makes of the answer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import oracle, tolerance
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.lowering import fa4, table
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.table import FA4, Role, Wish
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import ALL_ROWS
from tmx_compile.report import Accepted, Rejected
from tmx_compile.request import Host

DENSE = Geometry(0, 0, ALL_ROWS)
f16, bf16 = torch.float16, torch.bfloat16
# The package is a stand-in; our own kernel, which completes its result, runs where there is a GPU on that.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Package:
    """Stands for flash-attn-4: checks what it is called with as the package does, and leaves other rows as garbage."""

    def __init__(self):
        self.lengths = []

    def dense(self, q, k, v, *, softmax_scale, causal):
        batch, count, *_ = q.shape
        self.check(q, k, v, softmax_scale, causal)
        self.lengths += [count] * batch
        rows = [
            F.scaled_dot_product_attention(*self.heads(q[b], k[b], v[b]), **self.how(softmax_scale))
            for b in range(batch)
        ]
        return torch.stack(rows).transpose(1, 2).to(q.dtype).contiguous(), None

    def ragged(self, q, k, v, **named):
        scale, causal = named.pop("softmax_scale"), named.pop("causal")
        count = named.pop("max_seqlen_q")
        assert count == named.pop("max_seqlen_k")
        begin, used = named.pop("cu_seqlens_q"), named.pop("seqused_q")
        assert begin is named.pop("cu_seqlens_k")
        assert used is named.pop("seqused_k")
        assert not named
        assert begin.dtype == used.dtype == torch.int32
        assert begin.is_contiguous()
        assert used.is_contiguous()
        assert begin.shape == (used.shape[0] + 1,)
        assert begin[-1] == q.shape[0]
        assert (begin[:-1] + used <= q.shape[0]).all()
        assert (used <= count).all()
        self.check(q, k, v, scale, causal)
        out = torch.full_like(q, float("nan"))
        for first, length in zip(begin.tolist(), used.tolist(), strict=False):
            part = slice(first, first + length)
            self.lengths.append(length)
            if length:
                rows = F.scaled_dot_product_attention(*self.heads(q[part], k[part], v[part]), **self.how(scale))
                out[part] = rows.transpose(0, 1).to(q.dtype)
        return out

    @staticmethod
    def check(q, k, v, scale, causal):
        assert q.dtype == k.dtype == v.dtype
        assert q.dtype in (f16, bf16)
        assert {x.stride(-1) for x in (q, k, v)} == {1}
        assert all(stride % 8 == 0 for x in (q, k, v) for stride in x.stride()[:-1])
        assert isinstance(scale, float)
        assert causal is True

    @staticmethod
    def heads(q, k, v):
        group = q.shape[1] // k.shape[1]
        return tuple(
            x.transpose(0, 1).double() for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        )

    @staticmethod
    def how(scale):
        return {"scale": scale, "is_causal": True}


@pytest.fixture
def package(monkeypatch):
    package = Package()
    monkeypatch.setattr(fa4, "functions", lambda: (package.dense, package.ragged))
    monkeypatch.setattr(fa4, "LEAST_TOKENS", 0)
    monkeypatch.setattr(fa4, "missing", lambda device: None)
    return package


def operands(count, batch=1, heads=4, kv_heads=2, dim=64, dtype=f16):
    return [
        torch.randn(batch, count, h, dim, dtype=dtype, device=DEVICE).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]


def call_of(query, key, value, key_mask=None, **changes):
    call = AttentionCall(query, key, value, key_mask, DENSE, 64**-0.5, needs_grad=False)
    return replace(call, **changes)


def reference(*call):
    """The oracle's result for tensors on any device, on their device."""
    out, _ = oracle(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in call))
    return out.to(DEVICE)


MASKS = {
    "no padding": ((0, 100),),
    "left": ((37, 100), (0, 100)),
    "right": ((0, 61), (0, 100)),
    "both": ((5, 80), (99, 100)),
    "nothing valid": ((0, 0), (20, 100)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
def test_padded_rows_and_holes_are_added(name, holes, package):
    valid = MASKS[name]
    mask = torch.zeros(len(valid), 100, dtype=torch.bool, device=DEVICE)
    for row, (start, end) in zip(mask, valid, strict=True):
        row[start:end] = True
        if holes and end - start > 40:
            row[(start + end) // 2] = False
    qkv = operands(100, len(valid))
    out = immediate(FA4, call_of(*qkv, mask))
    want = reference(*qkv, mask, 0, 0, ALL_ROWS, 64**-0.5)
    torch.testing.assert_close(out.double(), want, atol=tolerance(f16), rtol=0)
    # It is asked for the rows of unbroken sequences and for no others.
    assert package.lengths == [0 if holes and b - a > 40 else b - a for a, b in valid]


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_without_a_mask(dtype, package):
    qkv = operands(77, 2, dtype=dtype)
    out = immediate(FA4, call_of(*qkv))
    want = reference(*qkv, None, 0, 0, ALL_ROWS, 64**-0.5)
    torch.testing.assert_close(out.double(), want, atol=tolerance(dtype), rtol=0)
    assert package.lengths == [77, 77]


def test_short_prompts_do_not_call_it(package, monkeypatch):
    monkeypatch.setattr(fa4, "LEAST_TOKENS", 4096)
    qkv = operands(90)
    mask = torch.arange(90, device=DEVICE)[None] >= 20
    for key_mask in (None, mask):
        want = reference(*qkv, key_mask, 0, 0, ALL_ROWS, 64**-0.5)
        out = immediate(FA4, call_of(*qkv, key_mask))
        torch.testing.assert_close(out.double(), want, atol=tolerance(f16), rtol=0)
    assert package.lengths == []


def test_operands_of_any_layout(package):
    """Heads outside of tokens, and elements that are not side by side."""
    query, key, value = operands(50)
    qkv = [query.contiguous(), key.transpose(2, 3).contiguous().transpose(2, 3), value]
    want = reference(*qkv, None, 0, 0, ALL_ROWS, 64**-0.5)
    torch.testing.assert_close(immediate(FA4, call_of(*qkv)).double(), want, atol=tolerance(f16), rtol=0)


def test_opcheck(package):
    mask = torch.arange(40, device=DEVICE)[None] >= 7
    extent = torch.tensor([[7, 40, 0]], dtype=torch.int32, device=DEVICE)
    whole = torch.tensor([[7, 40]], dtype=torch.int32, device=DEVICE)
    for padding in ((None, None, None), (mask, extent, whole)):
        torch.library.opcheck(fa4.FA4_OPERATOR, (*operands(40), *padding, 0.1))


def test_refusals(package):
    long = operands(30)
    short = [x[:, :, :20] for x in operands(20)]
    refused = {
        "causal and padding only": call_of(*long, geometry=Geometry(0, 0, ALL_ROWS, 9)),
        "equal numbers": call_of(short[0], *long[1:]),
        "forward only": call_of(*long, needs_grad=True),
        "float32": call_of(*(x.float() for x in long)),
        "head dims 80 and 80": call_of(*operands(30, dim=80)),
        "scale=-1.0": call_of(*long, scale=-1.0),
    }
    for why, call in refused.items():
        answer = FA4.supports(call)
        assert isinstance(answer, Rejected)
        assert answer.detail.startswith("fa4: ")
        assert why in answer.detail
    assert FA4.supports(call_of(*long)) == Accepted()


def test_what_is_missing_is_told(monkeypatch):
    cuda = torch.device("cuda")
    assert "got cpu" in fa4.missing(torch.device("cpu"))
    assert fa4.missing(cuda) == "flash-attn-4 is not installed"
    monkeypatch.setattr(fa4, "installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper" in fa4.missing(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fa4.missing(cuda) is None


@pytest.mark.parametrize("role", [Role.MASKLESS, Role.FASTER], ids=["masked", "plain"])
def test_who_gets_it(role, package):
    call = call_of(*operands(30))
    assert table.choose("cuda", role, call, Wish()) is FA4
    assert table.choose("cuda", role, call, Wish("triton")) is FA4
    # Whoever names another lowering, trains, or hands the graph to somebody else keeps what was there.
    for place, wish, asked in (
        ("cuda", Wish("flex"), call),
        ("cuda", Wish(), replace(call, needs_grad=True)),
        ("portable", Wish(), call),
        ("cpu", Wish(), call),
    ):
        assert table.choose(place, role, asked, wish) is not FA4


class Layer(nn.Module):
    def forward(self, x, mask):
        q = x.unflatten(-1, (2, 64)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q.roll(1, 2), q.flip(2), mask, is_causal=mask is None).transpose(
            1, 2
        ).flatten(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, padding=None):
        mask = None
        if padding is not None:
            place = torch.arange(x.shape[1], device=x.device)
            mask = ((place[None] <= place[:, None])[None] & (padding != 0)[:, None, :])[:, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytest.mark.usefixtures("sparse_from_min_seq_len")
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "with a mask"])
def test_the_dense_layers_of_a_compiled_model(padded, package, eager, monkeypatch):
    monkeypatch.setattr(Host, "place", lambda self, device: "cuda")
    config = TriangleMixConfig(
        triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=100
    )
    backend = tmx_backend(config)
    x = torch.randn(2, 120, 128, dtype=f16, device=DEVICE)
    padding = torch.ones(2, 120, dtype=torch.int64, device=DEVICE)
    padding[0, :30] = 0
    args = (x, padding) if padded else (x,)
    with torch.no_grad():
        out = torch.compile(Model(), backend=backend)(*args)
    sites = backend.report.sites
    assert [(site.decision, site.lowering) for site in sites] == [("dense", "fa4"), ("triangle", "triton")]
    want = x.double()
    key_mask = padding.bool() if padded else None
    for geometry in ((0, 0, ALL_ROWS), (4, 16, 8)):
        q = want.to(f16).double().unflatten(-1, (2, 64)).transpose(1, 2)
        made = reference(q, q.roll(1, 2), q.flip(2), key_mask, *geometry, 64**-0.5)
        want = want + made.transpose(1, 2).flatten(2)
    shown = slice(None) if key_mask is None else key_mask
    torch.testing.assert_close(out.double()[shown], want[shown], atol=0.02, rtol=0)
    assert package.lengths == ([90, 120] if padded else [120, 120])
