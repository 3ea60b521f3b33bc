"""nn.MultiheadAttention and nn.TransformerEncoderLayer: one node each of a Dynamo graph, laid open and closed again."""

import pytest
import torch
from torch import nn

from tests.support.oracle import attended
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.graph.children import flatten, restore
from tmx_compile.graph.composite import COMPOSITES
from tmx_compile.operator import OPERATOR
from tmx_compile.testing import captured_graphs, render_graph

B, N, E, H = 2, 70, 16, 4
CONFIG = TriangleMixConfig(
    num_sink_tokens=3, sliding_window_size=9, num_last_tokens=6, triangle_layer_indices=[1], min_seq_len=20
)
VALID = torch.ones(B, N, dtype=torch.bool)
VALID[0, 60:] = False
VALID[1, :7] = False


def causal(n, kind=torch.float32):
    mask = torch.ones(n, n, dtype=torch.bool).triu(1)
    return mask if kind is torch.bool else torch.zeros(n, n, dtype=kind).masked_fill(mask, float("-inf"))


class Block(nn.Module):
    """``nn.MultiheadAttention`` on (B, N, E), called as ``call`` does."""

    def __init__(self, call, **kwargs):
        super().__init__()
        self.batch_first = kwargs.setdefault("batch_first", True)
        self.self_attn = nn.MultiheadAttention(E, H, **kwargs)
        self.call = call

    def forward(self, x, padding):
        y = x if self.batch_first else x.transpose(0, 1)
        out = self.call(self.self_attn, y, padding, x.shape[1])
        return x + (out if self.batch_first else out.transpose(0, 1))


class Stack(nn.Module):
    def __init__(self, call, layers=2, **kwargs):
        super().__init__()
        self.layers = nn.ModuleList(Block(call, **kwargs) for _ in range(layers))

    def forward(self, x, padding=None):
        for layer in self.layers:
            x = layer(x, padding)
        return x


CALLS = {
    "is_causal and a float mask": lambda attn, x, padding, n: attn(
        x, x, x, attn_mask=causal(n), is_causal=True, need_weights=False
    )[0],
    "a float mask": lambda attn, x, padding, n: attn(x, x, x, attn_mask=causal(n), need_weights=False)[0],
    "a bool mask": lambda attn, x, padding, n: attn(x, x, x, attn_mask=causal(n, torch.bool), need_weights=False)[0],
    "weights that nothing needs": lambda attn, x, padding, n: attn(x, x, x, attn_mask=causal(n, torch.bool))[0],
    "weights and is_causal": lambda attn, x, padding, n: attn(x, x, x, attn_mask=causal(n), is_causal=True)[0],
    "three tensors": lambda attn, x, padding, n: attn(
        x, x + 0, x * 1, attn_mask=causal(n), is_causal=True, need_weights=False
    )[0],
    "a mask of each head": lambda attn, x, padding, n: attn(
        x, x, x, attn_mask=causal(n).expand(B * H, -1, -1), need_weights=False
    )[0],
}
PADDED = {
    "bool masks": lambda attn, x, padding, n: attn(
        x, x, x, attn_mask=causal(n, torch.bool), key_padding_mask=padding, need_weights=False
    )[0],
    "float masks and is_causal": lambda attn, x, padding, n: attn(
        x,
        x,
        x,
        attn_mask=causal(n),
        key_padding_mask=torch.zeros(B, n).masked_fill(padding, float("-inf")),
        is_causal=True,
        need_weights=False,
    )[0],
}
SETTINGS = {"tokens first": {"batch_first": False}, "no bias": {"bias": False}}


def split(attn, x):
    """Query, key and value of self-attention in float64, (B, H, N, D)."""
    if attn._qkv_same_embed_dim:
        weights = attn.in_proj_weight.chunk(3)
    else:
        weights = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
    biases = attn.in_proj_bias.double().chunk(3) if attn.in_proj_bias is not None else (0, 0, 0)
    made = (x @ w.double().T + b for w, b in zip(weights, biases, strict=True))
    return [y.unflatten(-1, (H, E // H)).transpose(1, 2) for y in made]


def attention(attn, x, mask):
    q, k, v = split(attn, x)
    scores = (q @ k.transpose(2, 3) * (E // H) ** -0.5).masked_fill(~mask[:, None], float("-inf"))
    out = (torch.softmax(scores, -1).nan_to_num(0) @ v).transpose(1, 2).flatten(2)
    bias = 0 if attn.out_proj.bias is None else attn.out_proj.bias.double()
    return out @ attn.out_proj.weight.double().T + bias


def masks(valid):
    return [attended(N, N, valid, *CONFIG.geometry.counts), attended(N, N, valid, 0, 0, N)]


def expected(model, x, valid=None):
    x = x.double()
    for index, layer in enumerate(model.layers):
        x = x + attention(layer.self_attn, x, masks(valid)[0 if index in CONFIG.layers() else 1])
    return x


def check(model, x, padding=None, want=None, valid=None, graphs=None):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    out = torch.compile(model, backend=backend, dynamic=False)(x, padding)
    want = expected(model, x, valid) if want is None else want
    rows = slice(None) if valid is None else valid[..., None].expand(out.shape)
    torch.testing.assert_close(out.double()[rows], want[rows], atol=2e-5, rtol=0)
    assert [(site.layer, site.decision) for site in backend.report] == [(0, "dense"), (1, "triangle")]
    assert sum(node.target is OPERATOR for node in graphs[-1].graph.nodes) in (1, 2)
    return backend.report


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("call", CALLS)
def test_multihead_attention(call, mode, eager):
    model, x = Stack(CALLS[call]), torch.randn(B, N, E)
    model.train(mode == "training")
    with torch.set_grad_enabled(mode == "training"):
        report = check(model, x, graphs=eager)
    assert [site.path for site in report] == [f"layers.{i}.self_attn" for i in range(2)]


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting, eager):
    for call in ("is_causal and a float mask", "weights that nothing needs"):
        torch._dynamo.reset()
        check(Stack(CALLS[call], **SETTINGS[setting]), torch.randn(B, N, E), graphs=eager)


@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize("call", PADDED)
def test_padding(call, mode, eager):
    model, x = Stack(PADDED[call]), torch.randn(B, N, E)
    model.train(mode == "training")
    with torch.set_grad_enabled(mode == "training"):
        check(model, x, ~VALID, valid=VALID, graphs=eager)


def test_projections_of_their_own(eager):
    model = Stack(CALLS["is_causal and a float mask"], kdim=E, vdim=E)
    for layer in model.layers:
        layer.self_attn = nn.MultiheadAttention(E, H, kdim=E, vdim=E, batch_first=True)
        layer.self_attn._qkv_same_embed_dim = True
    check(model, torch.randn(B, N, E), graphs=eager)


def test_gradients(eager):
    model, x = Stack(CALLS["a bool mask"]), torch.randn(B, N, E, requires_grad=True)
    out = torch.compile(model, backend=tmx_backend(CONFIG, lowering="operator", strict=True))(x)
    want = expected(model, x)
    inputs = [x, *model.parameters()]
    got = torch.autograd.grad(out.square().sum(), inputs)
    right = torch.autograd.grad(want.square().sum(), inputs)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_dynamic_lengths(eager):
    model = Stack(CALLS["is_causal and a float mask"])
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    run = torch.compile(model, backend=backend)
    for n in (N, 50):
        x = torch.randn(B, n, E)
        torch._dynamo.mark_dynamic(x, 1)
        want = x.double()
        for index, geometry in ((0, (0, 0, n)), (1, CONFIG.geometry.counts)):
            want = want + attention(model.layers[index].self_attn, want, attended(n, n, None, *geometry))
        torch.testing.assert_close(run(x).double(), want, atol=2e-5, rtol=0)
    assert backend.report.graphs == 1


REFUSED = {
    "weights": (lambda attn, x, padding, n: torch.cat(attn(x, x, x, attn_mask=causal(n)), -1)[..., :E], {}, None),
    "dropout": (CALLS["is_causal and a float mask"], {"dropout": 0.3}, "DROPOUT"),
    "no mask": (lambda attn, x, padding, n: attn(x, x, x, need_weights=False)[0], {}, "NOT_CAUSAL"),
    "a key more": (CALLS["a float mask"], {"add_zero_attn": True}, None),
    "a learned key": (CALLS["a float mask"], {"add_bias_kv": True}, None),
    "not causal": (
        lambda attn, x, padding, n: attn(x, x, x, attn_mask=causal(n).transpose(0, 1), need_weights=False)[0],
        {},
        "NOT_CAUSAL",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_as_it_is(name, eager):
    call, settings, reason = REFUSED[name]
    model, x = Stack(call, **settings), torch.randn(B, N, E)
    (before,) = captured_graphs(model, x, dynamic=False)
    torch._dynamo.reset()
    backend = tmx_backend(CONFIG, lowering="operator")
    torch.manual_seed(1)
    out = torch.compile(model, backend=backend, dynamic=False)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(out, model(x), atol=1e-6, rtol=0)
    assert backend.report.triangle() == []
    assert [site.layer for site in backend.report] == [0, 1]
    if reason is not None:
        assert backend.report.sites[1].reason == reason
    assert render_graph(eager[-1]) == render_graph(before)


def test_other_layers_keep_their_node(eager):
    model, x = Stack(CALLS["is_causal and a float mask"], layers=3), torch.randn(B, N, E)
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    torch.compile(model, backend=backend)(x)
    assert [site.decision for site in backend.report] == ["dense", "triangle", "dense"]
    assert sum(node.target in COMPOSITES for node in eager[-1].graph.nodes) == 2


def test_under_autocast(eager):
    """Whatever is done with it is right, and on record."""
    model, x = Stack(CALLS["is_causal and a float mask"]), torch.randn(B, N, E)
    backend = tmx_backend(CONFIG, lowering="operator")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(model, x), atol=5e-2, rtol=0)
    assert [site.decision for site in backend.report] == ["dense", "triangle"]


# The encoder layer --------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True, **kwargs)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding=None):
        mask = causal(x.shape[1], torch.float32 if padding is None else torch.bool)
        return self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=True)


def encoded(model, x, valid):
    x = x.double()
    model = model.encoder.double()
    for index, layer in enumerate(model.layers):
        mask = masks(valid)[0 if index in CONFIG.layers() else 1]

        def feed(x, layer=layer):
            return layer.linear2(layer.activation(layer.linear1(x)))

        if layer.norm_first:
            x = x + attention(layer.self_attn, layer.norm1(x), mask)
            x = x + feed(layer.norm2(x))
        else:
            x = layer.norm1(x + attention(layer.self_attn, x, mask))
            x = layer.norm2(x + feed(x))
    return x


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mode", ["training", "inference"])
@pytest.mark.parametrize(
    "settings", [{}, {"norm_first": True}, {"activation": "gelu"}], ids=lambda x: "-".join(x) or "default"
)
def test_encoder_layer(settings, mode, padded, eager):
    torch.manual_seed(0)
    model, x = Encoder(**settings), torch.randn(B, N, E)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.train(mode == "training")
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    with torch.set_grad_enabled(mode == "training"):
        out = torch.compile(model, backend=backend, dynamic=False)(x, ~VALID if padded else None)
    assert [(site.layer, site.decision) for site in backend.report] == [(0, "dense"), (1, "triangle")]
    valid = VALID if padded else None
    want = encoded(model, x, valid)
    rows = slice(None) if valid is None else valid[..., None].expand(out.shape)
    torch.testing.assert_close(out.double()[rows], want[rows], atol=5e-5, rtol=0)


def test_laid_open_and_closed_again():
    for model in (Encoder().eval(), Stack(CALLS["a bool mask"])):
        torch._dynamo.reset()
        with torch.no_grad():
            (gm,) = captured_graphs(model, torch.randn(B, N, E), dynamic=False)
        flat = flatten(gm)
        assert not any(node.target in COMPOSITES for node in flat.graph.nodes)
        restore(flat)
        # All but a write into a tensor that nothing else sees, which is not undone.
        assert render_graph(flat) == render_graph(gm).replace("masked_fill_(", "masked_fill(")
