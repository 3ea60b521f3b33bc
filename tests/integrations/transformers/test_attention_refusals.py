"""What the switch leaves dense, and why; what it does with chunks; what it refuses to register."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, BloomConfig, BloomForCausalLM, DynamicCache, StaticCache

from tests.support.serving import oracle_logits
from tests.support.switched import (
    CONFIG,
    WINDOW,
    WITH_SCORES,
    decisions,
    padded,
    plan_oracle,
    prompt,
    registered,
    switched_model,
)
from tmx_compile import LoweringError, Report, StrictModeError, TriangleMixConfig, TriangleMixInferenceConfig, prefill
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.integrations.transformers.causal_mask import causal_mask

PACKED = torch.cat([torch.arange(60), torch.arange(40)])[None]
SPARSE = ("triangle", "")


def by_sdpa(name, call, *, options=None, **changes):
    """What a model computes with the switch, asserted to be sdpa's own result; and the report of layers 1 and 2."""
    with registered(CONFIG, **(options or {})) as attention, torch.no_grad():
        got, want = (call(switched_model(name, implementation, **changes)) for implementation in ("tmx", "sdpa"))
    assert torch.equal(got, want)
    assert {site.layer for site in attention.report} >= {1, 2}
    return {(site.reason, site.detail) for site in attention.report if site.layer in (1, 2)}


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        (dict(lowering="blocked"), "blocked: packed documents"),
        (dict(chunked_prefill=True), "chunked prefill of packed documents"),
    ],
)
def test_packed_sequences(options, detail):
    """What takes none of them is no error: a graph gets every prompt without a mask so."""
    found = by_sdpa("Llama", packed_logits, options=options)
    assert found == {("NO_LOWERING", detail)}


def test_packed_sequences_of_a_window():
    found = by_sdpa("Mistral", packed_logits)
    assert found == {("MASK_UNKNOWN", f"a sliding window of {WINDOW} keys")}


def packed_logits(model):
    return model(prompt_of_one(), position_ids=PACKED, use_cache=False).logits


def prompt_of_one():
    return torch.randint(3, 128, (1, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sides", [None, ((30, 0), (0, 20))])
def test_keys_that_the_model_selects(sides):
    """A model that would hand them to a kernel: they are a mask again, as for sdpa."""
    ids, mask = prompt(), None if sides is None else padded(sides)
    found = by_sdpa("DeepseekV32", lambda model: model(ids, attention_mask=mask).logits)
    assert found == {("MASK_UNKNOWN", "keys that the model selects")}


def test_blocks_that_the_model_selects_are_refused():
    x = torch.randn(1, 4, 100, 16)
    with registered(CONFIG) as attention, pytest.raises(ValueError, match="Bare selects blocks of keys"):
        attention.forward(Bare(1), x, x, x, None, block_indices=torch.zeros(1, 4, 100, 2))


def test_a_mask_that_is_handed_in():
    """Causal or not, boolean or added: nothing tells."""
    ids = prompt()
    for mask in (torch.ones(2, 1, 100, 100, dtype=torch.bool).tril(), torch.zeros(2, 1, 100, 100)):
        found = by_sdpa("Llama", lambda model, mask=mask: model(ids, attention_mask=mask).logits)
        assert {reason for reason, _ in found} == {"MASK_UNKNOWN"}


def test_that_no_layer_went_sparse_is_told_once():
    ids, mask = prompt(), torch.ones(2, 1, 100, 100, dtype=torch.bool).tril()
    with registered(CONFIG) as attention, torch.no_grad():
        model = switched_model()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(ids[:, :20])
            model(ids, attention_mask=mask)
            model(ids, attention_mask=mask)
        notes = [str(each.message) for each in told if "went sparse" in str(each.message)]
        assert len(notes) == 1
        assert notes[0].startswith("no attention of a long prompt went sparse: layer 2, LlamaAttention: the mask")
        assert "(MASK_UNKNOWN: docs/reasons.md)" in notes[0]
        assert attention.report.notes == notes
        # Where a layer was sparse before, what became of the others is in the report alone.
        attention = register_attention(CONFIG)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*went sparse")
            model(ids)
            model(ids, attention_mask=mask)
        assert len(attention.report.triangle()) == 2
        assert not attention.report.notes


def test_a_window_that_is_not_longer():
    ids = prompt()
    found = by_sdpa("Mistral", lambda model: model(ids).logits, sliding_window=17)
    assert found == {("WINDOWED", "17 keys")}


def test_a_sliding_cache_that_has_let_go_of_keys():
    ids = prompt_of_one()

    def call(model):
        cache = DynamicCache(config=model.config)
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:30], past_key_values=cache)
        return model(ids[:, 30:], past_key_values=cache).logits

    reasons = {reason for reason, _ in by_sdpa("Mistral", call)}
    assert reasons == {"SHORT_PROMPT", "POSITIONS_UNKNOWN"}
    assert WINDOW < 30


def test_an_encoder_and_dropout():
    ids = prompt()

    def call(model):
        model.config.is_causal = False
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        return model(ids).logits

    assert by_sdpa("Llama", call) == {("NOT_CAUSAL", "is_causal=False")}

    def training(model):
        torch.manual_seed(3)
        return model.train()(ids).logits

    assert by_sdpa("Llama", training, attention_dropout=0.2) == {("DROPOUT", "")}


@pytest.mark.parametrize("name", WITH_SCORES)
@pytest.mark.parametrize("sides", [None, ((30, 0), (0, 20))])
def test_what_sdpa_cannot_do_is_done_as_the_model_wrote_it(name, sides):
    """In layers that stay dense."""
    ids, mask = prompt(), None if sides is None else padded(sides)
    with registered(CONFIG.replace(triangle_layer_indices=[7])) as attention, torch.no_grad():
        got, want = (switched_model(name, kind)(ids, attention_mask=mask).logits for kind in ("tmx", "eager"))
    assert torch.equal(got, want)
    assert {site.reason for site in attention.report} == {"NOT_SELECTED"}


class Bare(nn.Module):
    """An attention module by itself, as a model that has no numbers would have it."""

    is_causal = True

    def __init__(self, layer=None):
        super().__init__()
        if layer is not None:
            self.layer_idx = layer


@pytest.mark.parametrize(
    ("layer", "change", "reason"),
    [
        (None, {}, "LAYER_UNKNOWN"),
        (1, dict(keys=80), "MORE_QUERIES"),
        (1, dict(key_dtype=torch.float64), "LAYOUT"),
        (1, dict(position_bias=torch.zeros(1, 4, 100, 100)), "SCORE_CHANGED"),
        (1, dict(s_aux=torch.zeros(1, 4)), "SCORE_CHANGED"),
        (1, dict(sinks=torch.zeros(1, 4, 100, 1)), "SCORE_CHANGED"),
        (1, dict(softcap=-1.0), "SCORE_CHANGED"),
        (1, dict(cache=object()), "FORM"),
        (1, dict(is_causal=False), "NOT_CAUSAL"),
    ],
)
def test_calls_of_a_module(layer, change, reason):
    """The reason of a call; what it computes is left to sdpa, if that takes it."""
    query = torch.randn(1, 4, 100, 16)
    key = torch.randn(1, 4, change.pop("keys", 100), 16, dtype=change.pop("key_dtype", torch.float32))
    with registered(CONFIG) as attention:
        try:
            attention.forward(Bare(layer), query, key, key, None, **change)
        except (RuntimeError, ValueError):
            assert reason in ("LAYOUT", "SCORE_CHANGED")
        assert [site.reason for site in attention.report] == [reason]


def test_a_mask_for_other_tensors_is_not_believed():
    with registered(CONFIG) as attention:
        padding = torch.ones(2, 90, dtype=torch.bool)
        padding[0, :3] = False
        mask = causal_mask(batch_size=2, q_length=90, kv_length=90, attention_mask=padding)
        x = torch.randn(2, 4, 100, 16)
        with pytest.raises(RuntimeError):
            attention.forward(Bare(1), x, x, x, mask)
        assert [site.reason for site in attention.report] == ["MASK_UNKNOWN"]


def test_strict_mode():
    ids = prompt()
    with registered(CONFIG, strict=True) as attention, torch.no_grad():
        model = switched_model()
        model(ids, attention_mask=padded(((0, 0), (20, 0))))
        model(ids[:, :20])
        with pytest.raises(StrictModeError, match="layer 1, LlamaAttention: the mask depends on data"):
            model(ids, attention_mask=torch.ones(2, 1, 100, 100, dtype=torch.bool).tril())
        assert {site.layer for site in attention.report.triangle()} == {1, 2}


def test_chunks_are_judged_one_by_one():
    """As the backend does without ``chunked_prefill``: the second chunk's last rows count as the prompt's."""
    ids, mask = prompt(), padded(((0, 0), (20, 0)))
    with registered(CONFIG) as attention, torch.no_grad():
        model, parts = switched_model(), []
        cache = DynamicCache(config=model.config)
        for begin, end in ((0, 55), (55, 100)):
            parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        assert decisions(attention.report)[1] == SPARSE
        model.set_attn_implementation("sdpa")
        want = oracle_logits(model, CONFIG, ids, mask, triangle=[(0, 55), (55, 100)])
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()].double(), want[mask.bool()], atol=5e-5, rtol=0)


@pytest.mark.parametrize("sides", [((0, 0), (0, 0)), ((0, 0), (20, 0))], ids=["plain", "padded"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_chunked_prefill(sides, static):
    """The plan of one pass, whatever the chunks; then a decode step by sdpa."""
    ids, mask = prompt(), padded(sides)
    cuts = (0, 40, 61, 97, 100) if static else (0, 40, 61, 62, 97, 99, 100)
    with registered(CONFIG, chunked_prefill=True) as attention, torch.no_grad():
        model, parts = switched_model(), []
        cache = StaticCache(config=model.config, max_cache_len=128) if static else DynamicCache(config=model.config)
        with prefill(total_tokens=100):
            for begin, end in itertools.pairwise(cuts):
                parts.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
        assert decisions(attention.report)[1] == SPARSE
        assert {site.lowering for site in attention.report.triangle()} == {"chunked"}
        model(ids[:, :1], attention_mask=torch.ones(2, 101), past_key_values=cache)
        assert decisions(attention.report, 1)[1] == ("dense", "SHORT_PROMPT")
    want = plan_oracle("Llama", CONFIG, ids, mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()].double(), want[mask.bool()], atol=5e-5, rtol=0)


def test_chunked_prefill_is_for_inference():
    with registered(CONFIG, chunked_prefill=True), pytest.raises(LoweringError, match="inference only"):
        switched_model().train()(prompt())


def test_a_disabled_configuration_is_sdpa():
    ids = prompt()
    with registered(TriangleMixInferenceConfig()) as attention, torch.no_grad():
        assert torch.equal(switched_model()(ids).logits, switched_model("Llama", "sdpa")(ids).logits)
    assert len(attention.report) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name=""), "name must be a non-empty string"),
        (dict(name="paged|tmx"), "name must be a non-empty string without"),
        (dict(name="sdpa"), "name='sdpa' is an attention implementation already"),
        (dict(name="eager"), "name='eager' is an attention implementation already"),
        (dict(lowering="flex"), "lowering must be one of auto, triton, blocked, operator, got 'flex'"),
        (dict(report=[]), r"report must be a tmx_compile.Report, got \[\]"),
        (dict(strict=1), "strict must be True or False, got 1"),
        (dict(chunked_prefill=None), "chunked_prefill must be True or False, got None"),
    ],
)
def test_bad_input(options, message):
    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(ValueError, match=message):
        register_attention(CONFIG, **options)
    assert before == AttentionInterface._global_mapping


def test_a_lowering_that_cannot_take_the_call():
    wide = CONFIG.replace(num_last_tokens=5000)
    with registered(wide, lowering="blocked"):
        switched_model()(prompt())  # bounded by the prompt
    with registered(CONFIG, lowering="triton"), pytest.raises(LoweringError, match="float64"):
        switched_model().double()(prompt())


def test_registering_again_replaces_the_plan_and_a_report_can_be_shared():
    report, ids = Report(), prompt()
    with registered(CONFIG, report=report), torch.no_grad():
        model = switched_model()
        model(ids)
        register_attention(CONFIG.replace(triangle_layer_indices=[0]), report=report)
        model(ids)
    assert [site.layer for site in report.triangle()] == [1, 2, 0]


def test_a_model_with_attention_of_its_own():
    """Bloom adds its mask to the scores, whatever it is: a boolean one would be wrong without a word."""
    sizes = BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4)
    with registered(CONFIG):
        sizes._attn_implementation = "tmx"
        model = BloomForCausalLM(sizes)
        with pytest.raises(ValueError, match="BloomModel has attention of its own"):
            model(prompt())


def test_warnings():
    with (
        pytest.warns(UserWarning, match="worst choice") as caught,
        registered(TriangleMixConfig(num_triangle_layers=1)),
    ):
        pass
    assert len(caught) == 1
