"""Triangle attention of a piece of the prompt: what a process lacks is the sinks, a halo of keys, and the last rows.

Process r holds P keys. Its rows attend to the sinks, which process 0 holds, to its own keys, and to the ``window``
keys before them, the *halo*, which its left neighbour holds. The last rows of the prompt are the final process's; they
attend to every key. Every process attends with them over its own keys, and the final one adds the results up by
their log-sum-exp. So the bytes that travel are those of sink + window keys and of ``last`` rows, whatever N is: one
message before, one behind. Every row but the first process's needs the sinks, so none of theirs can go before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Operands, Writer, example, length
from tmx_compile.lowering.context_parallel import partial
from tmx_compile.lowering.context_parallel.ranks import Pending, Ranks, apart, count_of, shape_of
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
    tokens, last = length(q, 2), geometry.last
    exchange = _Exchange.started(write, ranks, q, k, v, geometry)

    def stream(*more: tuple[Any, Any]) -> Any:
        keys, values = (torch.cat(x, 2) if more else x[0] for x in zip(*more, (k, v), strict=True))
        seen = replace(call, key=example(keys), value=example(values), geometry=replace(geometry, last=0))
        return inner(seen, Operands(q, keys, values, None))

    # What needs nothing of the others goes before the wait: rows without a key before them, last rows where they are.
    out = stream() if ranks.is_first else None
    part = None
    if last > 0 and ranks.is_final:
        part = partial.causal(write, q[:, :, tokens - last :], k, v, None, call.scale)
    got = exchange.wait()
    if last > 0 and part is None:
        part = partial.over_all(write, got["last_rows"], k, v, None, call.scale)
    # On its way while the rows of the other processes stream.
    parts = None if part is None else _to_final(write, ranks, partial.packed(*part))
    if out is None:
        pairs = [(got[f"{name}_keys"], got[f"{name}_values"]) for name in ("sink", "halo") if f"{name}_keys" in got]
        out = stream(*pairs)
    if part is None or parts is None:
        return out
    found = parts.wait()
    if not ranks.is_final:
        return out
    final = partial.merged(*partial.unpacked(found.view(ranks.size, -1), *part))
    return rows.join(out, final, q, k, None, rows.Extent(0, length(k, 2)), last, call.layout)


@dataclass(frozen=True)
class _Exchange:
    """What a process gets of the others, under way: sinks (none on the first), halo (likewise), the final one's rows.

    Attributes:
        pending: the collective; None where nobody sends anything.
        shapes: of what this process gets, by name, in the order in which it comes.
    """

    pending: Pending | None
    shapes: dict[str, list[Any]]

    @classmethod
    def started(cls, write: Writer, ranks: Ranks, q: Any, k: Any, v: Any, geometry: Geometry) -> _Exchange:
        """One all-to-all: the first sends sinks to all, each its end to the next, the final one its rows to all."""
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
            if source == final and to != final and last:
                names += ["last_rows"]
            return names

        everyone = range(ranks.size)
        sent = [sends(ranks.rank, to) for to in everyone]
        received = [sends(source, ranks.rank) for source in everyone]
        shapes = {name: shape_of(parts[name]) for names in received for name in names}
        if not any(sends(source, to) for source in everyone for to in everyone):
            return cls(None, shapes)
        counts = {name: count_of(shape_of(x)) for name, x in parts.items()}
        flat = [parts[name].reshape(-1) for names in sent for name in names]
        # Processes in the middle may have nothing to send, and take part all the same.
        buffer = torch.cat(flat) if flat else q.reshape(-1)[:0]
        sizes = [[_total(counts[name] for name in names) for names in each] for each in (received, sent)]
        return cls(ranks.all_to_all(write, buffer, *sizes), shapes)

    def wait(self) -> dict[str, Any]:
        """(B, h, n, d) by name; what a process does not get has none."""
        if self.pending is None:
            return {}
        return dict(zip(self.shapes, apart(self.pending.wait(), list(self.shapes.values())), strict=True))


def _to_final(write: Writer, ranks: Ranks, x: Any) -> Pending:
    """``x`` (n,) of every process in one row, on the final one; on the others nothing."""
    count = length(x, 0)
    sent = [0] * (ranks.size - 1) + [count]
    received = [count if ranks.is_final else 0] * ranks.size
    return ranks.all_to_all(write, x, received, sent)


def _total(counts: Any) -> Any:
    total: Any = 0
    for count in counts:
        total = total + count
    return total
