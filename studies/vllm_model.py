"""Llamas with random weights for vLLM, and the same models in plain PyTorch with their masks written out."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
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

    def write(
        self, folder: Path, weights: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Write what vLLM reads of a model; without weights it makes some up."""
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
            "torch_dtype": str(dtype).removeprefix("torch."),
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if weights is not None:
            save_file({name: weight.cpu() for name, weight in weights.items()}, folder / "model.safetensors")


def spread(name: str, inputs: int) -> float:
    """The standard deviation of a weight under which small differences stay small, and attention is far from even.

    Args:
        name: of the weight.
        inputs: its columns.
    """
    if "embed" in name:
        return 1.0
    of_attention = any(part in name for part in ("q_proj", "k_proj", "v_proj", "qkv"))
    return (1.6 if of_attention else 0.6 if "down" in name else 1.28) / inputs**0.5


def calm(parameters: dict[str, Tensor]) -> None:
    """Random weights in the place of vLLM's dummies, which make a chaotic model."""
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device=device).manual_seed(1)
    for name, weight in parameters.items():
        if "norm" in name:
            weight.data.fill_(1)
        elif weight.numel():
            weight.data.normal_(0, spread(name, weight.shape[1]), generator=generator)


def random_weights(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Weights by the names that a checkpoint gives them."""
    generator = torch.Generator(device=device).manual_seed(1)
    hidden, wide = shape.hidden, shape.heads * shape.head_dim
    keys = shape.kv_heads * shape.head_dim
    layer = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (shape.intermediate, hidden),
        "mlp.up_proj": (shape.intermediate, hidden),
        "mlp.down_proj": (hidden, shape.intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (shape.vocabulary, hidden), "model.norm": (hidden,)}
    sizes |= {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}
    sizes["lm_head"] = (shape.vocabulary, hidden)
    weights = {}
    for name, size in sizes.items():
        weight = torch.ones(size, dtype=dtype, device=device)
        if "norm" not in name:
            weight.normal_(0, spread(name, size[1]), generator=generator)
        weights[f"{name}.weight"] = weight
    return weights


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
        weights: as :func:`random_weights` makes them.
        shape: of the model.
        tokens: the prompt and what was generated.
        prompt: how many of them are the prompt.
        triangle: layers with the mask; the others see every earlier key.
        geometry: sinks, window, last rows.
    """
    device = weights["model.embed_tokens.weight"].device
    n, dim = len(tokens), shape.head_dim
    hidden = F.embedding(torch.tensor(list(tokens), device=device), weights["model.embed_tokens.weight"]).float()
    place = torch.arange(n, device=device, dtype=torch.int32)
    sink, window, last = geometry
    frequency = 1.0 / THETA ** (torch.arange(0, dim, 2, device=device).float() / dim)
    angle = place[:, None].float() * frequency
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]

    def turned(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return torch.cat([one * cosine - other * sine, other * cosine + one * sine], -1)

    def allowed(rows: slice, sparse: bool) -> Tensor:
        row, key = place[rows, None], place[None]
        causal = key <= row
        return causal & ((key < sink) | (row - key <= window) | (row >= prompt - last)) if sparse else causal

    for layer in range(shape.layers):

        def times(x: Tensor, name: str, layer: int = layer) -> Tensor:
            return x @ weights[f"model.layers.{layer}.{name}.weight"].float().T

        x = F.rms_norm(hidden, (shape.hidden,), eps=1e-5)
        q, k, v = (times(x, f"self_attn.{name}_proj").view(n, -1, dim) for name in "qkv")
        mask = functools.partial(allowed, sparse=layer in triangle)
        hidden = hidden + times(_attention(turned(q), turned(k), v, mask), "self_attn.o_proj")
        x = F.rms_norm(hidden, (shape.hidden,), eps=1e-5)
        inner = F.silu(times(x, "mlp.gate_proj")) * times(x, "mlp.up_proj")
        hidden = hidden + times(inner, "mlp.down_proj")
    x = F.rms_norm(hidden[prompt - 1 :], (shape.hidden,), eps=1e-5)
    return (x @ weights["lm_head.weight"].float().T).log_softmax(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Callable[[slice], Tensor], rows: int = 2048) -> Tensor:
    """(n, H, D) rows over (n, Hkv, D) keys: (n, H D); a key head and some rows at a time, so that scores stay few."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for head, first in itertools.product(range(k.shape[1]), range(0, q.shape[0], rows)):
        heads, some = slice(head * group, head * group + group), slice(first, first + rows)
        scores = torch.einsum("qhd,kd->hqk", q[some, heads], k[:, head]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill_(~mask(some), float("-inf")).softmax(-1)
        out[some, heads] = torch.einsum("hqk,kd->qhd", weights, v[:, head])
    return out.flatten(1)


def gap(found: list[dict[int, float]], want: Tensor) -> dict[str, Any]:
    """How far log-probabilities that an engine tells, by token for each row, are from the model's."""
    off = [
        abs(value - float(row[token])) for step, row in zip(found, want, strict=False) for token, value in step.items()
    ]
    same = sum(max(step, key=step.__getitem__) == int(row.argmax()) for step, row in zip(found, want, strict=False))
    return {"mean": sum(off) / len(off), "most": max(off), "same_first": f"{same}/{len(found)}"}
