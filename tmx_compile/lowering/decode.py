"""One row over its sinks and window: gather those keys, O(sink + window) whatever the cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer, arange, length
from tmx_compile.lowering.scoring import Scoring, attend
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Reason, Rejected

_MAX_KEYS = 1 << 16


class Decode(Lowering):
    """The ``decode`` lowering: a single row, which is no last row."""

    name = "decode"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """One row on any device; sinks and windows that one may gather."""
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "decode: packed documents")
        if call.query.shape[2] != 1 or call.geometry.last != 0:
            return Rejected(Reason.NO_LOWERING, f"decode: {call.query.shape[2]} rows, last={call.geometry.last}")
        if call.geometry.sink + call.geometry.window > _MAX_KEYS:
            return Rejected(Reason.NO_LOWERING, f"decode: more than {_MAX_KEYS} keys to gather")
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """See :func:`decode_attention`."""
        out: Proxy = decode_attention(*operands.of_attention, call.geometry, Scoring.of(call, operands))
        return out


def decode_attention(q: Any, k: Any, v: Any, key_mask: Any, geometry: Geometry, scoring: Scoring) -> Any:
    """Streaming attention of one row (B, H, 1, D) at the last key, out (B, H, 1, Dv), from tensors or proxies."""
    geometry = geometry.within_reach()
    sink, window, reach = geometry.sink, geometry.window, geometry.reach
    kv_len = length(k, 2)
    row = kv_len - 1
    # Positions of the gathered keys; a sink inside the window counts there.
    near = arange(q, window + 1) + (row - window)
    if key_mask is None:
        far = arange(q, sink)
        allowed = torch.cat([formula.within(far < row - window, row, far, reach), near >= 0])
        index = torch.cat([far.clamp(max=row), near.clamp(min=0)])
        keys, values = (x.index_select(2, index) for x in (k, v))
        mask = allowed[None, None, None, :]
        return attend(q, keys, values, mask, scoring)
    where = rows.extent(key_mask, kv_len)
    far = where.start + arange(q, sink)[None, :]
    near = near[None, :].expand(length(q, 0), -1)
    allowed = torch.cat([formula.within(far < row - window, row, far, reach), near >= where.start], 1)
    index = torch.cat([far.clamp(max=row), near.clamp(min=0)], 1)
    allowed = allowed & key_mask.gather(1, index)
    own = arange(q, sink + window + 1) == sink + window
    safe, alive = rows.with_own_key(allowed, own)
    keys, values = (x.gather(2, index[:, None, :, None].expand(-1, length(x, 1), -1, length(x, 3))) for x in (k, v))
    mask = safe[:, None, None, :]
    out = attend(q, keys, values, mask, scoring)
    return torch.where(alive[:, None, None, None], out, 0.0)
