"""The caches that shrink, against an oracle that keeps all keys and masks them."""

import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache

from tests.support.models import tiny_qwen3
from tests.support.serving import CONFIG, SETTINGS, check_generated, left_padded, oracle_logits, prompt
from tests.support.streaming_caches import HELD, KINDS, SINK, WINDOW, dynamic, static
from tmx_compile import TriangleMixConfig, TriangleMixInferenceConfig
from tmx_compile.integrations.transformers import StaticStreamingCache, StreamingCache

pytestmark = pytest.mark.filterwarnings("ignore:streaming decode")


def columns(cache):
    return [layer.keys.shape[2] for layer in cache.layers]


@KINDS
@pytest.mark.parametrize("n", [1, 3, SINK, WINDOW, HELD - 1, HELD, HELD + 1, 100])
def test_generation_equals_the_masked_oracle(make, n):
    """Prompts shorter and longer than sinks and window; generation goes far past the window."""
    model, ids = tiny_qwen3(3), prompt(2, n)
    cache = make(model)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=45, **SETTINGS)
    check_generated(model, CONFIG, ids, None, out)
    if n > WINDOW:
        dense = model.generate(ids, max_new_tokens=45, **SETTINGS)
        assert (torch.stack(dense.logits) - torch.stack(out.logits)).abs().max() > 1e-4
    assert columns(cache)[1:] == [HELD, HELD]


@KINDS
@pytest.mark.parametrize("starts", [(0, 30, 75), (0, 92, 99), (40, 60, 97), (99, 0, 83)])
def test_left_padding(make, starts):
    model, ids, mask = tiny_qwen3(3), prompt(3), left_padded(starts)
    cache = make(model)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, **SETTINGS)
    check_generated(model, CONFIG, ids, mask, out)
    assert columns(cache)[1:] == [HELD, HELD]


@KINDS
@pytest.mark.parametrize(("sink", "window"), [(0, 16), (4, 0), (0, 0), (7, 1), (1, 90)])
def test_geometries(make, sink, window):
    config = TriangleMixConfig(triangle_layer_indices=[0, 2], num_sink_tokens=sink, sliding_window_size=window)
    model, ids, mask = tiny_qwen3(3), prompt(2, 60), left_padded((0, 50), 60)
    out = model.generate(ids, attention_mask=mask, past_key_values=make(model, config), max_new_tokens=40, **SETTINGS)
    check_generated(model, config, ids, mask, out)


@KINDS
def test_all_layers_stream(make):
    config = TriangleMixConfig(triangle_layer_indices=[0, 1, 2], num_sink_tokens=2, sliding_window_size=5)
    model, ids, mask = tiny_qwen3(3), prompt(2, 60), left_padded((0, 50), 60)
    cache = make(model, config)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, **SETTINGS)
    check_generated(model, config, ids, mask, out)
    assert columns(cache) == [8, 8, 8]


@KINDS
@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])
def test_other_models_and_eager_attention(make, name, impl):
    sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=3)
    if name == "GPT2":
        sizes = dict(vocab_size=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    config._attn_implementation = impl
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    ids, mask = prompt(2, 60), left_padded((0, 33), 60)
    settings = SETTINGS | dict(attention_mask=mask, max_new_tokens=30)
    out = model.generate(ids, past_key_values=make(model), **settings)
    if name == "GPTNeoX":
        _same_as_masked_dynamic(model, ids, mask, out)
        return
    if name == "GPT2":
        # Its positions are absolute: the padded row by itself.
        alone = model.generate(ids[1:, 33:], past_key_values=make(model), max_new_tokens=30, **SETTINGS)
        torch.testing.assert_close(torch.stack(out.logits)[:, 1:], torch.stack(alone.logits), atol=2e-5, rtol=0)
        ids, mask = ids[:1], None
        out.sequences, out.logits = out.sequences[:1], tuple(x[:1] for x in out.logits)
    check_generated(model, CONFIG, ids, mask, out)


def _same_as_masked_dynamic(model, ids, mask, out):
    """The oracle for a model whose layers are elsewhere: a DynamicCache, with a mask in every decode step."""
    new = out.sequences[:, ids.shape[1] :]
    for index, layer in enumerate(model.gpt_neox.layers):
        if index in CONFIG.layers():
            layer.attention.register_forward_pre_hook(_limit, with_kwargs=True)
    cache, whole = DynamicCache(config=model.config), mask
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1]
        for step, got in enumerate(out.logits):
            torch.testing.assert_close(got, logits, atol=2e-5, rtol=0)
            whole = torch.cat([whole, mask.new_ones(2, 1)], 1)
            positions = whole.cumsum(1)[:, -1:] - 1
            logits = model(
                new[:, step : step + 1], attention_mask=whole, position_ids=positions, past_key_values=cache
            ).logits[:, -1]


def _limit(module, args, kwargs):
    mask = kwargs["attention_mask"]
    if mask is None or mask.shape[2] > 1:
        return None
    seen = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0
    first = seen.to(torch.int8).argmax(1, keepdim=True)
    key = torch.arange(seen.shape[1])
    seen = seen & ((key < first + SINK) | (key[-1] - key <= WINDOW))
    return args, kwargs | {"attention_mask": torch.where(seen, 0.0, float("-inf"))[:, None, None]}


@KINDS
def test_beam_search(make):
    """The beams of a streaming cache are those of a full cache with masked keys."""
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 85))
    settings = SETTINGS | dict(attention_mask=mask, max_new_tokens=25, num_beams=3, output_scores=True)
    got = model.generate(ids, past_key_values=make(model), **settings)
    handles = [
        model.model.layers[i].self_attn.register_forward_pre_hook(_limit_expanded, with_kwargs=True)
        for i in CONFIG.layers()
    ]
    want = model.generate(ids, **settings)
    for handle in handles:
        handle.remove()
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-4, rtol=0)
    assert len(got.beam_indices.unique()) > 3


def _limit_expanded(module, args, kwargs):
    if kwargs["attention_mask"] is None:
        # No padding in any sequence: a mask of the cache's length.
        n = kwargs["past_key_values"].get_seq_length() + 1
        if args[0].shape[1] > 1 if args else kwargs["hidden_states"].shape[1] > 1:
            return None
        kwargs = kwargs | {"attention_mask": torch.ones(1, 1, 1, n, dtype=torch.bool)}
    return _limit(module, args, kwargs)


def test_batch_selection_and_repetition():
    model, ids, mask = tiny_qwen3(3), prompt(3), left_padded((0, 30, 90))
    cache = dynamic(model)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **SETTINGS)
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.batch_select_indices(torch.tensor([1, 2]))
        cache.batch_repeat_interleave(2)
        rows = torch.tensor([2, 2, 0, 0])
        whole = torch.cat([mask, mask.new_ones(3, 4)], 1)[rows]
        place = whole.cumsum(1)[:, -1:] - 1
        last = out.sequences[rows, -1:]
        got = model(last, attention_mask=whole, position_ids=place, past_key_values=cache).logits[:, 0]
    want = oracle_logits(model, CONFIG, out.sequences[rows], whole, prompt=100)[:, -1]
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def test_a_continued_conversation_streams():
    """After decoding, the rows of a new turn attend to sinks and window; in chunks or at once."""
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 70))
    for chunk in (1, 7, 40):
        cache = dynamic(model)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, **SETTINGS)
        turn = torch.cat([out.sequences, torch.arange(80).reshape(2, 40) % 127 + 1], 1)
        whole = torch.cat([mask, mask.new_ones(2, 46)], 1)
        got = []
        with torch.no_grad():
            for at in range(105, 146, chunk):
                end = min(at + chunk, 146)
                place = whole.cumsum(1)[:, at:end] - 1
                seen = whole[:, :end]
                step = model(turn[:, at:end], attention_mask=seen, position_ids=place, past_key_values=cache)
                got.append(step.logits)
        want = oracle_logits(model, CONFIG, turn, whole, prompt=100)[:, 105:]
        torch.testing.assert_close(torch.cat(got, 1).double(), want, atol=2e-5, rtol=0)


def test_prompt_tokens_keep_a_one_token_chunk_of_the_prompt():
    """Chunks of a prompt whose last is a single token: with the length told, it is not a decode step."""
    model, ids = tiny_qwen3(3), prompt(2, 81)
    for told in (True, False):
        cache = dynamic(model, prompt_tokens=81 if told else None)
        out = model.generate(ids, past_key_values=cache, prefill_chunk_size=20, max_new_tokens=30, **SETTINGS)
        if told:
            check_generated(model, CONFIG, ids, None, out)
        else:
            check_generated(model, CONFIG, ids, None, out, prompt=80)


def test_assisted_generation():
    """Cropping: the same tokens as without an assistant, and the same memory afterwards."""
    model, ids = tiny_qwen3(3), prompt(1)
    assistant = tiny_qwen3(3)
    assistant.lm_head.weight.data += torch.randn_like(assistant.lm_head.weight) * 0.003
    caches = [dynamic(model, prompt_tokens=100) for _ in range(2)]
    settings = SETTINGS | dict(max_new_tokens=40)
    alone = model.generate(ids, past_key_values=caches[0], **settings)
    helped = model.generate(ids, past_key_values=caches[1], assistant_model=assistant, **settings)
    assert torch.equal(alone.sequences, helped.sequences)
    check_generated(model, CONFIG, ids, None, helped)
    assert max(columns(caches[1])[1:]) <= HELD


def test_prompt_lookup():
    model, ids = tiny_qwen3(3), prompt(1, 25).repeat(1, 4)
    settings = SETTINGS | dict(max_new_tokens=40)
    cache = dynamic(model, prompt_tokens=100)
    helped = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=5, **settings)
    check_generated(model, CONFIG, ids, None, helped)


def test_crop():
    model, ids = tiny_qwen3(3), prompt(2)
    cache = dynamic(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-10)  # nothing is freed before decoding begins
        model(ids[:, 90:], past_key_values=cache)
        step = ids[:, :1]
        model(step, past_key_values=cache)
        assert cache.get_seq_length(1) == 101
        with pytest.raises(ValueError, match="tokens_to_remove=-5: 96 tokens would be left"):
            cache.layers[1].crop(-5)
        with pytest.raises(ValueError, match="must not be positive, got 3"):
            cache.layers[1].crop(3)
        cache.activate_past_recording()
        tail = torch.randint(1, 128, (2, 30))
        for at in range(0, 30, 6):
            model(tail[:, at : at + 6], past_key_values=cache)
        assert columns(cache)[1] == HELD + 30
        cache.crop(-25)
        assert columns(cache)[1] < HELD + 1
        got = model(tail[:, 5:9], past_key_values=cache).logits
        want = oracle_logits(model, CONFIG, torch.cat([ids, step, tail[:, :9]], 1), prompt=100)
        torch.testing.assert_close(got.double(), want[:, -4:], atol=2e-5, rtol=0)
        cache.crop(-110)
    assert cache.get_seq_length(1) == 0
    assert cache.layers[1].keys is None


@KINDS
def test_reset_and_reuse(make):
    model, ids = tiny_qwen3(3), prompt(2)
    cache = make(model)
    for starts in ((0, 70), (30, 0)):
        mask = left_padded(starts)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=25, **SETTINGS)
        check_generated(model, CONFIG, ids, mask, out)
        cache.reset()
        assert cache.get_seq_length() == 0


@KINDS
def test_memory_is_freed_and_counted(make):
    model, ids = tiny_qwen3(3), prompt(2, 200)
    cache = make(model)
    token = 2 * 2 * 2 * 16 * 4  # two sequences, keys and values, two heads of 16 float32
    with torch.no_grad():
        model(ids, past_key_values=cache)
        held = 256 if make is static else 200
        small = HELD * token if make is static else 200 * token
        assert cache.memory_bytes() == (held * token, small, small)
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
    held = 256 if make is static else 203
    assert cache.memory_bytes() == (held * token, HELD * token, HELD * token)
    assert cache.streaming_layers == (1, 2)


def test_a_static_cache_takes_one_prompt():
    model, ids = tiny_qwen3(3), prompt(1)
    cache = static(model)
    every = TriangleMixConfig(triangle_layer_indices=[0, 1, 2], num_sink_tokens=4, sliding_window_size=16)
    narrow = StaticStreamingCache(model, every, max_cache_len=50)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="5 tokens at once"):
            model(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="max_cache_len=50 is less than the prompt's 100"):
            model(ids, past_key_values=narrow)
    short = StaticStreamingCache(model, CONFIG, max_cache_len=HELD)
    assert short.streaming_layers == ()
    out = model.generate(ids[:, :10], past_key_values=short, max_new_tokens=10, **SETTINGS)
    check_generated(model, CONFIG, ids[:, :10], None, out)


def test_a_layer_with_its_own_window_keeps_its_cache():
    own = dict(sliding_window=24, use_sliding_window=True)
    model = tiny_qwen3(3, layer_types=["full_attention", "sliding_attention", "full_attention"], **own)
    cache = dynamic(model)
    assert cache.streaming_layers == (2,)
    model.generate(prompt(1), past_key_values=cache, max_new_tokens=3, **SETTINGS)
    assert columns(cache) == [102, 23, HELD]


def test_generate_may_compile_the_steps_of_a_static_cache():
    """As ``generate`` does by itself on a GPU: one graph, whole, for every step."""
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    model, ids, mask = tiny_qwen3(3), prompt(2), left_padded((0, 40))
    settings = SETTINGS | dict(max_new_tokens=40, compile_config=compile_config)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        out = model.generate(ids, attention_mask=mask, past_key_values=static(model), **settings)
        check_generated(model, CONFIG, ids, mask, out)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 3


def test_the_hook_leaves_other_caches_alone():
    model, ids = tiny_qwen3(3), prompt(2)
    before = model.generate(ids, max_new_tokens=5, **SETTINGS)
    caches = [dynamic(model), static(model)]
    assert len(model.model.layers[1].self_attn._forward_pre_hooks) == 1
    after = model.generate(ids, max_new_tokens=5, **SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    assert len(caches) == 2


def test_bad_arguments():
    model = tiny_qwen3(3)
    with pytest.raises(ValueError, match=r"names layers \[7\], and the model has layers 0-2"):
        StreamingCache(model, TriangleMixConfig(triangle_layer_indices=[1, 7]))
    with pytest.raises(ValueError, match="selects no layer"):
        StreamingCache(model, TriangleMixConfig())
    with pytest.raises(ValueError, match="enabled TriangleMixInferenceConfig"):
        StreamingCache(model, TriangleMixInferenceConfig())
    with pytest.raises(ValueError, match="prompt_tokens must be"):
        StreamingCache(model, CONFIG, prompt_tokens=-1)
    with pytest.raises(ValueError, match="max_cache_len must be"):
        StaticStreamingCache(model, CONFIG, max_cache_len=0)
    with pytest.raises(ValueError, match="attn_implementation must be one of sdpa, eager, got 'flex_attention'"):
        StreamingCache(tiny_qwen3(3, impl="flex_attention"), CONFIG)
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2)
    )
    with pytest.raises(ValueError, match="decoder-only"):
        StreamingCache(t5, CONFIG)


def test_the_price_is_on_the_label():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        StreamingCache(tiny_qwen3(3), CONFIG)
    (text,) = [str(w.message) for w in caught]
    assert "in 2 of 3 layers generated tokens attend to 21 keys" in text
    assert "copied right instead of 82%" in text
    assert "docs/serving.md" in text


def test_the_package_imports_without_transformers():
    program = "import sys; sys.modules['transformers'] = None; import tmx_compile, tmx_compile.config.prices"
    subprocess.run([sys.executable, "-c", program], check=True)
