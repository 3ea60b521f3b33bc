"""bitsandbytes: a model loaded in 8 bit, switched, and compiled, with the flag that makes it one graph and without.

Its search for outliers makes a tensor whose size is data: Dynamo breaks the graph there unless it may capture such.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from studies.clients.common import CONFIG, Result, attentions, compared, main, prompt, qwen3
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention

# Activations are rounded to 8 bit, and may fall to the other side.
TOLERANCE = 2e-2


def loaded() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        qwen3().save_pretrained(folder)
        how = BitsAndBytesConfig(load_in_8bit=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, device_map="cpu", dtype=torch.float32
        )
    return model.eval()


@torch.no_grad()
def compiled(capture: bool) -> Result:
    model = loaded()
    backend = tmx_backend(CONFIG, model=model)
    model.compile(backend=backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capture):
        return compared(lambda: model(prompt()).logits, backend, attentions(model), tolerance=TOLERANCE)


@torch.no_grad()
def switched() -> Result:
    model = loaded()
    attention = register_attention(CONFIG, strict=True)
    model.set_attn_implementation("tmx")
    call = lambda: model(prompt()).logits  # noqa: E731
    return compared(call, attention, attentions(model), switched=model, tolerance=TOLERANCE)


if __name__ == "__main__":
    main(
        "bitsandbytes",
        {
            "8 bit": lambda: compiled(False),
            "8 bit, `capture_dynamic_output_shape_ops`": lambda: compiled(True),
            "8 bit, switched": switched,
        },
    )
