"""Whether one call of an attention layer goes sparse: the pass's rules, asked of real tensors and modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tmx_compile.config import TriangleMixConfig
from tmx_compile.integrations.transformers.causal_mask import CausalMask
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import OPERATOR
from tmx_compile.lowering.worth import least_for_width, least_length
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.prefill import current_chunk
from tmx_compile.report import NOTHING_MISSED, Reason, Rejected
from tmx_compile.request import Request

_TRANSFORMERS_LAYOUT = (0, 2, 1, 3)
"""Transformers wants results as (B, rows, H, Dv): in this order they need no copy."""

_CHANGES_SCORES = (
    ("sinks", "learned sinks that depend on the rows"),
    ("position_bias", "a bias of the positions"),
)


@dataclass(frozen=True)
class _Shown:
    """What a mask shows: the place of row 0 among the keys, which keys are valid, and the layer's own window."""

    first_row: Any = 0
    key_mask: Tensor | None = None
    window: int | None = None


class Judge:
    """The rules for one request.

    Attributes:
        request: what the user asked; its configuration is not None.
        deepest: the last layer that is to go sparse; None: there is none.
    """

    def __init__(self, request: Request, config: TriangleMixConfig) -> None:
        self.request = request
        self._config = config
        self._dynamic = {layer: config.selection(layer) for layer in config.dynamic_layers()}
        self._layers = frozenset(config.layers()) | frozenset(self._dynamic)
        self.deepest = max(self._layers, default=None)
        self._limits = {
            kind: least_length(request.lowering, torch.device(kind), config.min_seq_len, config.geometry)
            for kind in ("cpu", "cuda")
        }

    def limit(self, query: Tensor, needs_grad: bool) -> int:
        """The length up to which prompts stay dense, for (B, H, Sq, D) queries."""
        kind = "cuda" if query.device.type == "cuda" else "cpu"
        limit = self._limits[kind]
        if kind == "cpu" or self.request.lowering != "auto":
            return limit
        return max(limit, least_for_width(query.shape[1] * query.shape[3], needs_grad))

    def call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: CausalMask | Tensor | None,
        scaling: float | None,
        settings: Mapping[str, Any],
    ) -> AttentionCall | Rejected:
        """The call that a lowering is to take, or why the layer stays dense; see ``TriangleAttention.forward``."""
        sinks: Tensor | None = settings.get("s_aux")
        learned = (query, key, value) if sinks is None else (query, key, value, sinks)
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in learned)
        why = self._against_layer(module) or self._against_rows(module, query, needs_grad)
        why = why or _against_form(module, query, settings)
        shown = why or self._shown(query, key, mask, settings)
        if isinstance(shown, Rejected):
            return shown
        if not _fits(query, key, value):
            return Rejected(Reason.LAYOUT)
        if torch.is_autocast_enabled(query.device.type):
            # As autocast does for SDPA, whose place this takes.
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        keys = shown.first_row + query.shape[2]
        return AttentionCall(
            query,
            key[:, :, :keys],
            value[:, :, :keys],
            None if shown.key_mask is None else shown.key_mask[:, :keys].to(query.device),
            self._geometry(module, shown.window),
            query.shape[3] ** -0.5 if scaling is None else float(scaling),
            needs_grad,
            layout=_TRANSFORMERS_LAYOUT,
            sink_logits=sinks,
            softcap=settings.get("softcap"),
        )

    def selection(self, module: nn.Module) -> Selection | None:
        """How a layer chooses its blocks, where it is a dynamic one."""
        layer = layer_of(module)
        return None if layer is None else self._dynamic.get(layer)

    def _geometry(self, module: nn.Module, window: int | None) -> Geometry:
        geometry = replace(self._config.geometry, reach=None if window is None else window - 1)
        return geometry if self.selection(module) is None else geometry.as_dense()

    def is_missed(self, module: nn.Module, why: Rejected, settings: Mapping[str, Any]) -> bool:
        """Whether strict mode forbids a layer to stay dense for a reason: see ``passes.settle.check_strict``."""
        if why.reason in NOTHING_MISSED:
            return False
        return layer_of(module) is not None or is_causal(module, settings)

    def _against_layer(self, module: nn.Module) -> Rejected | None:
        layer = layer_of(module)
        if layer is None:
            return Rejected(Reason.LAYER_UNKNOWN, "the module has no layer_idx")
        return None if layer in self._layers else Rejected(Reason.NOT_SELECTED)

    def _against_rows(self, module: nn.Module, query: Tensor, needs_grad: bool) -> Rejected | None:
        rows, limit = query.shape[2], self.limit(query, needs_grad)
        if self.request.chunked_prefill and self.selection(module) is not None:
            return Rejected(Reason.NO_LOWERING, "dynamic blocks in chunked prefill")
        # What is said about chunks is known when the call runs, and in a graph the operator asks.
        if self.request.chunked_prefill and (torch.compiler.is_compiling() or current_chunk() is not None):
            return None
        if rows == 1:
            return Rejected(Reason.SHORT_PROMPT, "one row: a decode step")
        if rows <= self._config.min_seq_len:
            return Rejected(Reason.SHORT_PROMPT, f"at most {self._config.min_seq_len} tokens")
        return Rejected(Reason.NOT_FASTER, f"up to {limit} tokens") if rows <= limit else None

    def _shown(
        self, query: Tensor, key: Tensor, mask: CausalMask | Tensor | None, settings: Mapping[str, Any]
    ) -> _Shown | Rejected:
        rows, keys = query.shape[2], key.shape[2]
        if mask is None:
            # As ``sdpa`` has it: one row sees every key, several begin at the first (a static cache holds more keys).
            first = keys - 1 if rows == 1 else 0
            return Rejected(Reason.MORE_QUERIES) if rows > keys else _Shown(first)
        if not isinstance(mask, CausalMask):
            if rows == 1 and mask.dtype == torch.bool and not torch.compiler.is_compiling():
                # A row of a prompt in chunks: it is the last key's where that is shown, which a static cache hides.
                seen = mask[:, 0, 0]
                if seen.shape == (query.shape[0], keys) and bool(seen[:, -1].all()):
                    return _Shown(keys - 1, seen)
            own = settings.get("sliding_window")
            if own is None:
                return Rejected(Reason.MASK_UNKNOWN, "handed in, or of the model's own making")
            return self._against_window(own) or Rejected(Reason.MASK_UNKNOWN, f"a sliding window of {own} keys")
        if mask.shape != (query.shape[0], 1, rows, keys):
            return Rejected(Reason.MASK_UNKNOWN, "made for tensors of another shape")
        if mask.first_key > 0:
            return Rejected(Reason.POSITIONS_UNKNOWN, "the cache has let go of the first keys")
        if mask.first_row < 0 or mask.first_row + rows > keys:
            return Rejected(Reason.MORE_QUERIES)
        why = None if mask.window is None else self._against_window(mask.window)
        if mask.is_packed:
            why = why or self._against_packed(query.device.type)
        return why or _Shown(mask.first_row, mask.key_mask, mask.window)

    def _against_packed(self, device: str) -> Rejected | None:
        # Not an error as in a compiled graph: there every prompt without a mask and a cache may be several.
        if self.request.chunked_prefill:
            return Rejected(Reason.NO_LOWERING, "chunked prefill of packed documents")
        if self.request.lowering not in ("auto", OPERATOR.name):
            return Rejected(Reason.NO_LOWERING, f"{self.request.lowering}: packed documents")
        if device == "cuda" and self.request.lowering == "auto" and torch.compiler.is_compiling():
            # What takes documents is plain PyTorch: dense attention to one sequence is faster on a GPU.
            return Rejected(Reason.NO_LOWERING, "packed documents, or one prompt without an attention mask: pass it")
        return None

    def _against_window(self, window: int) -> Rejected | None:
        if window - 1 > self._config.sliding_window_size:
            return None
        return Rejected(Reason.WINDOWED, f"{window} keys")


def layer_of(module: nn.Module) -> int | None:
    """The number of an attention module's layer, None where it has none."""
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) else None


def is_causal(module: nn.Module, settings: Mapping[str, Any]) -> bool:
    """Whether a call is causal: as it says, else as its module does."""
    causal = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _against_form(module: nn.Module, query: Tensor, settings: Mapping[str, Any]) -> Rejected | None:
    if not is_causal(module, settings):
        return Rejected(Reason.NOT_CAUSAL, "is_causal=False")
    if settings.get("dropout"):
        return Rejected(Reason.DROPOUT)
    for name, what in _CHANGES_SCORES:
        if settings.get(name) is not None:
            return Rejected(Reason.SCORE_CHANGED, what)
    sinks, softcap = settings.get("s_aux"), settings.get("softcap")
    if sinks is not None and (sinks.shape != query.shape[1:2] or sinks.device != query.device):
        return Rejected(Reason.SCORE_CHANGED, f"learned sinks of shape {tuple(sinks.shape)} on {sinks.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        return Rejected(Reason.SCORE_CHANGED, f"a softcap of {softcap}")
    if settings.get("indices") is not None or settings.get("block_indices") is not None:
        return Rejected(Reason.MASK_UNKNOWN, "keys that the model selects")
    if settings.get("cache") is not None:
        return Rejected(Reason.FORM, "continuous batching: requests packed in one sequence, in a paged cache")
    return None


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether shapes, dtypes and devices are those that the operator takes."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if not (query.dtype == key.dtype == value.dtype and query.dtype.is_floating_point):
        return False
    if not query.device == key.device == value.device:
        return False
    shapes = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    return bool(shapes and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0)
