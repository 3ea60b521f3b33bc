"""What a layer computes that stays dense: what Transformers' own ``sdpa`` computes, or what the model wrote itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tmx_compile.integrations.transformers.causal_mask import CausalMask

_BEYOND_SDPA = ("softcap", "s_aux")
"""Arguments of attention that ``sdpa`` refuses, or silently leaves out."""


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask | Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it: (B, H, S, D) in, (B, S, H, D) out."""
    if any(settings.get(name) is not None for name in _BEYOND_SDPA):
        return _as_written(module, query, key, value, mask, settings)
    if isinstance(mask, CausalMask):
        mask = mask.for_sdpa(query.device)
    out: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)
    return out


def _as_written(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask | Tensor | None,
    settings: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention that the model's own file writes out (``eager``), under an additive mask."""
    written = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if written is None:
        given = ", ".join(name for name in _BEYOND_SDPA if settings.get(name) is not None)
        raise ValueError(
            f"{type(module).__name__} passes {given}, which neither sdpa nor its own file's attention takes"
        )
    shown = mask.write(False) if isinstance(mask, CausalMask) else mask
    causal = settings.get("is_causal")
    if shown is None and query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        shown = sdpa_mask(1, query.shape[2], key.shape[2], allow_is_causal_skip=False, device=query.device)
    if shown is not None and shown.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        shown = torch.where(shown.to(query.device), zero, torch.finfo(query.dtype).min)
    out: tuple[Tensor, Tensor | None] = written(module, query, key, value, shown, **settings)
    return out
