"""The backend as users call it: options, thresholds, recompiles, strictness, report, explain."""

import json
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import Report, TriangleMixConfig, TriangleMixInferenceConfig, explain, tmx_backend
from tmx_compile.errors import LoweringError, StrictModeError

CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=200
)


def ids_of(n, batch=1):
    return torch.randint(0, 128, (batch, n))


@pytest.fixture
def compilations():
    """How often Dynamo compiled so far. (It may call a backend twice for one: Inductor makes it start again.)"""
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def cause_of(error):
    return getattr(error.value, "inner_exception", error.value)


def test_one_graph_for_all_lengths(compilations):
    model, backend = tiny_qwen3(2), tmx_backend(CONFIG, strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for n in (150, 300, 199, 200, 201, 517, 60, 333):
            ids = ids_of(n)
            out = compiled(ids, use_cache=False).logits
            config = CONFIG if n > 200 else CONFIG.replace(triangle_layer_indices=[])
            torch.testing.assert_close(out.double(), masked_oracle(model, config, ids), atol=2e-5, rtol=0)
    assert compilations() == 1
    assert [(s.decision, s.reason, s.detail) for s in backend.report] == [
        ("dense", "NOT_SELECTED", ""),
        ("triangle", "", "dense up to 200 tokens"),
    ]


def test_a_padded_batch_keeps_one_graph(compilations):
    model, backend = tiny_qwen3(2), tmx_backend(CONFIG, strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for n in (150, 300, 517, 60, 333):
            ids, mask = ids_of(n, 2), torch.ones(2, n, dtype=torch.long)
            mask[0, : n // 3] = 0
            out = compiled(ids, attention_mask=mask).logits
            config = CONFIG if n > 200 else CONFIG.replace(triangle_layer_indices=[])
            want = masked_oracle(model, config, ids, mask)
            torch.testing.assert_close(out[mask.bool()].double(), want[mask.bool()], atol=2e-5, rtol=0)
    assert compilations() == 1


def test_short_prompts_are_bit_for_bit_what_inductor_gives():
    model, ids = tiny_qwen3(2), ids_of(200)
    with torch.no_grad():
        ours = torch.compile(model, backend=tmx_backend(CONFIG))(ids, use_cache=False).logits
        torch._dynamo.reset()
        theirs = torch.compile(model)(ids, use_cache=False).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first", [150, 300], ids=["short first", "long first"])
def test_a_fixed_range_across_the_threshold(first, compilations):
    """mark_dynamic(min=, max=) promises one graph for the range: both sides are kept, without a guard."""
    model, backend = tiny_qwen3(2), tmx_backend(CONFIG, strict=True)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for n in (first, 200, 201, 450, 64):
            ids = ids_of(n)
            torch._dynamo.mark_dynamic(ids, 1, min=16, max=1000)
            out = compiled(ids, use_cache=True).logits
            config = CONFIG if n > 200 else CONFIG.replace(triangle_layer_indices=[])
            torch.testing.assert_close(out.double(), masked_oracle(model, config, ids), atol=2e-5, rtol=0)
    assert compilations() == 1


def test_a_fixed_range_beyond_the_threshold_needs_one_graph(compilations):
    model, backend = tiny_qwen3(2), tmx_backend(CONFIG, strict=True)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for n in (250, 450):
            ids = ids_of(n)
            torch._dynamo.mark_dynamic(ids, 1, min=201, max=1000)
            out = compiled(ids, use_cache=False).logits
            torch.testing.assert_close(out.double(), masked_oracle(model, CONFIG, ids), atol=2e-5, rtol=0)
    assert compilations() == 1


def test_by_name_with_options():
    model, ids, report = tiny_qwen3(2), ids_of(300), Report()
    options = {"tmx_config": CONFIG, "tmx_lowering": "blocked", "tmx_strict": True, "tmx_report": report}
    with torch.no_grad():
        out = torch.compile(model, backend="tmx", options=options | {"max_autotune": False})(ids).logits
    torch.testing.assert_close(out.double(), masked_oracle(model, CONFIG, ids), atol=2e-5, rtol=0)
    assert [s.lowering for s in report.triangle()] == ["blocked"]


def test_by_name_with_a_mapping():
    model, ids, report = tiny_qwen3(2), ids_of(300), Report()
    options = {"tmx_config": {"triangle_layer_indices": [0], "min_seq_len": 10}, "tmx_report": report}
    with torch.no_grad():
        torch.compile(model, backend="tmx", options=options)(ids)
    assert [s.layer for s in report.triangle()] == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_autotune": False}, "needs options={'tmx_config'"),
        ({"tmx_config": CONFIG, "tmx_lowring": "flex"}, "unknown option 'tmx_lowring'"),
        ({"tmx_config": {"num_sinks": 4}}, "num_sinks"),
        ({"tmx_config": CONFIG, "tmx_lowering": "fast"}, "lowering must be one of .* got 'fast'"),
    ],
)
def test_bad_options_by_name(options, message):
    with pytest.raises(Exception, match=message) as error:
        torch.compile(lambda x: x + 1, backend="tmx", options=options)(torch.ones(2))
    assert isinstance(cause_of(error), ValueError)


@pytest.mark.parametrize("how", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}])
def test_mode_and_options_reach_inductor(how, monkeypatch):
    seen = []
    import torch._inductor.compile_fx as inductor

    real = inductor.compile_fx

    def spy(gm, inputs, *args, config_patches=None, **kwargs):
        seen.append(dict(config_patches or {}))
        return real(gm, inputs, *args, **kwargs)

    monkeypatch.setattr(inductor, "compile_fx", spy)
    torch.compile(lambda x: x * 2, backend=tmx_backend(CONFIG), **how)(torch.ones(3))
    assert seen
    assert seen[0]["max_autotune"] is True


def test_unknown_inductor_option_is_named():
    with pytest.raises(Exception, match="not_an_option"):
        torch.compile(lambda x: x * 2, backend=tmx_backend(CONFIG), options={"not_an_option": 1})(torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(config="deep"), "config must be a TriangleMixConfig or TriangleMixInferenceConfig, got 'deep'"),
        (dict(config=CONFIG, lowering="cuda"), "lowering must be one of auto, triton, flex, blocked.* got 'cuda'"),
        (dict(config=CONFIG, strict="yes"), "strict must be True or False, got 'yes'"),
        (dict(config=CONFIG, report=[]), r"report must be a tmx_compile.Report, got \[\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tmx_backend(**arguments)


def test_warns_once_without_layers_and_for_the_first_n():
    with pytest.warns(UserWarning, match="selects no layer") as caught:
        tmx_backend(TriangleMixConfig())
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"first 9 layers.*% perplexity.*deepest\(9") as caught:
        tmx_backend(TriangleMixConfig(num_triangle_layers=9))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tmx_backend(TriangleMixConfig.deepest(9, num_layers=30))


def test_inference_config():
    enabled = TriangleMixInferenceConfig(enable_trianglemix=True, triangle_layer_indices=[1])
    assert tmx_backend(enabled).config == enabled.to_trianglemix_config()
    off = tmx_backend(TriangleMixInferenceConfig())
    assert off.config is None
    model, ids = tiny_qwen3(2), ids_of(64)
    with torch.no_grad():
        out = torch.compile(model, backend=off)(ids).logits
        torch.testing.assert_close(out, model(ids).logits, atol=1e-5, rtol=0)
    assert len(off.report) == 0


class Prefixed(torch.nn.Module):
    """One attention layer with a mask that lets every row see a prefix: not what the pass replaces."""

    def __init__(self, mask):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Identity(), Attention(mask)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class Attention(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask(x))


def prefix_of(x):
    i = torch.arange(x.shape[2])
    return (i[None, :] <= i[:, None]) | (i[None, :] < 20)


def test_strict_raises_and_the_default_explains():
    x = torch.randn(1, 2, 300, 16)
    backend = tmx_backend(CONFIG)
    out = torch.compile(Prefixed(prefix_of), backend=backend)(x)
    want = F.scaled_dot_product_attention(x, x, x, attn_mask=prefix_of(x))
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    (site,) = backend.report
    assert (site.decision, site.reason) == ("dense", "NOT_CAUSAL")
    assert site.detail == "every row may see later keys"
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"layers\.1: the mask is not causal") as error:
        torch.compile(Prefixed(prefix_of), backend=tmx_backend(CONFIG, strict=True))(x)
    assert isinstance(cause_of(error), StrictModeError)


def test_strict_leaves_other_layers_and_short_prompts_alone():
    strict = tmx_backend(CONFIG.replace(triangle_layer_indices=[0]), strict=True)
    torch.compile(Prefixed(prefix_of), backend=strict)(torch.randn(1, 2, 300, 16))
    torch._dynamo.reset()
    torch.compile(Prefixed(prefix_of), backend=tmx_backend(CONFIG, strict=True))(torch.randn(1, 2, 150, 16))


def test_a_named_lowering_is_not_replaced_silently():
    model, ids = tiny_qwen3(2).double(), ids_of(300)
    with (
        pytest.raises(Exception, match=r"lowering .flex. cannot take .*float64") as error,
        torch.no_grad(),
    ):
        torch.compile(model, backend=tmx_backend(CONFIG, lowering="flex"))(ids)
    assert isinstance(cause_of(error), LoweringError)


def test_report_as_table_log_data_and_pairs(caplog):
    model, ids = tiny_qwen3(2), ids_of(300)
    backend = tmx_backend(CONFIG, lowering="blocked")
    with caplog.at_level(logging.DEBUG, logger="tmx_compile"), torch.no_grad():
        torch.compile(model, backend=backend)(ids)
    dense, triangle = backend.report
    assert dense.path == "model.layers.0.self_attn"
    assert triangle.query == (1, 4, 300, 16)
    assert triangle.key == (1, 2, 300, 16)
    assert triangle.causal_pairs == 300 * 301 // 2
    attended = sum(j < 4 or i - j <= 16 or i >= 292 for i in range(300) for j in range(i + 1))
    assert triangle.attended_pairs == attended
    assert dense.attended_pairs == dense.causal_pairs
    text = str(backend.report)
    assert "model.layers.1.self_attn" in text
    assert "the configuration keeps this layer dense" in text
    assert json.loads(json.dumps(backend.report.to_dicts()))[1]["decision"] == "triangle"
    messages = [r.getMessage() for r in caplog.records]
    assert any("2 attention sites, 1 triangle" in m for m in messages)
    assert any("model.layers.1.self_attn layer=1" in m for m in messages)


def test_structured_trace(monkeypatch):
    import tmx_compile.report as module

    emitted = []
    monkeypatch.setattr(
        module,
        "trace_structured",
        lambda name, metadata_fn, payload_fn: emitted.append((name, metadata_fn(), json.loads(payload_fn()))),
    )
    with torch.no_grad():
        torch.compile(tiny_qwen3(2), backend=tmx_backend(CONFIG))(ids_of(300))
    ((name, metadata, payload),) = emitted
    assert name == "artifact"
    assert metadata["name"] == "tmx_compile_report"
    assert [s["decision"] for s in payload["sites"]] == ["dense", "triangle"]


def test_explain_runs_nothing():
    model, ids = tiny_qwen3(2), ids_of(300)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
        report = explain(model, ids, config=CONFIG, attention_mask=torch.ones_like(ids))
    assert [s.decision for s in report] == ["dense", "triangle"]
    assert report.sites[1].lowering in ("flex", "blocked")


def test_explain_at_a_length_no_machine_could_run_dense():
    """131,072 tokens: a dense mask alone would take 17 GB."""
    model, ids = tiny_qwen3(2), ids_of(131072)
    with torch.no_grad():
        report = explain(model, ids, config=CONFIG, use_cache=False)
    (site,) = report.triangle()
    assert site.causal_pairs == 131072 * 131073 // 2


def test_explain_repeatedly_does_not_fall_back():
    model = tiny_qwen3(1)
    config = CONFIG.replace(triangle_layer_indices=[0])
    for n in range(300, 312):
        assert len(explain(model, ids_of(n), config=config, use_cache=False).triangle()) == 1
