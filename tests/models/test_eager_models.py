"""Hugging Face models with ``attn_implementation="eager"``: their written-out attention goes sparse, and is the same.

The layers' triangle covers everything (more last rows than tokens), so that the numbers are the dense model's own.
"""

import pytest
import torch
import transformers

from tests.support.graphs import squares
from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import TriangleMixConfig, tmx_backend

N = 100
EVERYTHING = TriangleMixConfig(triangle_layer_indices=[0, 1], num_last_tokens=2 * N, min_seq_len=10)
SHAPE = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2)
GROUPED = SHAPE | dict(num_key_value_heads=2)
GPT2 = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
MODELS = {
    "Llama": GROUPED,
    "GPT2": GPT2,
    "GPT2, upcast": GPT2 | dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    "GPTNeoX": SHAPE | dict(eos_token_id=0),
    "OPT": {x: y for x, y in SHAPE.items() if x != "intermediate_size"} | dict(ffn_dim=96, word_embed_proj_dim=64),
    "GPTJ": GPT2 | dict(rotary_dim=8),
    "Phi3": GROUPED | dict(pad_token_id=0, eos_token_id=0),
    "Falcon": {x: y for x, y in SHAPE.items() if x != "intermediate_size"},
}


def eager_model(name, **changes):
    """The model, in eager form, for causal language modelling."""
    kind = name.split(",")[0]
    config = getattr(transformers, f"{kind}Config")(**(MODELS[name] | changes))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{kind}{suffix}")(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_numbers(name, eager):
    model, ids = eager_model(name), torch.randint(1, 128, (2, N))
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    backend = tmx_backend(EVERYTHING, lowering="operator", strict=True)
    with torch.no_grad():
        want = model(ids, attention_mask=mask, use_cache=False).logits
        got = torch.compile(model, backend=backend)(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-5, rtol=0)
    assert [site.decision for site in backend.report] == ["triangle"] * 2
    assert squares(eager[-1], N) == []
    heads = {site.key[1] for site in backend.report}
    assert heads == {MODELS[name].get("num_key_value_heads", 4)} or name == "Falcon"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_triangle_equals_the_masked_oracle(dtype, eager):
    config = EVERYTHING.replace(triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=8, num_last_tokens=5)
    model, ids = tiny_qwen3(impl="eager").to(dtype), torch.randint(0, 128, (2, N))
    backend = tmx_backend(config, lowering="operator", strict=True)
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(ids, use_cache=False).logits
    want = masked_oracle(model, config, ids)
    torch.testing.assert_close(got.double(), want, atol=3e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)
    assert [site.decision for site in backend.report] == ["dense", "triangle"]
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - got).abs().max() > 1e-3


def test_weights_that_are_asked_for_stay(eager):
    model, ids = eager_model("Llama"), torch.randint(1, 128, (1, N))
    backend = tmx_backend(EVERYTHING)
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(ids, use_cache=False, output_attentions=True)
        want = model(ids, use_cache=False, output_attentions=True)
    assert torch.equal(got.logits, want.logits)
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))
    assert [site.reason for site in backend.report] == ["WEIGHTS_USED"] * 2


def test_training_with_dropout_stays(eager):
    model, ids = eager_model("Llama", attention_dropout=0.2).train(), torch.randint(1, 128, (1, N))
    backend = tmx_backend(EVERYTHING)
    torch.compile(model, backend=backend)(ids, use_cache=False)
    assert [site.reason for site in backend.report] == ["DROPOUT"] * 2
