"""The two fused operators of torch_npu, with the few of their arguments that are used.

What is relied on is from their manual (torch_npu's docstrings of ``npu_fused_infer_attention_score``, FIA below, and
``npu_attention_update``). FIA takes float16 and bfloat16, contiguous, key and value of one shape, head dims that are
multiples of 16 up to 512, at most 64 query heads for a key head. Sparse modes 2 (left-up causal) and 4 (band) want the
compressed mask, 2048 x 2048, True above the diagonal, whatever the lengths. A single query row goes to another kernel,
which ignores the sparse mode.

Nothing here imports torch_npu: the operators are looked up where they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tmx_compile.lowering.base import length

_COMPRESSED = 2048
_LEFT_UP_CAUSAL, _RIGHT_DOWN_CAUSAL, _BAND = 2, 3, 4
# Rows that the mask leaves without a key come out right ("row-invalid correction"), in high precision.
_CORRECT_EMPTY_ROWS = 2


def missing() -> str:
    """Why the operators cannot be called here, or an empty string."""
    return missing_of(torch.ops.npu)


def missing_of(operators: Any) -> str:
    """:func:`missing` for a namespace of operators."""
    names = ("npu_fused_infer_attention_score", "npu_attention_update")
    lacks = [name for name in names if not hasattr(operators, name)]
    if len(lacks) == len(names):
        return "torch_npu is not imported (install it with pip install 'tmx-compile[npu]')"
    return f"this torch_npu has no {lacks[0]}; a newer one has" if lacks else ""


def compressed_mask(like: Any, arange: Callable[..., Any]) -> Any:
    """(2048, 2048) bool, True above the diagonal. Not by ``triu``, whose iota torchair cannot convert."""
    index = arange(like, _COMPRESSED)
    return index[None, :] > index[:, None]


@dataclass(frozen=True)
class Part:
    """Attention of some rows: out (B, H, rows, D), and lse (B, H, rows, 1) float32 or None."""

    out: Any
    lse: Any

    def map(self, function: Callable[[Any], Any]) -> Part:
        """The same done to both."""
        return Part(function(self.out), None if self.lse is None else function(self.lse))

    @staticmethod
    def cat(parts: list[Part]) -> Part:
        """The rows of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        lses = [part.lse for part in parts]
        joined = None if any(lse is None for lse in lses) else torch.cat(lses, 2)
        return Part(torch.cat([part.out for part in parts], 2), joined)


@dataclass(frozen=True)
class Calls:
    """FIA on (B, H, N, D) tensors or proxies, with what is the same in every call of a layer.

    Attributes:
        call: how to call an operator: on tensors directly, or as one node.
        mask: gives the compressed mask.
        heads: query heads.
        kv_heads: key heads.
        scale: factor on the scores.
        with_lse: whether the log-sum-exp of the result is wanted too.
    """

    call: Callable[..., Any]
    mask: Callable[[], Any]
    heads: int
    kv_heads: int
    scale: float

    with_lse: bool = False

    def all_keys(self, q: Any, k: Any, v: Any) -> Part:
        """Every row attends to every key; with the log-sum-exp."""
        return self._fia(q, k, v, True, sparse_mode=0)

    def causal(self, q: Any, k: Any, v: Any) -> Part:
        """As many rows as keys: row i attends to keys 0 to i."""
        if _one_row(q):
            return self._fia(q, k, v, sparse_mode=0)
        return self._fia(q, k, v, atten_mask=self.mask(), sparse_mode=_LEFT_UP_CAUSAL)

    def final_rows(self, q: Any, k: Any, v: Any) -> Part:
        """Rows that stand at the end of the keys: row i attends to keys 0 to Skv - Sq + i."""
        if _one_row(q):
            return self._fia(q, k, v, sparse_mode=0)
        return self._fia(q, k, v, atten_mask=self.mask(), sparse_mode=_RIGHT_DOWN_CAUSAL)

    def band(self, q: Any, k: Any, v: Any, window: int, merged: bool) -> Part:
        """Rows at the end of the keys: position p attends to keys p - window to p.

        ``merged``: with the log-sum-exp, which :meth:`merge` needs. That the band counts from the bottom right is in
        CANN's host code (ops-transformer, ``GetPreNextTokensLeftUp``), not in torch_npu's manual. It matters only where
        there are more keys than rows.
        """
        return self._fia(q, k, v, merged, atten_mask=self.mask(), sparse_mode=_BAND, pre_tokens=window, next_tokens=0)

    def masked(self, q: Any, k: Any, v: Any, hidden: Any) -> Part:
        """Row i attends to the keys where ``hidden`` (B, 1, Sq, Skv) is False."""
        settings: dict[str, Any] = {} if _one_row(q) else {"inner_precise": _CORRECT_EMPTY_ROWS}
        return self._fia(q, k, v, atten_mask=hidden, sparse_mode=1, **settings)

    def merge(self, parts: list[Part]) -> Part:
        """The attention over disjoint sets of keys from that over each.

        One pass over memory. Written out, the merge is a dozen of them in float32, as much as the attention itself.
        ``npu_attention_update`` exists for the chips that FIA exists for (Atlas A2 and A3).
        """
        sizes = [length(parts[0].out, d) for d in range(4)]
        flat = [part.out.reshape(-1, sizes[3]) for part in parts]
        lses = [part.lse.reshape(-1) for part in parts]
        both = self.call(torch.ops.npu.npu_attention_update.default, lses, flat, int(self.with_lse))
        return Part(both[0].reshape(*sizes), both[1].reshape(*sizes[:3], 1) if self.with_lse else None)

    def _fia(self, q: Any, k: Any, v: Any, lse: bool = False, **settings: Any) -> Part:
        with_lse = lse or self.with_lse
        both = self.call(
            torch.ops.npu.npu_fused_infer_attention_score.default,
            q,
            k,
            v,
            num_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            input_layout="BNSD",
            scale=self.scale,
            softmax_lse_flag=with_lse,
            **settings,
        )
        return Part(both[0], both[1] if with_lse else None)


def _one_row(q: Any) -> bool:
    """Whether there is surely one query row: then there is no mask to give, and every key is seen."""
    n = length(q, 2)
    return isinstance(n, int) and n == 1
