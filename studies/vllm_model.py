"""A Llama of the 8B shape with random weights for vLLM, and the same model in plain PyTorch with its masks written out.

vLLM's own dummy weights make a chaotic model, of which nothing can be compared: :func:`calm` gives others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 500000.0


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    layers: int = 16
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    positions: int = 131200

    def write(self, folder: Path) -> None:
        """Write what vLLM and Transformers read of a model without weights."""
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": THETA,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def calm(parameters: dict[str, Tensor]) -> None:
    """Random weights under which small differences stay small, and attention is far from even."""
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device=device).manual_seed(1)
    for name, weight in parameters.items():
        if "norm" in name:
            weight.data.fill_(1)
            continue
        spread = 1.0 if "embed" in name else 0.025 if "qkv" in name else 0.005 if "down" in name else 0.02
        weight.data.normal_(0, spread, generator=generator)


@torch.inference_mode()
def log_probabilities(
    weights: dict[str, Tensor],
    shape: Shape,
    tokens: Sequence[int],
    prompt: int,
    triangle: frozenset[int],
    geometry: tuple[int, int, int],
) -> Tensor:
    """Logarithms of probabilities (rows, vocabulary) behind the prompt's last token and every later one, in float32.

    Args:
        weights: vLLM's own, by name, with its merged projections.
        shape: of the model.
        tokens: the prompt and what was generated.
        prompt: how many of them are the prompt.
        triangle: layers with the mask; the others see every earlier key.
        geometry: sinks, window, last rows.
    """
    device = weights["model.embed_tokens.weight"].device
    n, dim = len(tokens), shape.head_dim
    hidden = F.embedding(torch.tensor(list(tokens), device=device), weights["model.embed_tokens.weight"]).float()
    place = torch.arange(n, device=device)
    causal = place[None] <= place[:, None]
    sink, window, last = geometry
    seen = (place[None] < sink) | (place[:, None] - place[None] <= window) | (place[:, None] >= prompt - last)
    frequency = 1.0 / THETA ** (torch.arange(0, dim, 2, device=device).float() / dim)
    angle = place[:, None].float() * frequency
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def turned(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)

    for layer in range(shape.layers):

        def times(x: Tensor, name: str, layer: int = layer) -> Tensor:
            return x @ weights[f"model.layers.{layer}.{name}.weight"].float().T

        x = F.rms_norm(hidden, (shape.hidden,), eps=1e-5)
        sizes = [shape.heads * dim, shape.kv_heads * dim, shape.kv_heads * dim]
        q, k, v = (part.view(n, -1, dim) for part in times(x, "self_attn.qkv_proj").split(sizes, -1))
        q, k = turned(q), turned(k)
        mask = causal & seen if layer in triangle else causal
        hidden = hidden + times(_attention(q, k, v, mask), "self_attn.o_proj")
        x = F.rms_norm(hidden, (shape.hidden,), eps=1e-5)
        gate, up = times(x, "mlp.gate_up_proj").chunk(2, -1)
        hidden = hidden + times(F.silu(gate) * up, "mlp.down_proj")
    x = F.rms_norm(hidden[prompt - 1 :], (shape.hidden,), eps=1e-5)
    return (x @ weights["lm_head.weight"].float().T).log_softmax(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(n, H, D) rows over (n, Hkv, D) keys: (n, H D), one key head after another, so that scores stay few."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head in range(k.shape[1]):
        heads = slice(head * group, head * group + group)
        scores = torch.einsum("qhd,kd->hqk", q[:, heads], k[:, head]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill_(~mask, float("-inf")).softmax(-1)
        out[:, heads] = torch.einsum("hqk,kd->qhd", weights, v[:, head])
    return out.flatten(1)


def gap(found: list[dict[int, float]], want: Tensor) -> dict[str, Any]:
    """How far log-probabilities that an engine tells, by token for each row, are from the model's."""
    off = [
        abs(value - float(row[token])) for step, row in zip(found, want, strict=False) for token, value in step.items()
    ]
    same = sum(max(step, key=step.__getitem__) == int(row.argmax()) for step, row in zip(found, want, strict=False))
    return {"mean": sum(off) / len(off), "most": max(off), "same_first": f"{same}/{len(found)}"}
