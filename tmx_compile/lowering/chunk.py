"""Chunks of a prompt: the first last row is known when the graph runs, not when it is compiled.

Two operators. ``tmx::first_last_row`` reads on the host what the caller said about the prompt; its result is a tensor
in host memory, so nothing waits for a device and no graph is compiled again for another length.
``tmx::triangle_attention_chunk`` computes streaming rows and last rows as two problems of the usual kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node, Proxy

from tmx_compile.errors import LoweringError
from tmx_compile.graph.nodes import FIRST_ROW
from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer, length
from tmx_compile.lowering.blocked import Blocked, blocked_attention
from tmx_compile.lowering.triton.lowering import attend as triton_attention
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator import OPERATOR
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.prefill import current_chunk
from tmx_compile.operator.sharding import shard_by_batch_and_heads
from tmx_compile.report import Accepted, Reason, Rejected

OWN_END = -1
"""First last row of a call that is a whole prompt by itself: ``last`` rows before each sequence's end."""

_NONE = 2**62
_DENSE_CELLS = 1 << 26


@torch.library.custom_op(
    "tmx::first_last_row",
    mutates_args=(),
    schema="(Tensor like, Tensor? first_row, SymInt q_len, SymInt kv_len, int last, int dense_up_to, bool streaming)"
    " -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _first_last_row(
    like: Tensor, first_row: Tensor | None, q_len: int, kv_len: int, last: int, dense_up_to: int, streaming: bool
) -> Tensor:
    batch = like.shape[0]
    # A static cache: this read waits for the device, once for all layers.
    seen = kv_len if first_row is None else int(first_row.reshape(-1)[0]) + q_len
    return torch.tensor(_first(batch, q_len, seen, kv_len - seen, last, dense_up_to, streaming), dtype=torch.int64)


def _first(batch: int, q_len: int, seen: int, moved: int, last: int, dense_up_to: int, streaming: bool) -> list[int]:
    chunk = current_chunk()
    if q_len == 1 and (chunk is None or (chunk.totals is not None and seen > max(chunk.totals))):
        return [_NONE if streaming else 0] * batch
    if chunk is None:
        return [0 if q_len <= dense_up_to else OWN_END] * batch
    if chunk.totals is None:
        if not chunk.final:
            return [_NONE] * batch
        return [0 if seen <= dense_up_to else OWN_END] * batch
    totals = chunk.totals if len(chunk.totals) > 1 else chunk.totals * batch
    if len(totals) != batch:
        raise ValueError(f"prefill(total_tokens=...) has {len(totals)} numbers, and the batch {batch} sequences")
    if max(totals) <= dense_up_to:
        return [0] * batch
    return [max(0, total - last) + moved for total in totals]


@_first_last_row.register_fake
def _(
    like: Tensor, first_row: Tensor | None, q_len: int, kv_len: int, last: int, dense_up_to: int, streaming: bool
) -> Tensor:
    return torch.empty(like.shape[0], dtype=torch.int64, device="cpu")


@torch.library.custom_op(
    "tmx::triangle_attention_chunk",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor first_last_row, int sink, int window,"
    " int last, float scale, int? reach, str lowering) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def _chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    first_last_row: Tensor,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None,
    lowering: str,
) -> Tensor:
    firsts: list[int] = first_last_row.tolist()
    part = Part(Geometry(sink, window, last, reach), scale, lowering)
    out = empty_by_tokens(query, value.shape[3])
    with torch.autocast(query.device.type, enabled=False):
        if len(set(firsts)) <= 1:
            return _rows(part, query, key, value, key_mask, firsts[0] if firsts else 0, out)
        for b, first in enumerate(firsts):
            s = slice(b, b + 1)
            mask = None if key_mask is None else key_mask[s]
            _rows(part, query[s], key[s], value[s], mask, first, out[s])
    return out


@_chunk.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_by_tokens(query, value.shape[3])


def _rows(part: Part, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, first: int, out: Tensor) -> Tensor:
    """Streaming rows up to the first last row (a position among the keys), then rows over all keys, into ``out``."""
    q_len, kv_len = q.shape[2], k.shape[2]
    if first == OWN_END:
        return out.copy_(part.attend(q, k, v, key_mask, part.geometry.last))
    row = min(max(first - (kv_len - q_len), 0), q_len)
    if row > 0:
        # All rows: cut off with their keys, a padded row at the cut would lose the place that it has in the prompt.
        out.copy_(part.attend(q, k, v, key_mask, 0))
    if row < q_len:
        out[:, :, row:].copy_(part.attend(q[:, :, row:], k, v, key_mask, ALL_ROWS))
    return out


@dataclass(frozen=True)
class Part:
    """Attention of real tensors by the lowering that suits them."""

    geometry: Geometry
    scale: float
    lowering: str

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, last: int) -> Tensor:
        """Triangle attention (B, H, Sq, Dv) of a call whose rows end at the last key."""
        call = AttentionCall(q, k, v, key_mask, replace(self.geometry, last=last), self.scale, False)
        if self.lowering == "triton" or (self.lowering == "auto" and q.is_cuda):
            out = triton_attention(call)
            if isinstance(out, Tensor):
                return out
            if self.lowering == "triton":
                raise LoweringError(f"lowering 'triton' cannot take this chunk: {out.detail}")
        if self.lowering != "operator":
            if last >= q.shape[2] and q.shape[2] * k.shape[2] <= _DENSE_CELLS:
                return _dense(call)
            if isinstance(Blocked().supports(call), Accepted):
                blocked: Tensor = blocked_attention(q, k, v, key_mask, call.geometry, self.scale)
                return blocked
        both: tuple[Tensor, Tensor] = OPERATOR(q, k, v, key_mask, *call.geometry.arguments(self.scale))
        return both[0]


def _dense(call: AttentionCall) -> Tensor:
    """Rows over all keys by SDPA, with a mask of (rows, keys) where SDPA has no better way to be told."""
    q, k, v, key_mask = call.query, call.key, call.value, call.key_mask
    q_len, kv_len = q.shape[2], k.shape[2]
    if key_mask is None and call.geometry.reach is None and q_len == kv_len:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=call.scale, enable_gqa=True)
    row = (torch.arange(q_len, device=q.device) + (kv_len - q_len))[:, None]
    key = torch.arange(kv_len, device=q.device)[None, :]
    allowed = formula.within(formula.causal(row, key), row, key, call.geometry.reach)
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=call.scale, enable_gqa=True)
    safe, alive = rows.with_own_key(allowed[None] & key_mask[:, None, :], (key == row)[None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=safe[:, None], scale=call.scale, enable_gqa=True)
    return torch.where(alive[:, None, :, None], out, 0.0)


@dataclass(frozen=True)
class Chunked(Lowering):
    """The ``chunked`` lowering: calls that may be a chunk of their prompt.

    Attributes:
        dense_up_to: prompts up to this length stay dense.
        streaming: whether decode steps attend to sinks and window only.
        parts: what computes the parts: "auto", or the name of a lowering.
    """

    dense_up_to: int
    streaming: bool
    parts: str
    name: str = "chunked"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Every call for inference, but packed documents."""
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "chunked: packed documents")
        if call.needs_grad:
            return Rejected(Reason.NO_LOWERING, "chunked: inference only")
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """The two operators."""
        q, k, key_mask, geometry = operands.query, operands.key, operands.key_mask, call.geometry
        node = write.origin.meta.get(FIRST_ROW)
        first_row = write.proxy(node) if isinstance(node, Node) else None
        # Of a key mask, which layers share, so that they share this too.
        like = q if key_mask is None else key_mask
        first = write.call(
            FIRST_LAST_ROW, like, first_row, length(q, 2), length(k, 2), geometry.last, self.dense_up_to, self.streaming
        )
        out: Proxy = write.call(
            CHUNK, q, k, operands.value, key_mask, first, *geometry.counts, call.scale, geometry.reach, self.parts
        )
        return out


FIRST_LAST_ROW = torch.ops.tmx.first_last_row.default
"""``(like (B, ...), position of row 0?, Sq, Skv, last, dense up to, streaming decode?) -> (B,) int64 in host memory``:
the place among the keys of each sequence's first last row, from :func:`tmx_compile.prefill.prefill`; -1: ``last`` rows
before its own end."""

CHUNK = torch.ops.tmx.triangle_attention_chunk.default
"""Triangle attention whose last rows begin at a key that a host tensor tells: out (B, H, Sq, Dv)."""

shard_by_batch_and_heads(CHUNK)
