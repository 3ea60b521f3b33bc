"""What the ``ascend`` lowering takes, and how it writes its nodes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.nodes import value_of
from tmx_compile.lowering import base
from tmx_compile.lowering.ascend.attention import Sections, attention, padded_dim
from tmx_compile.lowering.ascend.calls import Calls, compressed_mask, missing
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer
from tmx_compile.report import Accepted, Reason, Rejected

DTYPES = (torch.float16, torch.bfloat16)
_MOST_DIM, _MOST_GROUP, _MOST_HEADS, _MOST_ROWS = 512, 64, 256, 20 * 2**20
_MOST_FIXED_ROWS = 1 << 15
_MASK = "tmx_compressed_mask"


class Ascend(Lowering):
    """The ``ascend`` lowering."""

    name = "ascend"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """float16 and bfloat16 inference, with or without padding, with or without keys before the rows."""
        why = missing() or _why_not(call)
        return Rejected(Reason.NO_LOWERING, f"ascend: {why}") if why else Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """See :func:`~tmx_compile.lowering.ascend.attention.attention`."""
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
        mask = functools.cache(lambda: _shared_mask(write, operands.query))
        calls = Calls(write.call, mask, heads, kv_heads, call.scale)
        sections = Sections(call.geometry, call.dense_up_to)
        out: Proxy = attention(*operands.of_attention, sections, calls).out
        return out


def _why_not(call: AttentionCall) -> str:
    """The reason why a call cannot be lowered, or an empty string. Never guards."""
    query, key, value = call.query, call.key, call.value
    n, dim, value_dim = query.shape[2], query.shape[3], value.shape[3]
    if query.dtype not in DTYPES:
        return f"the fused operator takes float16 and bfloat16, not {str(query.dtype).removeprefix('torch.')}"
    if call.needs_grad:
        return "the fused operator is for inference, call the model under torch.no_grad()"
    if call.documents or call.changes:
        return call.changes or "packed documents"
    if call.geometry.reach is not None:
        return "a sliding window of the layer's own"
    if not isinstance(call.scale, float):
        return "a scale that is known only when the graph runs"
    sizes = (query.shape[1], key.shape[1], dim, value_dim)
    if not all(isinstance(size, int) for size in sizes):
        return "the numbers of heads and the head dims have to be fixed"
    if call.dense_up_to is not None and not statically_known_true(n == key.shape[2]):
        return "a graph for every length needs as many rows as keys"
    if any(size == 0 for size in (*query.shape, *value.shape) if isinstance(size, int)):
        return "an empty tensor"
    widest = padded_dim(dim, value_dim, call.key_mask is not None)
    if widest > _MOST_DIM:
        beside = ", with the columns for the key mask beside it" if max(dim, value_dim) <= _MOST_DIM else ""
        return f"head dim {max(dim, value_dim)}: at most {_MOST_DIM}{beside}"
    if query.shape[1] > _MOST_GROUP * key.shape[1]:
        return f"{query.shape[1]} heads for {key.shape[1]} key heads: at most {_MOST_GROUP} for one"
    if query.shape[1] > _MOST_HEADS:
        return f"{query.shape[1]} heads: at most {_MOST_HEADS}"
    if isinstance(n, int) and n > _MOST_ROWS:
        return f"{n} rows: at most {_MOST_ROWS}"
    if call.key_mask is not None and not 1e-3 <= call.scale <= 1e3:
        return f"padding with scale={call.scale}: 0.001 to 1000"
    return _geometry_why_not(call)


def _geometry_why_not(call: AttentionCall) -> str:
    """With a length that is not fixed, some rows are taken in numbers that are; with padding, also a mask."""
    n, kv_len = call.query.shape[2], call.key.shape[2]
    sections = Sections(call.geometry, call.dense_up_to)
    fixed = isinstance(n, int) and isinstance(kv_len, int)
    sections = sections.within(n, kv_len, padded=call.key_mask is not None) if fixed else sections
    if not sections.geometry.is_dense and isinstance(n, int) and n == 1:
        return "one row that is no last row: the fused operator has no band for one row"
    if sections.geometry.is_dense or (fixed and call.key_mask is None):
        return ""
    counts = (("sink + window", sections.first_sparse), ("last", sections.last), ("min_seq_len", sections.head))
    for name, count in counts:
        if count > _MOST_FIXED_ROWS:
            return f"{name} of {count} rows without a fixed length, or with padding: at most {_MOST_FIXED_ROWS}"
    return ""


def _shared_mask(write: Writer, like: Proxy) -> Any:
    """The compressed mask of a graph: built where the first call of any layer needs it, then found again."""
    device = value_of(like.node).device
    node: Node = write.origin.prev
    while node.op != "root":
        if node.meta.get(_MASK) == device:
            return write.proxy(node)
        node = node.prev
    mask = compressed_mask(like, base.arange)
    mask.node.meta[_MASK] = device
    return mask
