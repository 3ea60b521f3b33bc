"""The exchange of :mod:`halo` where sequences are padded: each has sinks and last rows of its own, on any process.

Every process learns the whole key mask, and from it where each sequence begins and ends. Sinks and last rows are
summed up from those who hold them; the halo is as without padding; what the last rows see of each process goes to all,
since any may hold a last row.
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
from tmx_compile.lowering.context_parallel.ranks import Ranks


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
    tokens = length(q, 2)
    first = tokens * ranks.rank
    whole = whole_mask(write, ranks, key_mask)
    where = rows.extent(whole, tokens * ranks.size)
    # Positions of each sequence's sinks (B, sink) and last rows (B, last); a sequence may be too short for them.
    sinks, finals = where.start + arange(q, sink)[None, :], where.end - last + arange(q, last)[None, :]
    ours = [_held(k, sinks, first), _held(v, sinks, first), _held(q, finals, first)]
    sink_keys, sink_values, last_rows = _summed(write, ranks, ours)
    keys, values, mask = k, v, key_mask
    back = max(window, sink)
    if back > 0:
        halo = _halo(write, ranks, k, v, back)
        if not ranks.is_first:
            keys, values = (torch.cat(x, 2) for x in ((sink_keys, halo[0], k), (sink_values, halo[1], v)))
            mask = torch.cat([*_allowed(whole, where, sinks, first, sink, back), key_mask], 1)
    streaming = replace(
        call,
        key=example(keys),
        value=example(values),
        key_mask=example(mask),
        geometry=replace(call.geometry, last=0),
    )
    out = inner(streaming, Operands(q, keys, values, mask))
    if last == 0:
        return out
    part = _over_own_keys(write, last_rows, k, v, key_mask, where.end - first, last, call.scale)
    parts = ranks.all_gather(write, partial.packed(*part)).reshape(ranks.size, -1)
    here = rows.Extent(where.start - first, where.end - first)
    return rows.join(out, partial.merged(*partial.unpacked(parts, *part)), q, k, key_mask, here, last, call.layout)


def _held(x: Any, positions: Any, first: Any) -> Any:
    """(B, h, n, d): the tokens at positions (B, n) of the prompt that this piece, from ``first`` on, holds; else 0."""
    tokens = length(x, 2)
    place = positions - first
    held = (place >= 0) & (place < tokens)
    return torch.where(held[:, None, :, None], _at(x, place.clamp(min=0).clamp(max=tokens - 1)), 0.0)


def _at(x: Any, places: Any) -> Any:
    """(B, h, n, d): the tokens at places (B, n)."""
    return x.gather(2, places[:, None, :, None].expand(-1, length(x, 1), -1, length(x, 3)))


def _summed(write: Writer, ranks: Ranks, parts: list[Any]) -> list[Any]:
    """Each token from whoever holds it: the others have zeros there, and the sum is exact."""
    total, at, found = ranks.sum(write, torch.cat([x.reshape(-1) for x in parts])), 0, []
    for x in parts:
        shape = [length(x, d) for d in range(4)]
        count = shape[0] * shape[1] * shape[2] * shape[3]
        found.append(total[at : at + count].view(*shape))
        at = at + count
    return found


def _halo(write: Writer, ranks: Ranks, k: Any, v: Any, back: int) -> tuple[Any, Any]:
    """The last ``back`` keys and values of the left neighbour; of the first process nobody's."""
    ends = [x[:, :, length(x, 2) - back :] for x in (k, v)]
    counts = [length(x, 0) * length(x, 1) * back * length(x, 3) for x in ends]
    sent = [counts[0] + counts[1] if to == ranks.rank + 1 else 0 for to in range(ranks.size)]
    received = [counts[0] + counts[1] if source == ranks.rank - 1 else 0 for source in range(ranks.size)]
    buffer = torch.cat([x.reshape(-1) for x in ends])
    got = ranks.all_to_all(write, buffer[:0] if ranks.is_final else buffer, received, sent)
    if ranks.is_first:
        return got, got
    shapes = [[length(x, d) for d in range(4)] for x in ends]
    return got[: counts[0]].view(*shapes[0]), got[counts[0] :].view(*shapes[1])


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
