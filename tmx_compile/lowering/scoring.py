"""Attention under a mask that is written out, with what a layer does to its scores: scale, softcap, learned sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile.lowering.base import AttentionCall, Operands, arange, example, length

_ALIGNED = 8
"""Head dims that every kernel of SDPA takes are multiples of this."""


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become weights.

    Attributes:
        scale: factor on the products.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask; None: they stay.
        sink_logits: (H,), one more logit in the softmax of every row of a head, or None.
    """

    scale: float
    softcap: float | None = None
    sink_logits: Any = None

    @classmethod
    def of(cls, call: AttentionCall, operands: Operands) -> Scoring:
        """Those of a call."""
        return cls(call.scale, call.softcap, operands.sink_logits)


def attend(q: Any, k: Any, v: Any, mask: Any, scoring: Scoring) -> Any:
    """Attention (B, H, rows, Dv) under a bool mask (rows, keys) or (B or 1, 1, rows, keys), from tensors or proxies.

    By SDPA; with a softcap, which SDPA does not know, by scores (B, H, rows, keys) in float32.
    """
    if scoring.softcap is not None or (scoring.sink_logits is not None and scoring.scale == 0):
        return written_out(q, k, v, mask, scoring)
    if scoring.sink_logits is not None:
        return _with_sinks(q, k, v, mask, scoring)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale, enable_gqa=True)


def _with_sinks(q: Any, k: Any, v: Any, mask: Any, scoring: Scoring) -> Any:
    """A learned sink as one more key, with a value of zeros.

    Two more head dimensions hold the logit in every query, and in the sink's key what the scale is multiplied by to
    give 1, as a sum: one number would round it to the operands' dtype. SDPA's kernels with little memory want one head
    dim for all.
    """
    dim, value_dim, keys = length(q, 3), length(v, 3), length(k, 2)
    width = -(-max(dim + 2, value_dim) // _ALIGNED) * _ALIGNED
    dtype = example(q).dtype
    logits = scoring.sink_logits.to(dtype)[None, :, None, None]
    exact = (arange(k, keys + 1) == keys).to(torch.float64)[:, None] / scoring.scale
    rounded = exact.to(dtype)
    sink = torch.cat([rounded, (exact - rounded).to(dtype)], 1)
    q = torch.cat([q, logits.expand(length(q, 0), -1, length(q, 2), 2)], 3)
    k = torch.cat([F.pad(k, (0, 0, 0, 1)), sink.expand(length(k, 0), length(k, 1), -1, 2)], 3)
    q, k = (F.pad(x, (0, width - dim - 2)) for x in (q, k))
    v = F.pad(v, (0, width - value_dim, 0, 1))
    mask = F.pad(mask, (0, 1), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scoring.scale, enable_gqa=True)
    return out[:, :, :, :value_dim]


def written_out(q: Any, k: Any, v: Any, mask: Any, scoring: Scoring) -> Any:
    """:func:`attend` by the definition, in float32 (float64 stays): some row of ``mask`` may not be all False."""
    batch, heads, kv_heads, rows, dim = length(q, 0), length(q, 1), length(k, 1), length(q, 2), length(q, 3)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, rows, dim)
    scores = torch.einsum("bgrqd,bgkd->bgrqk", _wide(grouped), _wide(k)) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    hidden = ~mask if example(mask).dim() == 2 else ~mask[:, :, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if scoring.sink_logits is None:
        weights = torch.softmax(scores, -1)
    else:
        logits = scoring.sink_logits.to(example(scores).dtype).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        weights = torch.softmax(torch.cat([scores, logits.expand(batch, -1, -1, rows, 1)], -1), -1)[..., :-1]
    out = torch.einsum("bgrqk,bgkd->bgrqd", weights, _wide(v)).reshape(batch, heads, rows, length(v, 3))
    return out.to(example(q).dtype)


def _wide(x: Any) -> Any:
    return x if example(x).dtype == torch.float64 else x.to(torch.float32)
