"""What a model computes with the triangle mask in some of its layers, in float64, without the package.

The model runs uncompiled. Where it calls attention through Transformers' interface, that call is replaced by one that
forms all scores; where it calls ``F.scaled_dot_product_attention`` itself (Falcon), that function is. The mask is the
model's own, and in the named modules the triangle of the definition as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.support.oracle import attended

NAME = "triangle_oracle"


class Oracle:
    """A float64 copy of a model (float32 for the reference "itself").

    ``masked`` hands it out, to be called inside; ``dtype`` is what it computes in.
    """

    def __init__(self, entry: Any, implementation: str) -> None:
        itself = entry.reference == "itself"
        self.dtype = torch.float32 if itself else torch.float64
        with _registered(self._interface):
            self.model = entry.build(implementation if itself else entry.reference or NAME)
        if self.model._can_set_experts_implementation():
            # The grouped matrix product has no float64.
            self.model.set_experts_implementation("eager")
        self.model = self.model.to(self.dtype)
        self._paths = {module: path for path, module in self.model.named_modules()}
        self._entered: list[str] = []
        self._triangle: frozenset[str] = frozenset()
        self._visited: set[str] = set()
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        for module in self.model.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    @contextlib.contextmanager
    def masked(
        self, triangle: frozenset[str], geometry: tuple[int, int, int], key_mask: torch.Tensor | None, above: int
    ) -> Iterator[Any]:
        """The model, with the triangle in the modules of those paths for calls of more than ``above`` rows.

        Raises:
            AssertionError: a module of ``triangle`` does not attend that way, or not causally.
        """
        self._triangle, self._geometry, self._key_mask, self._above = triangle, geometry, key_mask, above
        self._visited.clear()
        self._masks.clear()
        with _registered(self._interface), mock.patch.object(F, "scaled_dot_product_attention", self._function):
            yield self.model
        assert self._visited == triangle, f"never seen to attend: {sorted(triangle - self._visited)}"

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._entered.append(self._paths[module])

    def _leave(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        assert self._entered.pop() == self._paths[module]

    def _interface(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **extra: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention as Transformers calls it: (B, H, S, D) in, (B, S, H, D) out."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        own = self._own(query, key, attention_mask, causal and attention_mask is None)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = self._attend(self._paths[module], query, key, value, own, scale, **extra)
        return out.transpose(1, 2).contiguous(), None

    def _function(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention as PyTorch defines it."""
        assert dropout_p == 0.0
        bias = None
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            bias, attn_mask = attn_mask, attn_mask > torch.finfo(torch.float32).min / 2
        own = self._own(query, key, attn_mask, is_causal)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self._attend(self._entered[-1], query, key, value, own, scale, position_bias=bias)

    def _own(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
        """The model's own mask, (B or 1, H or 1, Sq, Skv) bool."""
        if mask is not None:
            assert mask.dtype == torch.bool
            return mask
        return _causal(query.shape[2], key.shape[2]) if causal else torch.ones(1, 1, 1, 1, dtype=torch.bool)

    def _attend(
        self,
        path: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        own: torch.Tensor,
        scale: float,
        *,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        assert not extra.get("dropout")
        dtype = query.dtype
        query, key, value = query.double(), key.double(), value.double()
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        rows, keys = query.shape[2], key.shape[2]
        if path in self._triangle and rows > self._above:
            self._visited.add(path)
            triangle = self._mask(rows, keys)
            assert not (own & ~_causal(rows, keys)).any(), f"{path} is not causal"
            own = own & triangle
        scores = query @ key.transpose(2, 3) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if position_bias is not None:
            scores = scores + position_bias
        # Finite, so that a row without keys (padding, never looked at) stays finite.
        scores = torch.where(own, scores, torch.finfo(torch.float64).min / 2)
        if s_aux is not None:
            learned = s_aux.double().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, rows, 1)
            scores = torch.cat([scores, learned], -1)
        return (torch.softmax(scores, -1)[..., :keys] @ value).to(dtype)

    def _mask(self, rows: int, keys: int) -> torch.Tensor:
        if (rows, keys) not in self._masks:
            key_mask = None if self._key_mask is None else self._key_mask[:, :keys].bool()
            self._masks[rows, keys] = attended(rows, keys, key_mask, *self._geometry)[:, None]
        return self._masks[rows, keys]


def _causal(rows: int, keys: int) -> torch.Tensor:
    return torch.ones(1, 1, rows, keys, dtype=torch.bool).tril(keys - rows)


def _own_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask as booleans, always written out."""
    return sdpa_mask(*args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}))


@contextlib.contextmanager
def _registered(attention: Any) -> Iterator[None]:
    with (
        mock.patch.dict(AttentionInterface._global_mapping, {NAME: attention}),
        mock.patch.dict(AttentionMaskInterface._global_mapping, {NAME: _own_mask}),
    ):
        yield
