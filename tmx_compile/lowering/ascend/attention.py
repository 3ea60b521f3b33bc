"""Triangle attention from calls of FIA and one merge, O(N) in memory.

A row at i <= sink + window attends to every key up to its own: it is dense. Beyond that, window and sinks do not meet.
So the result is put together from

- *head*: the first sink + window + 1 rows, causal among themselves, a small problem;
- *stream*: a band over all rows, and all rows against all sinks without a mask, merged by their log-sum-exp. Neither
  call needs a slice of the queries, which FIA would want copied;
- *final*: the last rows against all keys, right-down causal.

With more keys than rows the rows are the last ones: band and final rows count from the bottom right by themselves, and
what is said of rows holds for their positions.

With a fixed length each part is a slice. With a dynamic one every slice has a fixed number of rows, taken by an index
that is clamped to the length, and an index picks each row of the result from the parts. So no call gets an empty tensor
at any length, and no result depends on what the operators do for rows that do not exist. A graph that nothing guards
(torchair's ``.air``) may even get one row, for which FIA is another kernel: a spare row at the end, which no row
attends to, makes it two.

Padding is read by every call from extra columns: queries have a constant there, keys of padding a large negative
number and all others 0, which adds a bias to the scores that makes the weight of a padded key 0 in float32. The
operator's own lengths per sequence are numbers that the host must know, and cannot express holes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile.lowering import rows
from tmx_compile.lowering.ascend.calls import Calls, Part
from tmx_compile.lowering.base import arange, example, first_position, length
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry

ALIGNMENT = 16
_KEY_BIAS = -(2.0**15)  # in float16's range
_LEAST_BIAS = 3e4  # on a padded score, at most twice this: e^-30000 is 0, and the score is in float16's range


@dataclass(frozen=True)
class Sections:
    """How the rows of a geometry without a reach are put together from head, stream and final.

    ``dense_up_to`` is None for a graph whose guards are checked. One that serves every length from 1 on attends a
    prompt of at most so many rows densely.
    """

    geometry: Geometry
    dense_up_to: int | None = None

    @property
    def sink(self) -> int:
        """The number of sinks."""
        return self.geometry.sink

    @property
    def last(self) -> int:
        """The number of rows of the final part."""
        return self.geometry.last

    @property
    def head(self) -> int:
        """The number of rows of the head."""
        return max(self.first_sparse, self.dense_up_to or 0)

    @property
    def first_sparse(self) -> int:
        """The first row with a key that it does not attend to. Without sinks, the band alone has all rows."""
        return self.sink + self.geometry.window + 1 if self.sink else 0

    def within(self, q_len: int, kv_len: int, *, padded: bool) -> Sections:
        """The same mask for known lengths, with no count beyond them; all dense where it is, or short."""
        geometry = self.geometry.bounded(kv_len, q_len)
        sink, window, last = geometry.counts
        dense = self.geometry.is_dense or q_len <= (self.dense_up_to or 0) or window + 1 >= kv_len
        # Rows behind the last valid key are no last rows, and see less than all keys.
        if dense or (not padded and (last == q_len or window + 1 + sink + last >= kv_len)):
            geometry = self.geometry.as_dense()
        return Sections(geometry)


def padded_dim(head_dim: int, value_dim: int, masked: bool) -> int:
    """The head dim that FIA gets: one for key and value, aligned, with a column to spare for the key mask."""
    return -(-(max(head_dim, value_dim) + (1 if masked else 0)) // ALIGNMENT) * ALIGNMENT


def query_bias(columns: int, scale: float) -> float:
    """What stands in a query's extra columns, so that a padded key's score falls by 3e4 to 6e4; a power of two."""
    return 2.0 ** math.ceil(math.log2(_LEAST_BIAS / (columns * -_KEY_BIAS * scale)))


def attention(q: Any, k: Any, v: Any, key_mask: Any, sections: Sections, calls: Calls) -> Part:
    """(B, H, Sq, Dv) from (B, H, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv) and (B, Skv) bool or None."""
    n, kv_len, value_dim = length(q, 2), length(k, 2), length(v, 3)
    fixed = isinstance(n, int) and isinstance(kv_len, int)
    sections = sections.within(n, kv_len, padded=key_mask is not None) if fixed else sections
    spare = 0 if fixed or sections.dense_up_to is None else 1
    dim = padded_dim(length(q, 3), value_dim, key_mask is not None)
    if key_mask is None:
        q, k, v = (_wider(x, dim, spare).contiguous() for x in (q, k, v))
        if sections.geometry.is_dense:
            done = calls.final_rows(q, k, v)
            done = done.map(lambda x: x[:, :, :n]) if spare else done
        else:
            done = _fixed(q, k, v, sections, calls) if fixed else _dynamic(q, k, v, n, spare, sections, calls)
    else:
        q, k, v, key_mask = _biased(q, k, v, key_mask, dim, spare, calls.scale)
        done = _padded(q.contiguous(), k.contiguous(), v.contiguous(), key_mask, n, sections, calls)
    return done if dim == value_dim else Part(done.out[..., :value_dim], done.lse)


def _wider(x: Any, dim: int, spare: int, value: float = 0.0) -> Any:
    own = length(x, 3)
    return F.pad(x, (0, dim - own, 0, spare), value=value) if dim > own or spare else x


def _biased(q: Any, k: Any, v: Any, key_mask: Any, dim: int, spare: int, scale: float) -> tuple[Any, Any, Any, Any]:
    columns = dim - length(q, 3)
    batch, kv_heads = length(k, 0), length(k, 1)
    if spare:
        # torchair pads no truth values.
        key_mask = torch.cat([key_mask, (arange(k, spare) < 0)[None, :].expand(batch, spare)], 1)
    bias = torch.where(key_mask, 0.0, _KEY_BIAS).to(example(k).dtype)[:, None, :, None]
    biases = bias.expand(batch, kv_heads, length(key_mask, 1), columns)
    keys = torch.cat([_wider(k, length(k, 3), spare), biases], 3)
    return _wider(q, dim, spare, query_bias(columns, scale)), keys, _wider(v, dim, spare), key_mask


def _stream(q: Any, k: Any, v: Any, sinks: tuple[Any, Any] | None, window: int, calls: Calls) -> Part:
    """Window and sinks, merged; right for rows whose window does not reach the sinks."""
    near = calls.band(q, k, v, window, sinks is not None)
    return near if sinks is None else calls.merge([near, calls.all_keys(q, *sinks)])


def _fixed(q: Any, k: Any, v: Any, sections: Sections, calls: Calls) -> Part:
    n, before, last = length(q, 2), length(k, 2) - length(q, 2), sections.last
    head = max(sections.head - before, 0)
    sinks = (k[:, :, : sections.sink].contiguous(), v[:, :, : sections.sink].contiguous())
    stream = _stream(q, k, v, sinks if sections.sink else None, sections.geometry.window, calls)
    parts = [stream.map(lambda x: x[:, :, head : n - last])]
    if head:
        own = (x[:, :, : before + head].contiguous() for x in (k, v))
        parts.insert(0, calls.final_rows(q[:, :, :head].contiguous(), *own))
    if last:
        parts.append(calls.final_rows(q[:, :, n - last :].contiguous(), k, v))
    return Part.cat(parts)


def _dynamic(q: Any, k: Any, v: Any, n: Any, spare: int, sections: Sections, calls: Calls) -> Part:
    """``q``, ``k`` and ``v`` may have a spare row more than the n rows of the result."""
    sink, last, head = sections.sink, sections.last, sections.head
    before = first_position(q, k)
    same = isinstance(before, int)
    row_end, key_end = (arange(x, 1) + (length(x, 2) - 1) for x in (q, k))

    # Where an index is outside, another row is taken, and is not used.
    sinks = None
    if sink:
        first = arange(q, sink).minimum(key_end)
        sinks = (k.index_select(2, first), v.index_select(2, first))
    parts = [_stream(q, k, v, sinks, sections.geometry.window, calls)]
    if head:
        place = arange(q, head)
        keys = place.minimum(key_end)
        own = keys if same else (place - before).clamp(min=0).minimum(row_end)
        parts.insert(0, calls.causal(*(x.index_select(2, i) for x, i in ((q, own), (k, keys), (v, keys)))))
    if last:
        # A spare row is the last of them, and none of the result.
        final = (arange(q, last + spare) + (n - last)).clamp(min=0)
        parts.append(calls.final_rows(q.index_select(2, final), k, v))
    if len(parts) == 1 and not spare:
        return parts[0]
    row, whole = arange(q, n), arange(q, 1) + n
    found = _place(row, row if same else row + before, row + last >= whole, last + spare, whole, sections)
    return Part.cat(parts).map(lambda x: x.index_select(2, found))


def _place(row: Any, place: Any, is_last: Any, skipped: Any, n: Any, sections: Sections) -> Any:
    """Where each row of the result is among the parts: head, stream, final.

    Args:
        row: index in the stream.
        place: the row's position in its sequence, counted from its first valid key.
        is_last: whether it is one of the last rows of its sequence.
        skipped: how far behind its place in the stream a last row's place in the final part is.
        n: the number of rows, as a tensor.
        sections: as given.
    """
    found = row + sections.head
    if sections.last:
        found = torch.where(is_last, found + skipped, found)
    if sections.first_sparse:
        found = torch.where(place < sections.first_sparse, place, found)
    if sections.dense_up_to:
        found = torch.where(n <= sections.dense_up_to, place, found)
    return found


def _padded(q: Any, k: Any, v: Any, key_mask: Any, n: Any, sections: Sections, calls: Calls) -> Part:
    """All operands may have a spare row, which is padding, more than the n rows of the result."""
    q_len, kv_len, before = length(q, 2), length(k, 2), first_position(q, k)
    where = _extent(key_mask)
    dense_alive = rows.alive(q, k, key_mask, where, sections.geometry.as_dense())
    if sections.geometry.is_dense:
        done, lives = calls.final_rows(q, k, v), dense_alive[:, None, :, None]
        lse = None if done.lse is None else torch.where(lives, done.lse, float("-inf"))
        return Part(torch.where(lives, done.out, 0.0), lse).map(lambda x: x[:, :, :n])
    sink, last, head = sections.sink, sections.last, sections.head
    row = arange(q, n)[None, :]
    position = row + before

    def at(x: Any, index: Any) -> Any:
        """Rows of each sequence; for an index outside, another row, which is not used."""
        return _rows(x, index.clamp(min=0).minimum(arange(x, 1) + (length(x, 2) - 1)))

    first_sinks, first = (where.start + arange(q, count)[None, :] for count in (sink, head))
    sinks = (at(k, first_sinks), at(v, first_sinks)) if sink else None
    parts = [_stream(q, k, v, sinks, sections.geometry.window, calls)]
    if head:
        parts.insert(0, calls.causal(at(q, first - before), at(k, first), at(v, first)))
    if last:
        final = where.end - last + arange(q, last)[None, :]
        hidden = arange(q, kv_len)[None, None, :] > final[:, :, None]
        parts.append(calls.masked(at(q, final - before), k, v, hidden[:, None]))
    # From its place in the stream to that in the final rows, whose first stands at end - last.
    skipped = arange(q, 1) + (q_len + before + last) - where.end
    whole = arange(q, 1) + n
    found = _place(row, position - where.start, formula.is_last(position, where.end, last), skipped, whole, sections)
    alive = rows.alive(q, k, key_mask, where, sections.geometry)
    if sections.dense_up_to:
        alive = torch.where(whole <= sections.dense_up_to, dense_alive, alive)
    # Rows that attend to nothing come from a row of zeros behind all parts.
    found = torch.where(alive[:, :n], found, arange(q, 1) + (q_len + head + last))
    zero = (arange(q, 1) * 0).to(example(q).dtype)[None, None, :, None]
    nothing = Part(zero.expand(length(q, 0), length(q, 1), 1, length(q, 3)), None)
    if calls.with_lse:
        nothing = Part(nothing.out, nothing.out[..., :1].float() + float("-inf"))
    return Part.cat([*parts, nothing]).map(lambda x: _rows(x, found))


def _extent(key_mask: Any) -> rows.Extent:
    """:func:`tmx_compile.lowering.rows.extent` by counting: torchair converts no minimum over a dimension."""
    before = key_mask.to(torch.int64).cumsum(1)
    # Places up to the first valid key have none at or before them; those up to the last still have one to come.
    start = (before == 0).to(torch.int64).sum(1, keepdim=True)
    end = (before - key_mask.to(torch.int64) < before[:, -1:]).to(torch.int64).sum(1, keepdim=True)
    return rows.Extent(start.minimum(end), end)


def _rows(x: Any, index: Any) -> Any:
    """Rows of each sequence, (B, h, m, D), by an index (B, m). One gather of whole rows, not of single elements."""
    batch, heads, n, dim = (length(x, d) for d in range(4))
    first = (arange(x, batch)[:, None] * heads + arange(x, heads)[None, :]) * n
    flat = (first[:, :, None] + index[:, None, :]).reshape(-1)
    return x.reshape(-1, dim).index_select(0, flat).reshape(batch, heads, length(index, 1), dim)
