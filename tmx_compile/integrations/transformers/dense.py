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
from tmx_compile.integrations.transformers.judge import is_causal

_BEYOND_SDPA = ("softcap", "s_aux", "sinks")
"""Arguments of attention that ``sdpa`` refuses, or silently leaves out."""

_FOR_KERNELS = ("indices", "block_indices")
"""What a model that selects keys gives in place of a mask to everything but ``sdpa`` and ``eager``."""


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: CausalMask | Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it: (B, H, S, D) in, (B, S, H, D) out."""
    selected, blocks = (settings.pop(name, None) for name in _FOR_KERNELS)
    if blocks is not None:
        raise ValueError(f"{type(module).__name__} selects blocks of keys: use attn_implementation='sdpa'")
    if selected is not None:
        mask = _selected(mask, selected, query, key)
    if any(settings.get(name) is not None for name in _BEYOND_SDPA):
        return _as_written(module, query, key, value, mask, settings)
    if isinstance(mask, CausalMask):
        mask = mask.for_sdpa(query.device)
    out: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)
    return out


def _selected(mask: CausalMask | Tensor | None, selected: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask and-ed with the keys that a model has selected for each row, (B, rows, count): as it does for ``sdpa``."""
    hidden = torch.ones(query.shape[0], query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    hidden = hidden.scatter(-1, selected.long(), False).unsqueeze(1)
    shown = mask.write(False, 0) if isinstance(mask, CausalMask) else mask
    if shown is None:
        return ~hidden
    if shown.dtype == torch.bool:
        return shown & ~hidden
    return shown.masked_fill(hidden, torch.finfo(query.dtype).min)


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
    shown = mask.write(False, 0) if isinstance(mask, CausalMask) else mask
    if shown is None and query.shape[2] > 1 and is_causal(module, settings):
        shown = sdpa_mask(1, query.shape[2], key.shape[2], allow_is_causal_skip=False, device=query.device)
    if shown is not None and shown.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        shown = torch.where(shown.to(query.device), zero, torch.finfo(query.dtype).min)
    out: tuple[Tensor, Tensor | None] = written(module, query, key, value, shown, **settings)
    return out
