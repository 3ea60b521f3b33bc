"""The dense-mask form of the operator in float32: an oracle, for tests and tiny inputs only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer, arange, length
from tmx_compile.lowering.scoring import Scoring, written_out
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Reason, Rejected

_MAX_CELLS = 1 << 24


class Reference(Lowering):
    """The ``reference`` lowering: never chosen by ``auto``."""

    name = "reference"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """Problems whose (Sq, Skv) mask is small, judged by the lengths seen at compile time."""
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "reference: packed documents")
        q_len, kv_len = (_hint(n) for n in (call.query.shape[2], call.key.shape[2]))
        if q_len * kv_len > _MAX_CELLS:
            return Rejected(Reason.NO_LOWERING, f"reference: a mask of {q_len} x {kv_len} is too large for it")
        return Accepted("builds the dense mask")

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """See :func:`reference_attention`."""
        out: Proxy = reference_attention(*operands.of_attention, call.geometry, Scoring.of(call, operands))
        return out


def reference_attention(q: Any, k: Any, v: Any, key_mask: Any, geometry: Geometry, scoring: Scoring) -> Any:
    """Triangle attention, out (B, H, Sq, Dv), with the mask written out; float64 stays float64."""
    q_len, kv_len = length(q, 2), length(k, 2)
    where = rows.extent(key_mask, kv_len)
    row = (arange(q, q_len) + (kv_len - q_len))[None, :, None]
    key = arange(q, kv_len)[None, None, :]
    if key_mask is not None:
        where = rows.Extent(where.start[:, :, None], where.end[:, :, None])
    allowed = formula.attended(row, key, where.start, where.end, geometry)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, :]
    safe, alive = rows.with_own_key(allowed, key == row)
    return torch.where(alive[:, None, :, None], written_out(q, k, v, safe[:, None], scoring), 0.0)


def _hint(n: int | torch.SymInt) -> int:
    return n if isinstance(n, int) else int(n.node.hint if n.node.has_hint() else _MAX_CELLS)
