"""Unusual and wrong input: right numbers, a clear error, or a reason on record. Never a crash, never silence.

Most graphs run uncompiled (the ``eager`` fixture): decisions and numbers are the pass's, Inductor only costs time.
"""

import logging
import re

import pytest
import torch
import torch.nn.functional as F

from tests.support.layers import CONFIG, DENSE, N, Stack, check_dense, expected, qkv, random, reasons
from tests.support.models import masked_oracle, tiny_qwen3
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, explain, tmx_backend, triangle_attention
from tmx_compile.errors import LoweringError
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import BLOCKED, FLEX, REFERENCE
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Reason, Rejected


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
    # One row is a decode step, which stays as it is.
    assert len(backend.report.triangle()) == (shape[2] > 1)


@pytest.mark.parametrize("shape", [(1, 2, 1, 16), (0, 2, N, 16)], ids=["one token", "batch 0"])
def test_shapes_at_the_edge_compiled(shape):
    config = CONFIG.replace(min_seq_len=0)
    x, backend = random(*shape), tmx_backend(config, strict=True)
    out = torch.compile(Stack(), backend=backend)(x)
    torch.testing.assert_close(out.double(), expected(x, config), atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == (shape[2] > 1)


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
    counts = dict(sink=4, window=16, last=8)
    settings = dict(scale=1.0, needs_grad=False) | {k: v for k, v in changes.items() if k not in counts}
    geometry = Geometry(**{name: changes.get(name, count) for name, count in counts.items()})
    return AttentionCall(x, x, x, None, geometry, **settings)


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
    for geometry in (DENSE, CONFIG.geometry.counts):
        want = want + oracle(want, want[:, :1], want[:, 1:2], None, *geometry, 0.25)[0]
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 1


# Attention that is not causal self-attention ------------------------------------------------------------------------
