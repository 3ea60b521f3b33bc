"""What the backend makes of decode steps: nothing by default; sinks and window with ``decode="streaming"``."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, StaticCache

from tests.support.calls import Case
from tests.support.layers import OneLayer
from tests.support.models import tiny_qwen3
from tests.support.oracle import oracle, tolerance
from tests.support.serving import CONFIG, SETTINGS, check_generated, left_padded, oracle_logits, prompt
from tmx_compile import StrictModeError, TriangleMixConfig, explain, tmx_backend
from tmx_compile.integrations.transformers import StaticStreamingCache, StreamingCache
from tmx_compile.lowering.decode import decode_attention

pytestmark = pytest.mark.filterwarnings("ignore:streaming decode")
SINK, WINDOW, _ = CONFIG.geometry.counts


def compiled(model, backend, **kwargs):
    model.compile(backend=backend, **kwargs)
    return model


def graphs(report, decision):
    return sorted({site.graph for site in report if site.decision == decision})


@pytest.mark.parametrize(("min_seq_len", "last"), [(0, 0), (32, 8)])
@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_decoding_is_untouched_by_default(cache, min_seq_len, last, eager):
    """The same bits as of the model compiled without this backend, from the same cache."""
    config = TriangleMixConfig(triangle_layer_indices=[1, 2], num_last_tokens=last, min_seq_len=min_seq_len)
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 30))
    logits = []
    for _ in range(2):
        kwargs = {"max_cache_len": 128} if cache is StaticCache else {}
        held, whole = cache(config=model.config, **kwargs), mask
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=held)
        backend = tmx_backend(config) if logits else "eager"
        torch._dynamo.reset()
        step = torch.compile(model, backend=backend)
        logits.append([])
        for at in range(4):
            whole = torch.cat([whole, whole.new_ones(2, 1)], 1)
            with torch.no_grad():
                out = step(ids[:, at : at + 1], attention_mask=whole, past_key_values=held)
            logits[-1].append(out.logits)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    assert len(backend.report) > 0
    assert {site.decision for site in backend.report} == {"dense"}


@pytest.mark.parametrize("starts", [None, (0, 30), (0, 97)])
@pytest.mark.parametrize("static", [False, True])
def test_streaming_decode_equals_the_oracle(static, starts, eager):
    model, ids = tiny_qwen3(3), prompt(2)
    mask = None if starts is None else left_padded(starts)
    # generate() makes the mask of a static cache outside of the model.
    backend = tmx_backend(CONFIG, decode="streaming", strict=True, assume_causal=static)
    kwargs = SETTINGS | dict(max_new_tokens=40, attention_mask=mask)
    if static:
        kwargs["past_key_values"] = StaticCache(config=model.config, max_cache_len=160)
    out = compiled(model, backend).generate(ids, **kwargs)
    check_generated(model, CONFIG, ids, mask, out, triangle=[(0, 100)])
    assert len(graphs(backend.report, "triangle")) == 1
    assert 1 <= len(graphs(backend.report, "streaming")) <= 2
    assert {site.lowering for site in backend.report if site.decision == "streaming"} == {"decode"}
    few = [site for site in backend.report if site.decision == "streaming"]
    assert few[0].attended_pairs == SINK + WINDOW + 1


@pytest.mark.parametrize(("decode", "decision"), [("dense", "dense"), ("streaming", "streaming")])
def test_explain_takes_what_the_backend_takes(decode, decision):
    model, ids = tiny_qwen3(3), prompt(1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        report = explain(model, ids[:, :1], config=CONFIG, decode=decode, past_key_values=cache)
        chunks = explain(model, ids, config=CONFIG, chunked_prefill=True, use_cache=False)
    assert {site.decision for site in report if site.layer in CONFIG.layers()} == {decision}
    assert {site.lowering for site in chunks.triangle()} == {"chunked"}
    assert explain(model, ids, config=CONFIG, use_cache=False).triangle()[0].lowering != "chunked"


def test_one_compile_for_all_lengths(eager):
    model, ids = tiny_qwen3(3), prompt(1)
    backend = tmx_backend(CONFIG, decode="streaming", strict=True)
    settings = SETTINGS | dict(max_new_tokens=12)
    out = compiled(model, backend, dynamic=True).generate(ids, **settings)
    check_generated(model, CONFIG, ids, None, out, triangle=[(0, 100)])
    seen = backend.report.graphs
    longer = prompt(1, 140)
    out = model.generate(longer, **settings)
    check_generated(model, CONFIG, longer, None, out, triangle=[(0, 140)])
    assert backend.report.graphs == seen


def test_a_step_through_inductor():
    """One compiled step with a padded, growing cache, twice."""
    model, ids, mask = tiny_qwen3(2), prompt(2), left_padded((0, 30))
    config = TriangleMixConfig(triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16)
    backend = tmx_backend(config, decode="streaming", strict=True)
    step = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    cache, places = DynamicCache(config=model.config), (mask.cumsum(1) - 1).clamp(min=0)
    logits, tokens = [], torch.randint(1, 128, (2, 3))
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        whole = mask
        for at in range(3):
            whole = torch.cat([whole, whole.new_ones(2, 1)], 1)
            kwargs = dict(attention_mask=whole, position_ids=whole.cumsum(1)[:, -1:] - 1, past_key_values=cache)
            logits.append(step(tokens[:, at : at + 1], **kwargs).logits[:, -1])
    want = oracle_logits(model, config, torch.cat([ids, tokens], 1), whole, prompt=100)[:, 100:]
    torch.testing.assert_close(torch.stack(logits, 1).double(), want, atol=2e-5, rtol=0)
    assert backend.report.graphs == 1
    assert [site.decision for site in backend.report] == ["dense", "streaming"]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("decode", ["streaming"])
def test_a_shrinking_cache_under_compile(kind, decode, eager):
    """The cache does the streaming: the backend finds nothing to leave out, whatever it was told."""
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 70))
    backend = tmx_backend(CONFIG, decode=decode, strict=True, assume_causal=kind == "static")
    compiled(model, backend)
    if kind == "dynamic":
        cache = StreamingCache(model, CONFIG)
    else:
        cache = StaticStreamingCache(model, CONFIG, max_cache_len=160)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **SETTINGS)
    check_generated(model, CONFIG, ids, mask, out, triangle=[(0, 100)])
    assert graphs(backend.report, "triangle")
    if decode == "streaming":
        assert {site.reason for site in backend.report if site.layer in (1, 2)} >= {"FEW_KEYS"}
    assert backend.report.graphs <= 6


def test_a_static_shrinking_cache_compiles_once():
    """Static shapes through Inductor: one decode graph, fixed addresses, no recompile with the position."""
    model, ids = tiny_qwen3(3), prompt(2)
    cache = StaticStreamingCache(model, CONFIG, max_cache_len=160)
    with torch.no_grad():
        first = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        addresses = [layer.keys.data_ptr() for layer in cache.layers]
        backend = tmx_backend(CONFIG)
        step = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
        tokens, logits = [first], []
        for _ in range(30):
            logits.append(step(tokens[-1], past_key_values=cache).logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
    assert backend.report.graphs == 1
    assert addresses == [layer.keys.data_ptr() for layer in cache.layers]
    want = oracle_logits(model, CONFIG, torch.cat([ids, *tokens[:-1]], 1), prompt=100)[:, 100:]
    torch.testing.assert_close(torch.stack(logits, 1).double(), want, atol=2e-5, rtol=0)


CASES = {
    "plain": Case(1, 60, 4, 16, 0),
    "few keys": Case(1, 9, 4, 16, 0),
    "one key": Case(1, 1, 4, 16, 0),
    "no sinks": Case(1, 60, 0, 5, 0),
    "no window": Case(1, 60, 3, 0, 0),
    "sinks in the window": Case(1, 20, 8, 16, 0),
    "padding": Case(1, 60, 4, 16, 0, batch=4, valid=((0, 60), (30, 60), (58, 60), (0, 40))),
    "holes": Case(1, 60, 4, 16, 0, batch=2, valid=((0, 60), (30, 60)), holes=True),
    "reach": Case(1, 60, 4, 16, 0, reach=50),
    "short reach": Case(1, 60, 4, 16, 0, reach=9, batch=2, valid=((0, 60), (55, 60))),
    "bf16, groups": Case(1, 60, 4, 16, 0, heads=6, kv_heads=2, v_dim=8, dtype=torch.bfloat16, strided=True),
}


@pytest.mark.parametrize("name", CASES)
def test_the_lowering_equals_the_oracle(name):
    case = CASES[name]
    q, k, v, key_mask = case.tensors()
    got = decode_attention(q, k, v, key_mask, case.mask, case.scale)
    want = oracle(q, k, v, key_mask, *case.geometry, case.scale, case.reach)[0]
    torch.testing.assert_close(got.double(), want, atol=tolerance(case.dtype), rtol=0)


class Step(nn.Module):
    """A decoder layer's self-attention and cross-attention, one row each."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, past):
        if self.kind.startswith("cross"):
            k, v = past, past + 1
        elif self.kind == "last but one":
            k = v = torch.cat([x, past], 2)
        elif self.kind == "other axis":
            k = torch.cat([past, past], 3)[..., :16]
            v = torch.cat([past, x], 2)[:, :, 1:]
        else:
            k, v = torch.cat([past, x], 2), torch.cat([past, x * 2], -2)
        mask = None if self.kind != "cross, padded" else (torch.arange(k.shape[2]) < k.shape[2] - 3)[None, None, None]
        return F.scaled_dot_product_attention(x, k, v, attn_mask=mask)


@pytest.mark.parametrize("kind", ["self", "cross", "cross, padded", "last but one", "other axis"])
def test_only_a_step_that_appends_its_own_key_streams(kind, eager):
    config = TriangleMixConfig(triangle_layer_indices=[0], num_sink_tokens=4, sliding_window_size=16)
    x, past = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 60, 16)
    backend = tmx_backend(config, decode="streaming")
    got = torch.compile(OneLayer(Step(kind)), backend=backend)(x, past)
    (site,) = backend.report
    if kind == "self":
        assert site.decision == "streaming"
        k, v = torch.cat([past, x], 2), torch.cat([past, x * 2], 2)
        torch.testing.assert_close(got.double(), oracle(x, k, v, None, 4, 16, 0, 0.25)[0], atol=2e-5, rtol=0)
        return
    assert (site.decision, site.reason) == ("dense", "NOT_CAUSAL")
    assert torch.equal(got, OneLayer(Step(kind))(x, past))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="not causal") as error:
        torch.compile(OneLayer(Step(kind)), backend=tmx_backend(config, decode="streaming", strict=True))(x, past)
    assert isinstance(getattr(error.value, "inner_exception", error.value), StrictModeError)


def test_the_option(eager):
    with pytest.raises(ValueError, match="decode must be 'dense' or 'streaming', got 'fast'"):
        tmx_backend(CONFIG, decode="fast")
    with pytest.warns(UserWarning, match=re.escape("in 2 layers generated tokens attend to 21 keys")):
        backend = tmx_backend(CONFIG, decode="streaming")
    assert "decode='streaming'" in repr(backend)
    model = tiny_qwen3(3)
    options = {"tmx_config": CONFIG, "tmx_decode": "streaming"}
    model.compile(backend="tmx", options=options)
    out = model.generate(prompt(1), max_new_tokens=3, **SETTINGS)
    assert out.sequences.shape == (1, 103)


@pytest.mark.parametrize("asked", [{"decode": "streaming"}, {"chunked_prefill": True}])
def test_an_npu_is_refused_before_any_work(asked):
    name, value = next(iter(asked.items()))
    with pytest.raises(ValueError, match=f"target 'ascend' takes neither .* got .*{name}={value!r}"):
        tmx_backend(TriangleMixConfig(triangle_layer_indices=[1]), target="ascend", **asked)
