"""Building blocks that several lowerings share: extents of padded sequences, the last rows, and joining the parts.

Every function takes tensors or proxies, and uses no data-dependent control flow and no guard on a length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.layout import Order, inverse
from tmx_compile.lowering.base import arange, first_position, length, symbol
from tmx_compile.lowering.scoring import Scoring, attend
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

MAX_LAST_ROWS = 4096
"""More last rows than this would make their (rows, Skv) mask the very thing that is to be avoided."""

_AS_IT_IS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Extent:
    """Where the valid keys of each sequence are: (B, 1) int64, or plain numbers without a key mask."""

    start: Any
    end: Any


def extent(key_mask: Any, kv_len: Any) -> Extent:
    """First valid key and one past the last; [0, 0) for a sequence without valid keys."""
    if key_mask is None:
        return Extent(0, kv_len)
    position = arange(key_mask, kv_len)[None, :]
    end = torch.where(key_mask, position + 1, 0).amax(1, keepdim=True)
    start = torch.where(key_mask, position, kv_len).amin(1, keepdim=True)
    return Extent(torch.minimum(start, end), end)


def last_extent(where: Extent, kv_len: Any, last: int) -> Extent:
    """The extent that the last rows count from the end of: all keys, where all rows are last rows."""
    return Extent(where.start, where.end * 0 + kv_len) if last >= ALL_ROWS else where


def with_own_key(allowed: Any, own: Any) -> tuple[Any, Any]:
    """Let a row without any key see its own position, so that no softmax is empty; and tell which rows have keys.

    An empty softmax gives NaN in some kernels, and NaN gradients even where the result is thrown away.
    """
    alive = allowed.any(-1)
    return allowed | (own & ~alive[..., None]), alive


def last_rows(q: Any, k: Any, v: Any, key_mask: Any, where: Extent, geometry: Geometry, scoring: Scoring) -> Any:
    """Attention of the final ``geometry.last`` rows over all keys in reach: (B, H, last, Dv).

    Row t of the result is the row at absolute position ``end - last + t``; where that lies before row 0 it repeats
    row 0, and the caller does not use it.
    """
    q_len, kv_len, last = length(q, 2), length(k, 2), geometry.last
    offset = first_position(q, k)
    key = arange(k, kv_len)
    if key_mask is None:
        row = (arange(q, last) + (q_len - last)).clamp(min=0)
        rows = q.index_select(2, row) if not _fits(q_len, last) else q[:, :, q_len - last :]
        position = (row + offset)[:, None]
        mask = formula.within(formula.causal(position, key[None, :]), position, key[None, :], geometry.reach)
        return attend(rows, k, v, mask, scoring)
    row = (where.end - last + arange(q, last)[None, :] - offset).clamp(min=0)
    row = torch.minimum(row, arange(q, 1) + (q_len - 1))
    index = row[:, None, :, None].expand(-1, length(q, 1), -1, length(q, 3))
    position = (row + offset)[:, :, None]
    start, end = where.start[:, :, None], where.end[:, :, None]
    own = replace(geometry, sink=0, window=0)
    allowed = formula.attended(position, key, start, end, own) & key_mask[:, None, :]
    safe, _ = with_own_key(allowed, key == position)
    return attend(q.gather(2, index), k, v, safe[:, None], scoring)


def join(
    stream: Any, rows: Any, q: Any, k: Any, key_mask: Any, where: Extent, last: int, layout: Order | None = None
) -> Any:
    """Put the last rows over the streaming rows: (B, H, Sq, Dv).

    ``layout`` is the order in memory in which parts are put together.
    """
    q_len = length(q, 2)
    offset = first_position(q, k)
    if key_mask is None:
        if _fits(q_len, last):
            parts = [stream[:, :, : q_len - last], rows]
            if layout in (None, _AS_IT_IS):
                return torch.cat(parts, 2)
            return torch.cat([x.permute(layout) for x in parts], layout.index(2)).permute(inverse(layout))
        row = arange(q, q_len)
        chosen = rows.index_select(2, (row - (q_len - last)).clamp(min=0))
        return torch.where((row >= q_len - last)[:, None], chosen, stream)
    position = arange(q, q_len)[None, :] + offset
    first = where.end - last
    final = formula.is_last(position, where.end, last)[:, None, :, None]
    # Gathering (not scattering) keeps gradients right where short sequences repeat a row in `rows`.
    index = (position - first).clamp(min=0, max=last - 1)[:, None, :, None]
    index = index.expand(-1, length(rows, 1), -1, length(rows, 3))
    return torch.where(final, rows.gather(2, index), stream)


def zero_empty(out: Any, q: Any, k: Any, key_mask: Any, where: Extent, geometry: Geometry) -> Any:
    """Zero the rows that attend to nothing; see :func:`alive`."""
    return torch.where(alive(q, k, key_mask, where, geometry)[:, None, :, None], out, 0.0)


def alive(q: Any, k: Any, key_mask: Any, where: Extent, geometry: Geometry) -> Any:
    """(B, Sq) bool: the rows that attend to something, with a valid key in reach.

    A row's reach is its sinks, its window and, for a last row, everything from the start: counted on the running
    number of valid keys, so that no (rows, keys) tensor is needed.
    """
    q_len, kv_len, reach = length(q, 2), length(k, 2), geometry.reach
    position = arange(q, q_len)[None, :] + (kv_len - q_len)
    # valid[:, t] is the number of valid keys before position t. Not by a pad: torchair pads no integers.
    count = key_mask.to(torch.int64)
    valid = torch.cat([count[:, :1] * 0, count.cumsum(1)], 1)
    seen = valid.gather(1, position.expand(length(q, 0), q_len) + 1)
    in_window = seen - valid.gather(1, (position - geometry.window).clamp(min=0).expand(length(q, 0), q_len))
    sinks_end = torch.minimum(where.start + geometry.sink, position + 1)
    in_sinks = valid.gather(1, torch.minimum(sinks_end, where.end))
    if reach is not None:
        beyond = valid.gather(1, (position - reach).clamp(min=0).expand(length(q, 0), q_len))
        in_sinks, seen = in_sinks - beyond, seen - beyond
    return (in_window > 0) | (in_sinks > 0) | (formula.is_last(position, where.end, geometry.last) & (seen > 0))


def _fits(q_len: Any, last: int) -> bool:
    """Whether there are surely at least ``last`` rows; never guards."""
    return bool(statically_known_true(symbol(q_len) >= last))
