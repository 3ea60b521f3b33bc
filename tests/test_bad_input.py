"""Unusual and wrong input: right numbers, a clear error, or a reason on record. Never a crash, never silence.

Most graphs run uncompiled (the ``eager`` fixture): decisions and numbers are the pass's, Inductor only costs time.
"""

import logging
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import masked_oracle, oracle, tiny_qwen3
from torch import nn

from tmx_compile import TriangleMixConfig, explain, tmx_backend, triangle_attention
from tmx_compile.errors import LoweringError, StrictModeError
from tmx_compile.graph.find import find_attention
from tmx_compile.graph.find.sdpa import SDPA_TARGETS
from tmx_compile.graph.nodes import fake_mode_of, tensor_of
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.select import BLOCKED, FLEX, REFERENCE
from tmx_compile.report import Reason, Rejected
from tmx_compile.testing import captured_graphs

N = 150
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=100
)
DENSE = (0, 0, 2**31 - 1)


def qkv(x):
    """Three different tensors of one layer input."""
    return x, x.roll(1, -1), x.flip(-1)


def causal(x):
    return F.scaled_dot_product_attention(*qkv(x), is_causal=True)


class Layer(nn.Module):
    def __init__(self, attend=causal):
        super().__init__()
        self.attend = attend

    def forward(self, x, *rest):
        return x + self.attend(x, *rest)


class Stack(nn.Module):
    def __init__(self, attend=causal, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(attend) for _ in range(layers))

    def forward(self, x, *rest):
        for layer in self.layers:
            x = layer(x, *rest)
        return x


def expected(x, config, layers=2):
    """``Stack()(x)`` in float64."""
    x = x.double()
    for index in range(layers):
        geometry = config.geometry if index in config.layers() else DENSE
        x = x + oracle(*qkv(x), None, *geometry, x.shape[-1] ** -0.5)[0]
    return x


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def reasons(report):
    return [site.reason for site in report]


def check_dense(model, reason, *args, layer=-1, **kwargs):
    """One layer's site is recorded with a reason, the model's numbers are its own, and strict mode refuses."""
    backend = tmx_backend(CONFIG)
    torch.manual_seed(1)
    got = torch.compile(model, backend=backend)(*args, **kwargs)
    torch.manual_seed(1)
    assert torch.equal(got, model(*args, **kwargs))
    assert backend.report.triangle() == []
    assert backend.report.sites[layer].reason == reason.name
    torch._dynamo.reset()
    with pytest.raises(Exception, match=re.escape(reason.value)) as error:
        torch.compile(model, backend=tmx_backend(CONFIG, strict=True))(*args, **kwargs)
    assert isinstance(getattr(error.value, "inner_exception", error.value), StrictModeError)
    return backend.report


# Configurations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(1, 5), (28, 29, 30)], ids=["partly outside", "all outside"])
def test_a_configuration_for_a_deeper_model(layers, eager, caplog):
    model, ids = tiny_qwen3(3), torch.randint(0, 128, (1, N))
    config = CONFIG.replace(triangle_layer_indices=layers)
    backend = tmx_backend(config, strict=True)
    with caplog.at_level(logging.WARNING, logger="tmx_compile"), torch.no_grad():
        out = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    torch.testing.assert_close(out.double(), masked_oracle(model, config, ids), atol=2e-5, rtol=0)
    missing = "5" if layers == (1, 5) else "28-30 (3 of them)"
    note = f"the configuration names layers {missing}, and the graph has layers 0-2"
    assert backend.report.notes == [note]
    assert note in str(backend.report).replace("\n", " ")
    assert [r.getMessage() for r in caplog.records] == [note]
    assert [site.layer for site in backend.report.triangle()] == [layer for layer in layers if layer < 3]
    with pytest.raises(ValueError, match=r"triangle_layer_indices must be less than num_layers=3, got "):
        config.check_layers(3)


def test_deepest_of_40_layers_on_a_model_of_30():
    config = TriangleMixConfig.deepest(12, num_layers=40)
    with pytest.raises(ValueError, match=r"num_layers=30, got 30, 31, .*39"):
        config.check_layers(30)
    with pytest.raises(ValueError, match=r"num_triangle_layers must be at most num_layers=30, got 40"):
        TriangleMixConfig(num_triangle_layers=40).check_layers(30)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3, 1, 3], "triangle_layer_indices must not repeat a layer, got 3 more than once"),
        ([2, -1], r"triangle_layer_indices\[1\] must be a non-negative integer, got -1"),
        ([1.5], r"triangle_layer_indices\[0\] must be a non-negative integer, got 1.5"),
    ],
)
def test_layers_that_cannot_be(layers, message):
    with pytest.raises(ValueError, match=message):
        TriangleMixConfig(triangle_layer_indices=layers)


# Sizes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["blocked", "operator", "reference"])
@pytest.mark.parametrize(
    "geometry",
    [(4, 16, 5000), (4, 5000, 8), (5000, 0, 0), (2**31 - 1, 2**31 - 1, 2**31 - 2), (0, 0, 0)],
    ids=["last", "window", "sinks", "all", "none"],
)
def test_counts_beyond_the_prompt(geometry, lowering, eager):
    names = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")
    config = CONFIG.replace(**dict(zip(names, geometry, strict=True)))
    x, backend = random(1, 2, N, 16), tmx_backend(config, lowering=lowering, strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    if geometry != (0, 0, 0):
        # Each of these reaches everything: the layer is dense in all but name.
        torch.testing.assert_close(out, Stack()(x), atol=2e-5, rtol=0)
    assert [site.lowering for site in backend.report.triangle()] == [lowering]


def test_the_largest_count_is_a_count_like_any_other(eager):
    """It marks a dense layer inside the pass; a configuration may hold it too, and a named lowering is still taken."""
    config = CONFIG.replace(num_last_tokens=2**31 - 1)
    x, backend = random(1, 2, N, 16), tmx_backend(config, lowering="operator", strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    assert [site.lowering for site in backend.report.triangle()] == ["operator"]


@pytest.mark.parametrize("lowering", ["blocked", "operator", "reference"])
@pytest.mark.parametrize("shape", [(1, 2, 1, 16), (1, 2, 2, 16), (2, 3, N, 8), (1, 2, N, 80), (0, 2, N, 16)], ids=str)
def test_shapes_at_the_edge(shape, lowering, eager):
    config = CONFIG.replace(min_seq_len=0, sliding_window_size=0, num_sink_tokens=0, num_last_tokens=1)
    x, backend = random(*shape), tmx_backend(config, lowering=lowering, strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    assert out.shape == shape
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 1


@pytest.mark.parametrize("shape", [(1, 2, 1, 16), (0, 2, N, 16)], ids=["one token", "batch 0"])
def test_shapes_at_the_edge_compiled(shape):
    config = CONFIG.replace(min_seq_len=0)
    x, backend = random(*shape), tmx_backend(config, strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_hugging_face_model_on_one_or_two_tokens(n, eager):
    model, ids, config = tiny_qwen3(2), torch.randint(0, 128, (1, n)), CONFIG.replace(min_seq_len=0)
    backend = tmx_backend(config)
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    torch.testing.assert_close(out.double(), masked_oracle(model, config, ids), atol=2e-5, rtol=0)
    assert len(backend.report) == 2


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 2, 0, 16), Reason.SHORT_PROMPT),
        ((1, 0, N, 16), Reason.LAYOUT),
        ((1, 2, N, 0), Reason.SCALE),
    ],
    ids=["no tokens", "no heads", "head dim 0"],
)
def test_empty_dimensions_stay_as_they_are(shape, reason, eager):
    x, backend = random(*shape), tmx_backend(CONFIG.replace(min_seq_len=0))
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out, Stack()(x), atol=0, rtol=0)
    assert reasons(backend.report)[1] == reason.name


def test_float64_takes_what_can_and_flex_by_name_refuses(eager):
    x, backend = random(1, 2, N, 16, dtype=torch.float64), tmx_backend(CONFIG, strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out, expected(x, CONFIG), atol=1e-11, rtol=0)
    assert [site.lowering for site in backend.report.triangle()] == ["blocked"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"lowering 'flex' cannot take this attention: .*float64") as error:
        torch.compile(Stack(), backend=tmx_backend(CONFIG, lowering="flex"))(x)
    assert isinstance(error.value.inner_exception, LoweringError)


def call_of(*shape, dtype=torch.float32, device="cpu", **changes):
    x = torch.empty(*shape, dtype=dtype, device=device)
    settings = dict(sink=4, window=16, last=8, scale=1.0, needs_grad=False) | changes
    return AttentionCall(x, x, x, None, **settings)


@pytest.mark.parametrize(
    ("lowering", "call", "detail"),
    [
        (FLEX, call_of(1, 2, N, 16, device="meta"), "flex: .* got meta"),
        (FLEX, call_of(1, 2, N, 16, dtype=torch.float64), "flex: torch.float64 is not"),
        (FLEX, call_of(1, 2, N, 16, needs_grad=True), "flex: .* no backward"),
        (FLEX, call_of(0, 2, N, 16), "flex: an empty tensor"),
        (BLOCKED, call_of(1, 2, 9000, 16, window=5000), "blocked: window=5000 is more than 4096"),
        (BLOCKED, call_of(1, 2, 9000, 16, last=5000), "blocked: last=5000 is more than"),
        (REFERENCE, call_of(1, 2, 9000, 16), "reference: a mask of 9000 x 9000"),
    ],
)
def test_a_lowering_says_what_it_does_not_support(lowering, call, detail):
    answer = lowering.supports(call)
    assert isinstance(answer, Rejected)
    assert answer.reason is Reason.NO_LOWERING
    assert re.match(detail, answer.detail), answer.detail


def test_auto_finds_another_lowering_where_blocked_and_flex_refuse(eager):
    """5000 last rows of a longer prompt: nothing but the operator takes them."""
    config = CONFIG.replace(num_last_tokens=5000)
    report = explain(Stack(), random(1, 1, 5100, 8, dtype=torch.float64), config=config, strict=True)
    assert [site.lowering for site in report.triangle()] == ["operator"]
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"lowering 'blocked' cannot take this attention: blocked: last=5000"):
        explain(Stack(), random(1, 1, 5100, 8), config=config, lowering="blocked")


# Heads and layouts --------------------------------------------------------------------------------------------------


def test_key_heads_that_do_not_divide():
    q, k = random(1, 4, N, 16), random(1, 3, N, 16)
    with pytest.raises(ValueError, match="key heads must divide query heads, got 3 and 4"):
        triangle_attention(q, k, k, sink=4, window=16, last=8)
    attend = Stack(lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3], is_causal=True, enable_gqa=True))
    with pytest.raises(RuntimeError) as own:
        attend(q)
    words = str(own.value).splitlines()[0]
    assert "heads in key and value must divide" in words
    for strict in (False, True):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=re.escape(words)):
            torch.compile(attend, backend=tmx_backend(CONFIG, strict=strict))(q)


HEADS = {
    "one query head, many key heads": lambda x: F.scaled_dot_product_attention(x[:, :1], x, x, is_causal=True),
    "one key head, many value heads": lambda x: F.scaled_dot_product_attention(x, x[:, :1], x, is_causal=True),
    "keys broadcast over the batch": lambda x: F.scaled_dot_product_attention(x, x[:1], x[:1], is_causal=True),
    "3-d": lambda x: F.scaled_dot_product_attention(*qkv(x[0]), is_causal=True),
    "5-d": lambda x: F.scaled_dot_product_attention(*qkv(x[None]), is_causal=True)[0],
}


@pytest.mark.parametrize("name", HEADS)
def test_layouts_that_are_left_alone(name, eager):
    check_dense(Stack(HEADS[name]), Reason.LAYOUT, random(2, 4, N, 16))


def test_one_key_head_is_grouped_query_attention_even_when_broadcast(eager):
    x, backend = random(1, 4, N, 16), tmx_backend(CONFIG, strict=True)
    model = Stack(lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, 1:2], is_causal=True))
    out = torch.compile(model, backend=backend)(x)
    want = x.double()
    for geometry in (DENSE, CONFIG.geometry):
        want = want + oracle(want, want[:, :1], want[:, 1:2], None, *geometry, 0.25)[0]
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 1


# Attention that is not causal self-attention ------------------------------------------------------------------------


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
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=tril(x).logical_or_(tril(x))),
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
    want = x + oracle(*qkv(x), None, *CONFIG.geometry, 0.25)[0]
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
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))]
    assert any(re.search(rf"\bReason\.{reason.name}\b|\"{reason.name}\"", text) for text in texts)
