"""Transformers: prompts with an image, which breaks the loop over the layers (Qwen3-VL) or opens the mask (Gemma 3).

Gemma 3 lets the tokens of one image see each other in both directions: such a mask is not causal, and its layers stay
dense. Its processor gives ``token_type_ids`` to prompts of text too: there ``assume_causal=True`` promises that no
token belongs to an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from studies.clients.common import CONFIG, TOKENS, Result, attentions, compared, main, prompt
from studies.clients.transformers_generate import gemma3
from tests.support.switched import model_of_images, prompt_with_an_image
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention

IMAGE, BEGIN, END, PICTURE, FEATURES = 5, 6, 7, 32, 16

Model = Callable[[], Any]
Given = dict[str, torch.Tensor]


def qwen3_vl() -> Any:
    return model_of_images("sdpa")


def gemma3_vl() -> Any:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config = Gemma3Config(
        text_config=gemma3().config,
        vision_config=SiglipVisionConfig(image_size=PICTURE, patch_size=4, **sizes),
        mm_tokens_per_image=FEATURES,
        image_token_id=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


def text() -> Given:
    """What Gemma 3's processor makes of a prompt without an image."""
    ids = prompt().clamp(min=END + 1)
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}


def picture() -> Given:
    given = text()
    ids, first = given["input_ids"], 20
    ids[0, first : first + FEATURES] = IMAGE
    ids[0, first - 1], ids[0, first + FEATURES] = BEGIN, END
    return given | {"token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(1, 3, PICTURE, PICTURE)}


@torch.no_grad()
def compiled(make: Model, given: Given, **options: Any) -> Result:
    """``options``: of the backend."""
    model = make()
    backend = tmx_backend(CONFIG, model=model.model.language_model, **options)
    model.compile(backend=backend)
    call = lambda: model(**given, use_cache=False).logits  # noqa: E731
    return of_layers(compared(call, backend, attentions(model)))


@torch.no_grad()
def switched(make: Model, given: Given) -> Result:
    attention = register_attention(CONFIG)
    model = make()
    model.set_attn_implementation("tmx")
    call = lambda: model(**given, use_cache=False).logits  # noqa: E731
    return of_layers(compared(call, attention, attentions(model), switched=model))


def of_layers(found: Result) -> Result:
    """Without what is told of the vision tower, whose attention has no layer number."""
    return found | {"reasons": [reason for reason in found["reasons"] if reason != "LAYER_UNKNOWN"]}


WAYS: dict[str, Callable[[], Result]] = {
    "Qwen3-VL, an image": lambda: compiled(qwen3_vl, prompt_with_an_image(TOKENS)),
    "Qwen3-VL, an image, switched": lambda: switched(qwen3_vl, prompt_with_an_image(TOKENS)),
    "Gemma 3, an image": lambda: compiled(gemma3_vl, picture()),
    "Gemma 3, an image, switched": lambda: switched(gemma3_vl, picture()),
    "Gemma 3, text with `token_type_ids`": lambda: compiled(gemma3_vl, text()),
    "Gemma 3, text with `token_type_ids`, `assume_causal`": lambda: compiled(gemma3_vl, text(), assume_causal=True),
    "Gemma 3, text with `token_type_ids`, switched": lambda: switched(gemma3_vl, text()),
}

if __name__ == "__main__":
    main("transformers", WAYS)
