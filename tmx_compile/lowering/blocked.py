"""Row-blocked attention: one batched ``scaled_dot_product_attention`` over blocks of rows.

A block of R rows reads [sinks | the blocks of keys that its window reaches], so the batch is (B * blocks) and the work
O(N * (sink + window + R)). The last rows are a second call. Runs wherever SDPA runs, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.layout import Order
from tmx_compile.lowering import rows
from tmx_compile.lowering.base import (
    AttentionCall,
    Lowering,
    Operands,
    Writer,
    arange,
    example,
    first_position,
    length,
    symbol,
)
from tmx_compile.lowering.scoring import Scoring, attend
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Reason, Rejected

_MAX_REACH = 4096


class Blocked(Lowering):
    """The ``blocked`` lowering."""

    name = "blocked"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Any device and dtype; windows, sinks and last rows that are small against the prompt."""
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "blocked: packed documents")
        if call.softcap is not None:
            return Rejected(Reason.NO_LOWERING, "blocked: SDPA has no softcap")
        kv_len = call.key.shape[2]
        for name, count, limit in (
            ("window", call.geometry.window, _MAX_REACH),
            ("sink", call.geometry.sink, _MAX_REACH),
            ("last", call.geometry.last, rows.MAX_LAST_ROWS),
        ):
            if (min(count, kv_len) if isinstance(kv_len, int) else count) > limit:
                return Rejected(Reason.NO_LOWERING, f"blocked: {name}={count} is more than {limit}")
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """See :func:`blocked_attention`."""
        out: Proxy = blocked_attention(*operands.of_attention, call.geometry, Scoring.of(call, operands), call.layout)
        return out


def rows_per_block(window: int) -> int:
    """Rows of a block. Measured on CPU: small windows want small blocks (benchmarks/results)."""
    if window <= 32:
        return 32
    return 64 if window <= 128 else 128


def blocked_attention(
    q: Any,
    k: Any,
    v: Any,
    key_mask: Any,
    geometry: Geometry,
    scoring: Scoring,
    layout: Order | None = None,
) -> Any:
    """Triangle attention, out (B, H, Sq, Dv), from tensors or proxies of the operator's shapes."""
    q_len, kv_len = length(q, 2), length(k, 2)
    where = rows.extent(key_mask, kv_len)
    ending = where if key_mask is None else rows.last_extent(where, kv_len, geometry.last)
    geometry = geometry.within_reach().bounded(kv_len, q_len)
    out = _streaming(q, k, v, key_mask, where, geometry, scoring)
    if geometry.last > 0:
        final = rows.last_rows(q, k, v, key_mask, ending, geometry, scoring)
        out = rows.join(out, final, q, k, key_mask, ending, geometry.last, layout)
    if key_mask is not None:
        out = rows.zero_empty(out, q, k, key_mask, ending, geometry)
    return out


def _streaming(q: Any, k: Any, v: Any, key_mask: Any, where: rows.Extent, geometry: Geometry, scoring: Scoring) -> Any:
    sink, window, reach = geometry.sink, geometry.window, geometry.reach
    batch, heads, q_len, head_dim = (length(q, d) for d in range(4))
    kv_len = length(k, 2)
    offset = first_position(q, k)
    size = rows_per_block(window)
    back = -(-window // size)  # whole blocks of keys before a row block's own
    # Always at least one row of padding: "is the padded length the length" would be a guard on its remainder, and a
    # recompile for every prompt that fills its blocks. Likewise one block alone would be a case of its own.
    blocks = q_len // size + (1 if statically_known_true(symbol(q_len) >= size) else 2)
    tail = blocks * size - q_len

    def key_blocks(x: Any, fill: float = 0.0) -> Any:
        """(B, h, Skv, d) -> (B, blocks, h, (back + 1) * size, d): the keys from `back` blocks back to the own one."""
        padded = F.pad(x, (0, 0, back * size, tail), value=fill)[:, :, offset:]
        cut = padded.reshape(length(x, 0), length(x, 1), blocks + back, size, length(x, 3)).transpose(1, 2)
        return torch.cat([cut[:, r : blocks + r] for r in range(back + 1)], 3)

    # Absolute positions: of a block's rows, of its keys, of the sinks.
    own = arange(q, blocks)[:, None, None] * size + offset
    row = own + arange(q, size)[None, :, None]
    near = own + (arange(q, (back + 1) * size) - back * size)[None, None, :]
    near_allowed = formula.causal(row, near) & formula.in_window(row, near, window) & (near >= 0)
    if key_mask is None:
        far = arange(q, sink)[None, None, :]
        far_allowed = formula.within((far <= row) & (row - far > window), row, far, reach)
        sinks = [_sink_rows(x, arange(q, sink).clamp(max=kv_len - 1), blocks) for x in (k, v)]
        mask = torch.cat([far_allowed, near_allowed], 2)[None]
    else:
        position = where.start + arange(q, sink)[None, :]
        index = torch.minimum(position, arange(q, 1) + (kv_len - 1))
        sinks = [_sink_rows(x, index, blocks) for x in (k, v)]
        far = position[:, None, None, :]
        valid = key_mask.gather(1, index)[:, None, None, :]
        far_allowed = valid & (far <= row) & (row - far > window) & (far < where.end[:, :, None, None])
        far_allowed = formula.within(far_allowed, row, far, reach)
        near_valid = key_blocks(key_mask[:, None, :, None].to(example(q).dtype))[:, :, 0, :, 0] > 0.5
        near_allowed = near_allowed & near_valid[:, :, None, :]
        mask = torch.cat([far_allowed, near_allowed], 3)
        # zero_empty clears the rows without keys afterwards.
        own_key = F.pad((near == row), (sink, 0))
        mask, _ = rows.with_own_key(mask, own_key)
    keys, values = (torch.cat([s, key_blocks(x)], 3).flatten(0, 1) for s, x in zip(sinks, (k, v), strict=True))
    queries = F.pad(q, (0, 0, 0, tail)).reshape(batch, heads, blocks, size, head_dim).transpose(1, 2).flatten(0, 1)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    out = attend(queries, keys, values, mask, scoring)
    out = out.reshape(batch, blocks, heads, size, length(v, 3)).transpose(1, 2)
    return out.reshape(batch, heads, blocks * size, length(v, 3))[:, :, :q_len]


def _sink_rows(x: Any, index: Any, blocks: Any) -> Any:
    """Sink keys repeated for every block: (B, blocks, Hkv, sink, D); index is (sink,) or (B, sink)."""
    if example(index).dim() == 2:
        found = x.gather(2, index[:, None, :, None].expand(-1, length(x, 1), -1, length(x, 3)))
    else:
        found = x.index_select(2, index)
    return found[:, None].expand(-1, blocks, -1, -1, -1)
