"""Transformers: ``generate`` with every cache that runs on a CPU, and by beams and assistants."""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from studies.clients.common import CONFIG, LAYERS, Result, attentions, compared, generated, main, qwen3
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention


def gemma3() -> Any:
    """Layers with a window of their own, so that its cache is of two kinds."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = Gemma3TextConfig(
        vocab_size=128,
        num_hidden_layers=LAYERS,
        layer_types=kinds,
        sliding_window=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
        **sizes,
    )
    return Gemma3ForCausalLM(config).eval()


def greedy(make: Any = qwen3, *, given: Any = None, **settings: Any) -> Result:
    """``given``: options of the backend."""
    model = make()
    backend = tmx_backend(CONFIG, model=model, **(dict(strict=True) if given is None else given))
    model.compile(backend=backend)
    if "assistant_model" in settings:
        settings["assistant_model"] = settings["assistant_model"]()
    return compared(lambda: generated(model, **settings), backend, attentions(model))


def switched(make: Any = qwen3, **settings: Any) -> Result:
    model = make()
    attention = register_attention(CONFIG, strict=True)
    model.set_attn_implementation("tmx")
    return compared(lambda: generated(model, **settings), attention, attentions(model), switched=model)


def quantised(backend: str) -> dict[str, Any]:
    axis = 0 if backend == "quanto" else 1
    how = dict(backend=backend, nbits=4, q_group_size=16, axis_key=axis, axis_value=axis)
    return dict(cache_implementation="quantized", cache_config=how)


WAYS = {
    "`generate`": greedy,
    "static cache": partial(greedy, cache_implementation="static"),
    "Gemma 3, its cache": partial(greedy, gemma3),
    "Gemma 3, static cache, `assume_causal`": partial(
        greedy, gemma3, given=dict(strict=True, assume_causal=True), cache_implementation="static"
    ),
    "quantised cache, optimum-quanto": partial(greedy, given={}, **quantised("quanto")),
    "quantised cache, optimum-quanto, switched": partial(switched, **quantised("quanto")),
    "quantised cache, HQQ, switched": partial(switched, **quantised("hqq")),
    "3 beams": partial(greedy, num_beams=3),
    "assisted by a model": partial(greedy, assistant_model=lambda: qwen3(seed=1)),
    "assisted by the prompt": partial(greedy, prompt_lookup_num_tokens=3),
}

if __name__ == "__main__":
    main("transformers", WAYS)
