"""Attention over a part of the keys, and the sum of such parts by their log-sum-exp."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from tmx_compile.lowering.base import AttentionCall, Writer, example, length
from tmx_compile.lowering.triton import Triton
from tmx_compile.lowering.triton.lowering import extents
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator import OPERATOR
from tmx_compile.report import Accepted

_ALL = Geometry(0, 0, ALL_ROWS)


def causal(write: Writer, q: Any, k: Any, v: Any, key_mask: Any, scale: float) -> tuple[Any, Any]:
    """Rows that end at the last key: out (B, H, Sq, Dv) and lse (B, H, Sq) float32."""
    mask = None if key_mask is None else example(key_mask)
    call = AttentionCall(example(q), example(k), example(v), mask, _ALL, scale, False)
    if isinstance(Triton().supports(call), Accepted):
        extent = None if key_mask is None else extents(key_mask, length(k, 2), ALL_ROWS)
        both = write.call(TRAINING_OPERATOR, q, k, v, key_mask, extent, *_ALL.arguments(scale))
    else:
        both = write.call(OPERATOR, q, k, v, key_mask, *_ALL.arguments(scale))
    return write.call(operator.getitem, both, 0), write.call(operator.getitem, both, 1)


def over_all(write: Writer, q: Any, k: Any, v: Any, key_mask: Any, scale: float) -> tuple[Any, Any]:
    """The same of rows that see every key: rows become heads, of one row each, which stands at the last key."""
    batch, heads, q_len, dim = (length(q, d) for d in range(4))
    out, lse = causal(write, q.reshape(batch, heads * q_len, 1, dim), k, v, key_mask, scale)
    return out.reshape(batch, heads, q_len, length(v, 3)), lse.reshape(batch, heads, q_len)


def packed(out: Any, lse: Any) -> Any:
    """Both in one flat tensor of out's dtype, the bits of the float32 lse as they are."""
    dtype, flat = example(out).dtype, lse.reshape(-1)
    bits = flat.view(dtype) if dtype.itemsize < torch.float32.itemsize else flat.to(dtype)
    return torch.cat([out.reshape(-1), bits])


def unpacked(x: Any, out: Any, lse: Any) -> tuple[Any, Any]:
    """(n, ...) of ``out`` and of ``lse`` from (n, all) of :func:`packed`."""
    dtype, shapes = example(out).dtype, [[length(y, d) for d in range(example(y).dim())] for y in (out, lse)]
    number, count = length(x, 0), math.prod(shapes[0])
    bits = x[:, count:]
    if dtype.itemsize < torch.float32.itemsize:
        # A copy of its own, in which float32 is aligned.
        bits = (
            bits.reshape(number, math.prod(shapes[1]), torch.float32.itemsize // dtype.itemsize)
            .contiguous()
            .view(torch.float32)
        )
    return x[:, :count].reshape(number, *shapes[0]), bits.reshape(number, *shapes[1]).to(torch.float32)


def merged(outs: Any, lses: Any) -> Any:
    """The whole (B, H, r, Dv) of parts (n, B, H, r, Dv) and their (n, B, H, r); 0 where no part has a key."""
    # A softmax over the parts would be NaN where all are empty.
    top = lses.amax(0)
    weights = torch.exp(lses - torch.where(top == float("-inf"), 0.0, top))
    total = weights.sum(0)
    weights = (weights / torch.where(total == 0.0, 1.0, total))[..., None]
    return (outs * weights).sum(0).to(example(outs).dtype)
