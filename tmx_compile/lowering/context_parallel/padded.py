"""The exchange of :mod:`halo` where sequences are padded: each has sinks and last rows of its own, on any process.

Every process learns the whole key mask, and from it where each sequence begins and ends. Sinks and last rows are
summed up from those who hold them: the others have zeros there, and the sum is exact. The halo is as without padding,
and on its way meanwhile; what the last rows see of each process goes to all, since any may hold a last row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Operands, Writer, arange, example, length
from tmx_compile.lowering.context_parallel import partial
from tmx_compile.lowering.context_parallel.heads import whole_mask
from tmx_compile.lowering.context_parallel.ranks import Pending, Ranks, apart, shape_of


def attend(
    write: Writer,
    ranks: Ranks,
    call: AttentionCall,
    operands: Operands,
    inner: Callable[[AttentionCall, Operands], Any],
) -> Any:
    """Attention (B, H, P, Dv) of this process's rows, streaming rows by ``inner``; a key mask (B, P), and no reach.

    All pieces have P tokens, at least :func:`~tmx_compile.lowering.context_parallel.halo.least_piece`.
    """
    q, k, v, key_mask = operands.of_attention
    sink, window, last = call.geometry.counts
    tokens, back = length(q, 2), max(window, sink)
    first = tokens * ranks.rank

    def stream(keys: Any, values: Any, mask: Any) -> Any:
        seen = replace(call, key=example(keys), value=example(values), key_mask=example(mask))
        streaming = replace(seen, geometry=replace(call.geometry, last=0))
        return inner(streaming, Operands(q, keys, values, mask))

    masks = whole_mask(write, ranks, key_mask)
    ends = [x[:, :, tokens - back :] for x in (k, v)]
    halo = _to_the_right(write, ranks, ends) if back > 0 else None
    whole = masks.wait()
    where = rows.extent(whole, tokens * ranks.size)
    # Positions of each sequence's sinks (B, sink) and last rows (B, last); a sequence may be too short for them.
    sinks, finals = where.start + arange(q, sink)[None, :], where.end - last + arange(q, last)[None, :]
    ours = [_held(k, sinks, first), _held(v, sinks, first), _held(q, finals, first)]
    shared = ranks.sum(write, torch.cat([x.reshape(-1) for x in ours]))
    # No key is before the first piece, so that it waits for nobody.
    out = stream(k, v, key_mask) if ranks.is_first or halo is None else None
    sink_keys, sink_values, last_rows = apart(shared.wait(), [shape_of(x) for x in ours])
    parts = None
    if last > 0:
        part = _over_own_keys(write, last_rows, k, v, key_mask, where.end - first, last, call.scale)
        parts = ranks.all_gather(write, partial.packed(*part))
    got = None if halo is None else halo.wait()
    if out is None:
        halo_keys, halo_values = apart(got, [shape_of(x) for x in ends])
        keys, values = (torch.cat(x, 2) for x in ((sink_keys, halo_keys, k), (sink_values, halo_values, v)))
        out = stream(keys, values, torch.cat([*_allowed(whole, where, sinks, first, sink, back), key_mask], 1))
    if parts is None:
        return out
    final = partial.merged(*partial.unpacked(parts.wait().reshape(ranks.size, -1), *part))
    here = rows.Extent(where.start - first, where.end - first)
    return rows.join(out, final, q, k, key_mask, here, last, call.layout)


def _held(x: Any, positions: Any, first: Any) -> Any:
    """(B, h, n, d): the tokens at positions (B, n) of the prompt that this piece, from ``first`` on, holds; else 0."""
    tokens = length(x, 2)
    place = positions - first
    held = (place >= 0) & (place < tokens)
    return torch.where(held[:, None, :, None], _at(x, place.clamp(min=0).clamp(max=tokens - 1)), 0.0)


def _at(x: Any, places: Any) -> Any:
    """(B, h, n, d): the tokens at places (B, n)."""
    return x.gather(2, places[:, None, :, None].expand(-1, length(x, 1), -1, length(x, 3)))


def _to_the_right(write: Writer, ranks: Ranks, ends: list[Any]) -> Pending:
    """Start to send the last keys and values of each piece to the next process, in one row; the first gets nobody's."""
    buffer = torch.cat([x.reshape(-1) for x in ends])
    count = length(buffer, 0)
    sent = [count if to == ranks.rank + 1 else 0 for to in range(ranks.size)]
    received = [count if source == ranks.rank - 1 else 0 for source in range(ranks.size)]
    return ranks.all_to_all(write, buffer[:0] if ranks.is_final else buffer, received, sent)


def _allowed(whole: Any, where: rows.Extent, sinks: Any, first: Any, sink: int, back: int) -> tuple[Any, Any]:
    """Which copies of sinks (B, sink) and which keys of the halo (B, back) count.

    Each sink counts once. Where all of a sequence's are before this piece, it is the copy. Else some of them are in
    the piece: then the others are in the halo, right before it, where a run of sinks has to be, and no copy counts.
    """
    before = where.start + sink <= first
    copies = before & (sinks < where.end) & whole.gather(1, sinks.clamp(max=length(whole, 1) - 1))
    key = arange(whole, back)[None, :] + (first - back)
    near = whole[:, first - back : first] & (~before | (key >= where.start + sink))
    return copies, near


def _over_own_keys(
    write: Writer, last_rows: Any, k: Any, v: Any, key_mask: Any, end: Any, last: int, scale: float
) -> tuple[Any, Any]:
    """Each sequence's last rows over the keys that this process holds: out (B, H, last, Dv) and lse (B, H, last).

    ``end`` (B, 1) is that of the sequence, counted from the first key here. Keys move to where the operator expects
    them: the last one that a sequence has, wherever it is, belongs under the last of the rows.
    """
    tokens = length(k, 2)
    shift = (tokens + last - end).clamp(min=0).clamp(max=tokens + last)
    place = arange(k, tokens + last)[None, :] - shift
    inside = (place >= 0) & (place < tokens)
    place = place.clamp(min=0).clamp(max=tokens - 1)
    return partial.causal(write, last_rows, _at(k, place), _at(v, place), inside & key_mask.gather(1, place), scale)
