"""Models with random weights, and batches with padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.models import GGUF_NAME, smollm2_folder


def smollm2_shape(**changes: Any) -> nn.Module:
    """A model of SmolLM2-135M's architecture with random weights, its configuration changed as told."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(smollm2_folder(), gguf_file=GGUF_NAME)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(f"the configuration has no {name!r}")
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# What tracing and compiling cost depends on depth, not on width.
_SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
}


def small_qwen3(layers: int) -> nn.Module:
    """A Qwen3 of the given depth and a tiny width."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **_SMALL)).eval()


def small_llama(layers: int) -> nn.Module:
    """A Llama of the given depth and a tiny width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **_SMALL)).eval()


def left_padded(batch: int, tokens: int, padding: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and their 2-D attention mask, whose first ``padding`` positions are 0."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    return ids, mask
