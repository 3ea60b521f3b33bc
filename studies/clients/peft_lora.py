"""PEFT: LoRA beside the weights, in training and in ``generate``, and merged into them.

The base model is compiled: ``generate`` of the PEFT model calls it, and never the PEFT model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from studies.clients.common import CONFIG, Result, attentions, compared, generated, gradients, main, prompt, qwen3
from tmx_compile import TmxBackend, tmx_backend


def adapted() -> tuple[Any, TmxBackend]:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(qwen3(), lora)
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.get_base_model().compile(backend=backend)
    return model, backend


def unmerged() -> Result:
    model, backend = adapted()
    model.eval()
    with torch.no_grad():
        return compared(lambda: model(prompt()).logits, backend, attentions(model.get_base_model()))


def generate() -> Result:
    model, backend = adapted()
    model.eval()
    return compared(lambda: generated(model), backend, attentions(model.get_base_model()))


def training() -> Result:
    model, backend = adapted()
    model.train()

    def step() -> torch.Tensor:
        return gradients(model, model(prompt(), labels=prompt()).loss)

    return compared(step, backend, attentions(model.get_base_model()))


def merged() -> Result:
    model = adapted()[0].merge_and_unload().eval()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    return compared(lambda: generated(model), backend, attentions(model))


if __name__ == "__main__":
    main("peft", {"unmerged": unmerged, "unmerged, generate": generate, "training": training, "merged": merged})
