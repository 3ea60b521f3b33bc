"""What both GPU kernels walk: the rows of a tile and its range of keys. Importing this module needs Triton.

Gluon's compiler takes a function of plain Triton where it works on scalars alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Walk(NamedTuple):
    """Rows at absolute positions [first, stop), keys [low, high) after ``sinks`` sinks from ``sink_low`` on.

    Of the keys a row sees those at most ``span`` behind it. The last rows of the sequence begin at ``last_low``.
    """

    last_low: Any
    span: Any
    sinks: Any
    sink_low: Any
    first: Any
    stop: Any
    low: Any
    high: Any


@triton.jit
def walk(
    is_last,
    tile,
    split,
    start,
    end,
    offset,
    kv_len,
    sink,
    window,
    last,
    reach,
    split_keys,
    ROWS: tl.constexpr,
    REACH: tl.constexpr,
):
    """The :class:`Walk` of a tile of ``ROWS`` rows: of streaming rows, or of last rows over one split of the keys.

    ``start`` and ``end`` bound the sequence's valid keys, ``offset`` is the position of row 0.
    """
    last_low = tl.maximum(tl.maximum(end - last, offset), start)
    span = kv_len
    if REACH:
        span = reach
    sinks = 0
    sink_low = start
    if is_last:
        first = last_low + tile * ROWS
        stop = tl.minimum(first + ROWS, end)
        low = tl.maximum(start, split * split_keys)
        if REACH:
            low = tl.maximum(low, first - reach)
        high = tl.minimum(stop, (split + 1) * split_keys)
    else:
        first = offset + tile * ROWS
        stop = tl.minimum(first + ROWS, kv_len)
        span = tl.minimum(span, window)
        low = tl.maximum(start, first - span)
        high = tl.minimum(stop, end)
        if REACH:
            sink_low = tl.maximum(start, first - reach)
        sinks = tl.maximum(tl.minimum(tl.minimum(start + sink, low), high) - sink_low, 0)
        # Nothing to do for a tile of last rows alone, or of rows before their sequence.
        if ((first >= last_low) & (stop <= end)) | (stop <= start):
            high = low
            sinks = 0
    return Walk(last_low, span, sinks, sink_low, first, stop, low, high)


@triton.jit
def seen(row, key, sink_end, span, reach, REACH: tl.constexpr):
    """The formula of the mask (:mod:`tmx_compile.mask.formula`) for positions that broadcast, on keys that are valid.

    ``sink_end`` is one past the last sink. A last row's ``span`` holds every key, which makes it see all before it.
    """
    allowed = (key <= row) & ((row - key <= span) | (key < sink_end))
    if REACH:
        allowed = allowed & (row - key <= reach)
    return allowed
