"""Triangle attention of a piece of the prompt: what a process lacks is the sinks, a halo of keys, and the last rows.

Process r holds P keys. Its rows attend to the sinks, which process 0 holds, to its own keys, and to the ``window``
keys before them, the *halo*, which its left neighbour holds. The last rows of the prompt are the final process's; they
attend to every key. Every process attends with them over its own keys, and the final one adds the results up by
their log-sum-exp. So the bytes that travel are those of sink + window keys and of ``last`` rows, whatever N is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Operands, Writer, example, length
from tmx_compile.lowering.context_parallel import partial
from tmx_compile.lowering.context_parallel.ranks import Ranks
from tmx_compile.mask.geometry import Geometry


def least_piece(geometry: Geometry) -> int:
    """The tokens that each piece must have: its neighbours ask for no more than one process holds.

    Sinks and halo then have no key in common either.
    """
    return max(geometry.sink + geometry.window, geometry.last, 1)


def attend(
    write: Writer,
    ranks: Ranks,
    call: AttentionCall,
    operands: Operands,
    inner: Callable[[AttentionCall, Operands], Any],
) -> Any:
    """Attention (B, H, P, Dv) of this process's rows; streaming rows by ``inner``.

    The pieces may have different lengths, each at least :func:`least_piece`. No key mask, no reach.
    """
    q, k, v, geometry = operands.query, operands.key, operands.value, call.geometry
    got = _exchanged(write, ranks, q, k, v, geometry)
    keys = torch.cat([*(x for x in (got.sink_keys, got.halo_keys) if x is not None), k], 2)
    values = torch.cat([*(x for x in (got.sink_values, got.halo_values) if x is not None), v], 2)
    streaming = replace(call, key=example(keys), value=example(values), geometry=replace(geometry, last=0))
    out = inner(streaming, Operands(q, keys, values, None))
    if geometry.last == 0:
        return out
    if ranks.is_final:
        last, lse = partial.causal(write, got.last_rows, k, v, None, call.scale)
    else:
        last, lse = partial.over_all(write, got.last_rows, k, v, None, call.scale)
    parts = _to_final(write, ranks, partial.packed(last, lse))
    if not ranks.is_final:
        return out
    final = partial.merged(*partial.unpacked(parts, last, lse))
    return rows.join(out, final, q, k, None, rows.Extent(0, length(k, 2)), geometry.last, call.layout)


@dataclass(frozen=True)
class _Exchanged:
    """What a process has of the others: sinks (none on the first), halo (likewise), the rows of the final one."""

    sink_keys: Any
    sink_values: Any
    halo_keys: Any
    halo_values: Any
    last_rows: Any


def _exchanged(write: Writer, ranks: Ranks, q: Any, k: Any, v: Any, geometry: Geometry) -> _Exchanged:
    """One all-to-all: the first process sends the sinks to all, each its end to the next, the final one its rows."""
    tokens, final = length(k, 2), ranks.size - 1
    sink, window, last = geometry.counts
    parts = {
        "sink_keys": k[:, :, :sink],
        "sink_values": v[:, :, :sink],
        "halo_keys": k[:, :, tokens - window :],
        "halo_values": v[:, :, tokens - window :],
        "last_rows": q[:, :, tokens - last :],
    }

    def sends(source: int, to: int) -> list[str]:
        names: list[str] = []
        if source == 0 and to != 0 and sink:
            names += ["sink_keys", "sink_values"]
        if source == to - 1 and window:
            names += ["halo_keys", "halo_values"]
        if source == final and last:
            # To itself too: what it sends next then comes after this, as on every other process.
            names += ["last_rows"]
        return names

    everyone = range(ranks.size)
    sent = [sends(ranks.rank, to) for to in everyone]
    received = [sends(source, ranks.rank) for source in everyone]
    counts = {name: _count(x) for name, x in parts.items()}
    flat = [parts[name].reshape(-1) for names in sent for name in names]
    found: dict[str, Any] = {}
    if any(sends(source, to) for source in everyone for to in everyone):
        # Processes in the middle may have nothing to send, and take part all the same.
        buffer = torch.cat(flat) if flat else q.reshape(-1)[:0]
        sizes = [[_total(counts[name] for name in names) for names in each] for each in (received, sent)]
        got, at = ranks.all_to_all(write, buffer, *sizes), 0
        for name in (name for names in received for name in names):
            found[name] = got[at : at + counts[name]].view(*(length(parts[name], d) for d in range(4)))
            at = at + counts[name]
    return _Exchanged(*(found.get(name) for name in parts))


def _to_final(write: Writer, ranks: Ranks, x: Any) -> Any:
    """(size, n) of the ``x`` (n,) of every process, on the final one; on the others nothing."""
    count = length(x, 0)
    sent = [0] * (ranks.size - 1) + [count]
    received = [count if ranks.is_final else 0] * ranks.size
    got = ranks.all_to_all(write, x, received, sent)
    return got.view(ranks.size, count) if ranks.is_final else got


def _count(x: Any) -> Any:
    total: Any = 1
    for dim in range(example(x).dim()):
        total = total * length(x, dim)
    return total


def _total(counts: Any) -> Any:
    total: Any = 0
    for count in counts:
        total = total + count
    return total
