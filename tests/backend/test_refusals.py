"""Attention that stays as it is: other kinds, other forms, unknown layers; each with its reason on record."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import CONFIG, Layer, N, Stack, causal, check_dense, expected, qkv, random, reasons
from tests.support.models import tiny_qwen3
from tests.support.oracle import oracle
from tmx_compile import explain, tmx_backend
from tmx_compile.errors import StrictModeError
from tmx_compile.find import find_attention
from tmx_compile.find.sdpa import SDPA_TARGETS
from tmx_compile.graph.nodes import fake_mode_of, tensor_of
from tmx_compile.report import Reason, Rejected
from tmx_compile.testing import captured_graphs


def tril(x):
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()


def distance(x):
    i = torch.arange(x.shape[2])
    return (i[None, :] - i[:, None]).float()


def alibi(x):
    """A slope per head on the distance, beside a causal mask: what ALiBi models hand to SDPA."""
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    bias = (slopes * distance(x)).masked_fill(distance(x) > 0, float("-inf"))
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias[None])


def opened(mask):
    mask[:, 3] = True
    return mask


OTHERS = {
    "encoder": (lambda x: F.scaled_dot_product_attention(x, x, x), Reason.NOT_CAUSAL),
    "cross-attention": (
        lambda x: F.scaled_dot_product_attention(x, F.pad(x, (0, 0, 9, 9)), F.pad(x, (0, 0, 9, 9))),
        Reason.NOT_CAUSAL,
    ),
    "cross-attention to fewer": (
        lambda x: F.scaled_dot_product_attention(x, x[:, :, :99], x[:, :, :99]),
        Reason.MORE_QUERIES,
    ),
    "is_causal over more keys": (
        lambda x: F.scaled_dot_product_attention(x, F.pad(x, (0, 0, 9, 9)), F.pad(x, (0, 0, 9, 9)), is_causal=True),
        Reason.TOP_LEFT,
    ),
    "ALiBi": (alibi, Reason.FLOAT_BIAS),
    "distance alone": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=distance(x).abs().neg()),
        Reason.FLOAT_BIAS,
    ),
    "a mask from the data": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=tril(x) & (x[..., :1] > 0)),
        Reason.MASK_UNKNOWN,
    ),
    "a mask written in place": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=opened(tril(x))),
        Reason.WRITTEN_IN_PLACE,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_left_alone(name, eager):
    attend, reason = OTHERS[name]
    report = check_dense(Stack(attend), reason, random(1, 2, N, 16))
    assert report.sites[0].reason == Reason.NOT_SELECTED.name


def test_a_mask_beside_is_causal(eager):
    """SDPA documents it as an error and some of its kernels take it: whichever it is stays as it is."""

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=tril(x), is_causal=True)

    x = random(1, 2, N, 16)
    try:
        attend(x)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=re.escape(str(error).splitlines()[0][:40])):
            torch.compile(Stack(attend), backend=tmx_backend(CONFIG))(x)
        return
    check_dense(Stack(attend), Reason.FORM, x)


def test_a_graph_without_shapes():
    """A hand-traced graph has no example values: nothing can be known of its attention."""
    (found,) = find_attention(torch.fx.symbolic_trace(causal))
    assert isinstance(found, Rejected)
    assert found.reason is Reason.FORM
    assert "no shape" in found.detail


def test_dropout_in_training(eager):
    model, ids = tiny_qwen3(2, attention_dropout=0.3).train(), torch.randint(0, 128, (1, N))
    (gm,) = captured_graphs(model, ids, use_cache=False)
    rejected = list(find_attention(gm))
    assert [r.reason for r in rejected if isinstance(r, Rejected)] == [Reason.DROPOUT] * 2
    torch._dynamo.reset()

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    # The same seed gives the same numbers: the site, and with it the distribution, is untouched.
    report = check_dense(Logits(), Reason.DROPOUT, ids)
    assert report.sites[1].detail == "dropout_p=0.3"
    model.eval()
    torch._dynamo.reset()
    assert len(explain(model, ids, config=CONFIG, strict=True, use_cache=False).triangle()) == 1


# The scale ----------------------------------------------------------------------------------------------------------


def test_a_scale_from_the_data(eager):
    """Dynamo cannot trace the call itself (SDPA tests the scale), so it runs outside of every graph."""
    x, backend = random(1, 2, N, 16), tmx_backend(CONFIG, strict=True)
    model = Stack(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=x.std().item()))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        out = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(out, model(x), atol=1e-6, rtol=0)
    assert backend.report.triangle() == []
    assert set(reasons(backend.report)) <= {"SCALE", "LAYER_UNKNOWN"}


def test_a_head_dim_that_is_not_known():
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    x = random(1, 2, N, 16)
    torch._dynamo.mark_dynamic(x, 3)
    (gm,) = captured_graphs(attend, x, dynamic=None)
    (found,) = find_attention(gm)
    assert isinstance(found, Rejected)
    assert found.reason is Reason.SCALE


# Layers -------------------------------------------------------------------------------------------------------------


def test_no_attention():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), random(3, 8)
    backend = tmx_backend(CONFIG, strict=True)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x), atol=1e-6, rtol=0)
    assert len(backend.report) == 0
    assert backend.report.graphs == 1
    assert "tmx_compile: attention sites" in str(backend.report)


class Broken(Stack):
    """A graph break between its layers."""

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](x)
        torch._dynamo.graph_break()
        return self.layers[2](x)


def test_layers_keep_their_numbers_across_graph_breaks(eager):
    x, backend = random(1, 2, N, 16), tmx_backend(CONFIG, strict=True)
    out = torch.compile(Broken(layers=3), backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(x, CONFIG, layers=3), atol=2e-5, rtol=0)
    assert [(site.graph, site.layer, site.decision) for site in backend.report] == [
        (0, 0, "dense"),
        (1, 1, "triangle"),
        (2, 2, "dense"),
    ]


class BreakingLayer(Layer):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + self.attend(x)


class BreakingLoop(Stack):
    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


class BreakingLayers(Stack):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(BreakingLayer() for _ in range(2))


@pytest.mark.parametrize("model", [BreakingLoop, BreakingLayers])
def test_a_break_inside_the_loop_is_right_or_on_record(model, eager):
    """Dynamo then compiles each layer by itself, and the path that it records may no longer tell which one."""
    x, backend = random(1, 2, N, 16), tmx_backend(CONFIG)
    out = torch.compile(model(), backend=backend)(x)
    placed = {site.layer for site in backend.report.triangle()}
    assert placed <= {1}
    config = CONFIG.replace(triangle_layer_indices=placed)
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    if not placed:
        assert set(reasons(backend.report)) == {Reason.LAYER_UNKNOWN.name}
        torch._dynamo.reset()
        with pytest.raises(Exception, match="names no layer"):
            torch.compile(model(), backend=tmx_backend(CONFIG, strict=True))(x)


def test_layers_compiled_one_by_one(eager):
    x, model, backend = random(1, 2, N, 16), Stack(), tmx_backend(CONFIG)
    for layer in model.layers:
        layer.compile(backend=backend)
    assert torch.equal(model(x), Stack()(x))
    assert set(reasons(backend.report)) == {Reason.LAYER_UNKNOWN.name}
    torch._dynamo.reset()
    strict = Stack()
    for layer in strict.layers:
        layer.compile(backend=tmx_backend(CONFIG, strict=True))
    with pytest.raises(Exception, match=re.escape(Reason.LAYER_UNKNOWN.value)) as error:
        strict(x)
    assert isinstance(error.value.inner_exception, StrictModeError)


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_two_stacks_of_causal_layers(eager):
    report = check_dense(TwoStacks(), Reason.LAYER_AMBIGUOUS, random(1, 2, N, 16))
    assert reasons(report) == ["NOT_SELECTED", "LAYER_AMBIGUOUS"] * 2
    assert report.sites[1].detail == "layers of decoder.layers and encoder.layers"


class Towers(nn.Module):
    """An encoder that is not causal beside a causal decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(OTHERS["encoder"][0]), Stack()

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_a_tower_that_is_not_causal_does_not_make_the_layers_ambiguous(eager):
    x, backend = random(1, 2, N, 16, dtype=torch.float64), tmx_backend(CONFIG)
    model = Towers()
    out = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(out, expected(model.encoder(x), CONFIG), atol=1e-10, rtol=0)
    assert [(s.path, s.decision, s.reason) for s in backend.report if s.layer == 1] == [
        ("encoder.layers.1", "dense", "NOT_CAUSAL"),
        ("decoder.layers.1", "triangle", ""),
    ]


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([Stack(), Stack()])

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x


def test_nested_indices(eager):
    report = check_dense(Stages(), Reason.LAYER_AMBIGUOUS, random(1, 2, N, 16))
    assert [site.path for site in report] == [f"stages.{s}.layers.{i}" for s in (0, 1) for i in (0, 1)]
    assert {site.layer for site in report} == {None}


# Lengths ------------------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """The length is the sum of two inputs' lengths."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Layer()])

    def forward(self, a, b):
        return self.layers[1](torch.cat([a, b], 2))


def test_a_range_across_the_threshold_that_no_input_tells(eager):
    a, b = random(1, 2, 60, 16), random(1, 2, 70, 16)
    for x in (a, b):
        torch._dynamo.mark_dynamic(x, 2, min=20, max=200)
    report = check_dense(Joined(), Reason.NO_DISPATCH, a, b)
    assert report.sites[0].layer == 1


def test_a_range_on_one_side_of_the_threshold_needs_no_input(eager):
    a, b = random(1, 2, 60, 16), random(1, 2, 70, 16)
    for x in (a, b):
        torch._dynamo.mark_dynamic(x, 2, min=51, max=200)
    backend = tmx_backend(CONFIG, strict=True)
    out = torch.compile(Joined(), backend=backend)(a, b)
    x = torch.cat([a, b], 2).double()
    want = x + oracle(*qkv(x), None, *CONFIG.geometry.counts, 0.25)[0]
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 1


# The vocabulary -----------------------------------------------------------------------------------------------------


def test_nothing_but_the_site_changes_where_a_site_is_refused():
    """The graph of a refused site is the captured graph, node for node."""
    from tmx_compile.testing import render_graph, rewritten_graphs

    model, x = Stack(OTHERS["ALiBi"][0]), random(1, 2, N, 16)
    (before,) = captured_graphs(model, x)
    torch._dynamo.reset()
    (after,) = rewritten_graphs(model, x, config=CONFIG, lowering="blocked")
    assert render_graph(before) == render_graph(after)
    assert sum(node.target in SDPA_TARGETS for node in after.graph.nodes) == 2
    assert fake_mode_of(after) is not None
    assert all(tensor_of(node) is not None for node in after.graph.nodes if node.target in SDPA_TARGETS)


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_is_asserted_by_some_test(reason):
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    assert any(re.search(rf"\bReason\.{reason.name}\b|\"{reason.name}\"", text) for text in texts)
