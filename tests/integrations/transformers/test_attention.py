"""``attn_implementation="tmx"``: the plan of the layers without compiling, against float64 under written-out masks."""

import operator
from unittest import mock

import accelerate
import pytest
import torch
from transformers import StaticCache
from transformers.masking_utils import (
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from tests.support.models import masked
from tests.support.oracle import attended, oracle, tolerance
from tests.support.serving import SETTINGS, check_generated
from tests.support.switched import (
    CONFIG,
    WINDOW,
    decisions,
    model_of_images,
    padded,
    plan_model,
    plan_oracle,
    prompt,
    prompt_with_an_image,
    registered,
    switched_model,
)
from tmx_compile.integrations.transformers import causal_mask as mask_module

SPARSE, KEPT = ("triangle", ""), ("dense", "NOT_SELECTED")
SIDES = {"none": None, "left": ((0, 0), (33, 0)), "right": ((0, 20), (0, 0)), "both": ((5, 40), (20, 3))}


@pytest.fixture
def attention():
    with registered() as attention:
        yield attention


def close(got, want, mask=None):
    rows = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(got[rows].double(), want[rows], atol=5e-5, rtol=0)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mistral", "Gemma3", "DeepseekV3"])
def test_the_plan_equals_the_oracle(attention, name, sides):
    ids, mask = prompt(), None if SIDES[sides] is None else padded(SIDES[sides])
    model = switched_model(name)
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits
        dense = switched_model(name, "sdpa")(ids, attention_mask=mask).logits
    assert got.isfinite().all()
    close(got, plan_oracle(name, CONFIG, ids, mask), mask)
    assert (got - dense).abs().max() > 1e-3
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}
    assert {site.lowering for site in attention.report.triangle()} == {"blocked"}


@pytest.mark.parametrize("sides", ["none", "left", "both"])
@pytest.mark.parametrize(("name", "lowering"), [("Gemma2", "operator"), ("GptOss", "blocked")])
def test_a_softcap_and_learned_sinks(attention, name, lowering, sides):
    ids, mask = prompt(), None if SIDES[sides] is None else padded(SIDES[sides])
    with torch.no_grad():
        got = switched_model(name)(ids, attention_mask=mask).logits
    close(got, plan_oracle(name, CONFIG, ids, mask), mask)
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}
    assert {site.lowering for site in attention.report.triangle()} == {lowering}


@pytest.mark.parametrize("lowering", ["triton", "operator"])
def test_a_lowering_by_name(lowering):
    """``triton`` in its interpreter, or on a GPU where there is one."""
    device = "cuda" if lowering == "triton" and torch.cuda.is_available() else "cpu"
    ids, mask = prompt(2, 50), padded(((5, 10), (12, 3)), 50)
    with registered(lowering=lowering) as attention, torch.no_grad():
        got = switched_model().to(device)(ids.to(device), attention_mask=mask.to(device)).logits.cpu()
        close(got, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert {site.lowering for site in attention.report.triangle()} == {lowering}


def test_no_mask_of_all_rows_and_keys_is_made(attention):
    """None for sparse layers; one for all of the others, where sdpa needs one."""
    ids, mask = prompt(), padded(SIDES["left"])
    with mock.patch.object(mask_module, "sdpa_mask", wraps=mask_module.sdpa_mask) as write, torch.no_grad():
        model = switched_model()
        model(ids, attention_mask=mask)
        assert write.call_count == 1  # layer 0
    with registered(CONFIG.replace(triangle_layer_indices=[0, 1, 2])):
        every = switched_model()
        with mock.patch.object(mask_module, "sdpa_mask") as write, torch.no_grad():
            every(ids, attention_mask=mask)
            every(ids)
        assert write.call_count == 0
    with registered(CONFIG.replace(triangle_layer_indices=[2])):
        two = switched_model()
        with mock.patch.object(mask_module, "sdpa_mask", wraps=mask_module.sdpa_mask) as write, torch.no_grad():
            two(ids, attention_mask=mask)
        assert write.call_count == 1  # layers 0 and 1


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_dense_is_sdpa_to_the_last_bit(name, sides):
    """A long prompt in layers that are not named, a short one in those that are, decode steps and static caches."""
    ids, mask = prompt(), None if SIDES[sides] is None else padded(SIDES[sides])
    for config in (CONFIG.replace(triangle_layer_indices=[7]), CONFIG.replace(min_seq_len=100)):
        with registered(config) as attention, torch.no_grad():
            ours, theirs = switched_model(name), switched_model(name, "sdpa")
            assert torch.equal(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)
            if sides in ("none", "left"):
                settings = SETTINGS | dict(attention_mask=mask, max_new_tokens=4)
                for extra in ({}, dict(cache_implementation="static", disable_compile=True)):
                    got, want = (m.generate(ids, **settings, **extra).logits for m in (ours, theirs))
                    assert torch.equal(torch.stack(got), torch.stack(want))
            assert not attention.report.triangle()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("sides", ["none", "left"])
def test_generate(attention, kind, sides):
    ids, mask = prompt(), None if sides == "none" else padded(SIDES[sides])
    model = switched_model("Qwen3")
    extra = dict(cache_implementation="static", disable_compile=True) if kind == "static" else {}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, **extra, **SETTINGS)
    model.set_attn_implementation("sdpa")
    check_generated(model, CONFIG, ids, mask, out, atol=5e-5, prompt=None, triangle=[(0, 100)])
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}
    assert decisions(attention.report, 1) == {1: ("dense", "SHORT_PROMPT"), 2: ("dense", "SHORT_PROMPT")}


def test_a_static_cache_may_hold_more_than_the_prompt(attention):
    """Twice into the same cache, which counts in place; the second time from its start again."""
    model, mask = switched_model(), padded(SIDES["left"])
    cache = StaticCache(config=model.config, max_cache_len=160)
    for _ in range(2):
        ids = prompt()
        cache.reset()
        with torch.no_grad():
            got = model(ids, attention_mask=mask, past_key_values=cache).logits
        close(got, plan_oracle("Llama", CONFIG, ids, mask), mask)


def test_the_report_tells_kinds_of_calls_not_calls(attention):
    model = switched_model()
    with torch.no_grad():
        for n in (100, 90, 20, 100, 10):
            model(prompt(1, n))
    assert [decisions(attention.report, graph) for graph in range(attention.report.graphs)] == [
        {0: KEPT, 1: SPARSE, 2: SPARSE},
        {1: ("dense", "SHORT_PROMPT"), 2: ("dense", "SHORT_PROMPT")},
    ]
    site = attention.report.triangle()[0]
    assert (site.path, site.query, site.key) == ("LlamaAttention", (1, 4, 100, 16), (1, 2, 100, 16))
    assert 0 < site.attended_pairs < site.causal_pairs == 5050


def test_gradients(attention):
    """Of a training step on a padded batch, against the same step in float64."""
    ids, mask = prompt(), padded(SIDES["left"])
    model = switched_model().train()
    twin = plan_model("Llama", CONFIG, ids, mask).train()
    for each in (model, twin):
        each(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("lowering", ["auto", "operator"])
def test_autocast(lowering):
    """The result has autocast's dtype, as SDPA's has."""
    x = torch.randn(1, 4, 100, 16)
    with registered(lowering=lowering) as attention, torch.autocast("cpu", torch.bfloat16):
        module = switched_model().model.layers[1].self_attn
        got, _ = attention.forward(module, x, x[:, :2], x[:, :2], None, scaling=0.25)
    want, _ = oracle(x.bfloat16(), x[:, :2].bfloat16(), x[:, :2].bfloat16(), None, *CONFIG.geometry.counts, 0.25)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.transpose(1, 2).double(), want, atol=tolerance(torch.bfloat16), rtol=0)
    assert decisions(attention.report) == {1: SPARSE}


def test_checkpointing(attention):
    ids, mask = prompt(), padded(SIDES["left"])
    plain, saving = switched_model().train(), switched_model().train()
    saving.gradient_checkpointing_enable()
    losses = []
    for model in (plain, saving):
        losses.append(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean())
        losses[-1].backward()
    assert torch.equal(*losses)
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("window", [None, 24])
def test_a_mask_in_words_is_the_mask_wherever_a_model_computes_with_it(window):
    """Written out it is sdpa's, by index, by sum, by a method, and as an argument of a function."""
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    made = dict(
        batch_size=2,
        q_length=40,
        kv_length=60,
        q_offset=15,
        mask_function=function,
        attention_mask=padded(((3, 0), (20, 9)), 55).bool(),
        local_size=window,
    )
    words, want = mask_module.causal_mask(**made), sdpa_mask(**made)
    assert isinstance(words, mask_module.CausalMask)
    assert (words.shape, words.ndim, words.window, words.first_row) == (want.shape, 4, window, 15)
    assert torch.equal(words[:, :, :, :50], want[:, :, :, :50])
    assert torch.equal(torch.where(words, 0.0, -1.0), torch.where(want, 0.0, -1.0))
    assert torch.equal(words[:, :, -3:, :], want[:, :, -3:, :])
    assert words[:, :, 0:, :] is words
    assert torch.equal(words.float(), want.float())
    other = torch.rand(2, 1, 40, 60) < 0.5
    for join in (operator.and_, operator.or_, operator.add, operator.mul):
        assert torch.equal(join(words, other), join(want, other))
        assert torch.equal(join(other, words), join(other, want))
    assert torch.equal(~words, ~want)
    assert words.to("cpu").contiguous() is words
    assert torch.equal(words.for_sdpa(torch.device("cpu")), want)
    assert mask_module.causal_mask(**made | dict(attention_mask=words)) is words


@pytest.mark.parametrize(
    "change",
    [
        dict(q_length=1),
        dict(allow_is_causal_skip=False),
        dict(mask_function=bidirectional_mask_function),
        dict(mask_function=chunked_causal_mask_function(24, torch.zeros(2, dtype=torch.int64)), local_size=24),
        dict(mask_function=lambda b, h, q, kv: kv <= q),
    ],
    ids=["one row", "wanted", "both ways", "chunks", "unknown"],
)
def test_other_masks_are_those_of_sdpa(change):
    made = dict(batch_size=2, q_length=60, kv_length=60, attention_mask=padded(((3, 0), (20, 9)), 60).bool()) | change
    assert torch.equal(mask_module.causal_mask(**made), sdpa_mask(**made))


def test_an_image_in_the_prompt(attention):
    """The decoder goes sparse, the vision tower is left alone."""
    inputs = prompt_with_an_image()
    n = inputs["input_ids"].shape[1]
    mask = attended(n, n, None, *CONFIG.geometry.counts)
    twin = masked(model_of_images("sdpa"), 1, n, {1: mask, 2: mask})
    with torch.no_grad():
        got = model_of_images()(**inputs).logits
        want = twin(**inputs | dict(pixel_values=inputs["pixel_values"].double()), use_cache=False).logits
    close(got, want)
    assert decisions(attention.report) == {None: ("dense", "LAYER_UNKNOWN"), 0: KEPT, 1: SPARSE, 2: SPARSE}


def test_offloaded_by_accelerate(attention):
    """Hooks hand tensors on to devices, and the mask in words."""
    ids, mask = prompt(), padded(SIDES["left"])
    model = switched_model()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        close(model(ids, attention_mask=mask).logits, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}


@pytest.mark.parametrize("extra", [dict(num_beams=3), dict(prompt_lookup_num_tokens=4)], ids=["beams", "lookup"])
def test_other_ways_to_generate(attention, extra):
    """The prompt goes sparse; what follows is dense over the whole cache."""
    model = switched_model()
    out = model.generate(prompt(1), max_new_tokens=6, do_sample=False, pad_token_id=0, **extra)
    assert out.shape == (1, 106)
    assert decisions(attention.report) == {0: KEPT, 1: SPARSE, 2: SPARSE}
    later = {site.reason for site in attention.report if site.graph > 0 and site.layer != 0}
    assert later == {"SHORT_PROMPT"}


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_blocks_that_see_both_ways(image):
    """Gemma 3's token types: a prompt of text alone goes sparse; an image's tokens see one another."""
    types = torch.zeros(2, 100, dtype=torch.int64)
    types[1, 40:60] = 1 if image else 0
    blocks = torch.where(types == 1, 0, -1)
    ids, model = prompt(), switched_model("Gemma3", "sdpa")
    settings = dict(config=model.config, inputs_embeds=model.model.embed_tokens(ids), past_key_values=None)
    found = {}
    for kind in ("sdpa", "tmx"):
        with registered(), torch.no_grad():
            model.set_attn_implementation(kind)
            full = create_causal_mask(**settings, attention_mask=None, block_sequence_ids=blocks)
            slide = create_sliding_window_causal_mask(
                **settings, attention_mask=None, or_mask_function=blockwise_overlay(blocks)
            )
            # The model of images has its window around the blocks.
            around = create_causal_mask(
                **settings,
                attention_mask=None,
                or_mask_function=blockwise_overlay(blocks),
                and_mask_function=sliding_window_overlay(WINDOW),
            )
            found[kind] = full, slide, around
    for ours, theirs in zip(found["tmx"], found["sdpa"], strict=True):
        assert isinstance(ours, mask_module.CausalMask) == (not image)
        assert torch.equal(ours if image else ours.for_sdpa(torch.device("cpu")), theirs)
    if not image:
        assert [ours.window for ours in found["tmx"]] == [None, WINDOW, WINDOW]


def test_pairs_are_counted_without_the_free_places_of_a_static_cache():
    shares = []
    for places in (200, 600):
        with registered() as attention:
            model = switched_model("Qwen3")
            cache = StaticCache(config=model.config, max_cache_len=places)
            with torch.no_grad():
                model(prompt(1, 200), past_key_values=cache)
            shares.append({(site.attended_pairs, site.causal_pairs) for site in attention.report.triangle()})
    assert shares[0] == shares[1] != set()
