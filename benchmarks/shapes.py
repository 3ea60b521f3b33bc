"""Models of published shapes with random weights, how a prefill calls them, and what their attention became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmx_compile import TriangleMixConfig
from tmx_compile.lowering import fa4
from tmx_compile.mask.geometry import Geometry

# Hugging Face's name for attention that builds no mask; registered by build().
CAUSAL = "tmx_bench_causal"


@dataclass(frozen=True)
class ModelShape:
    """A model written out as its configuration.

    ``sparse`` of its ``layers`` become triangle layers, the deepest ones. ``config`` makes the transformers
    configuration, ``tiny`` one of the same kind for a quick run.
    """

    name: str
    layers: int
    sparse: int
    heads: int
    kv_heads: int
    head_dim: int
    config: Callable[[], Any]
    tiny: Callable[[], Any]


TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    return LlamaConfig(**(settings | changes))


def _qwen3(**changes: Any) -> Any:
    from transformers import Qwen3Config

    settings: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3Config(**(settings | changes))


MODELS = {
    "llama": ModelShape("Llama-3.1-8B", 32, 16, 32, 8, 128, _llama, lambda: _llama(**TINY)),
    "qwen3": ModelShape("Qwen3-8B", 36, 24, 32, 8, 128, _qwen3, lambda: _qwen3(**TINY)),
}


def build(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, quick: bool, layers: int | None = None
) -> nn.Module:
    """The model with random weights (standard deviation 0.02), made on the device; with so many layers, if told."""
    from transformers import AutoModelForCausalLM

    register_causal()
    torch.manual_seed(0)
    config = shape.tiny() if quick else shape.config()
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def register_causal() -> None:
    """Make the implementation ``CAUSAL`` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, _causal_attention)


def _causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Dense attention at its best, FlashAttention-4 where it is installed: no mask is built or read.

    Right without padding, for a prompt and an empty cache, and for a single row behind what a cache holds.
    """
    causal = True if query.shape[2] != 1 else False  # noqa: SIM210 - a bool where the number of rows is symbolic
    if causal and fa4.missing(query.device) is None:
        out = fa4.FA4_OPERATOR(query, key, value, None, None, None, scaling or query.shape[3] ** -0.5)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


class Prefill:
    """Prefills of one compiled model as ``generate`` does them: a new cache each time, the last logits only.

    Args:
        model: as it was before it was compiled.
        compiled: what is called.
        tokens: of the prompt, random ones.
        dynamic: the length is.
        mask: an attention mask of ones goes with it.
        graphs: CUDA graphs are in use.
        cache: without one, nothing is kept for a step after the prompt.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: Callable[..., Any],
        tokens: int,
        *,
        dynamic: bool,
        mask: bool = False,
        graphs: bool = False,
        cache: bool = True,
    ) -> None:
        self._model, self._compiled, self._graphs, self._cache = model, compiled, graphs, cache
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(tokens)
        vocabulary: Any = model.config.vocab_size
        ids = torch.randint(0, vocabulary, (1, tokens), generator=generator)
        self._inputs = {"input_ids": ids.to(device)}
        if mask:
            self._inputs["attention_mask"] = torch.ones_like(self._inputs["input_ids"])
        if dynamic:
            for x in self._inputs.values():
                torch._dynamo.mark_dynamic(x, 1)

    def __call__(self) -> Tensor:
        """One prefill; returns the logits (1, 1, vocabulary) of the last token. The cache is let go."""
        from transformers import DynamicCache

        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            kept = {"past_key_values": DynamicCache(config=self._model.config)} if self._cache else {}
            out = self._compiled(**self._inputs, **kept, use_cache=self._cache, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits


def triangle(geometry: Geometry, layers: Sequence[int], min_seq_len: int) -> TriangleMixConfig:
    """The configuration that makes ``layers`` triangle layers."""
    return TriangleMixConfig(*geometry.counts, triangle_layer_indices=layers, min_seq_len=min_seq_len)


def check_layers(backend: Any, wanted: Sequence[int], kind: str = "triangle") -> None:
    """That a backend made the layers what was asked for; None is no backend of ours, and asked for nothing.

    Raises:
        RuntimeError: other layers than wanted are of the kind.
    """
    found = set() if backend is None else {site.layer for site in backend.report if site.decision == kind}
    if backend is not None and found != set(wanted):
        raise RuntimeError(f"wanted {kind} layers {sorted(wanted)}, got {sorted(found, key=str)}")


def lowerings(backend: Any) -> str:
    """What the attention of all of a backend's graphs became."""
    sites = [] if backend is None else list(backend.report)
    return " ".join(sorted({site.lowering for site in sites if site.lowering})) or "as written"
