"""The triangle mask as a formula, in one place (arXiv 2507.21526, which counts from 1).

Every function uses Python's operators alone. So it takes ints, tensors that broadcast against each other, and proxies
of a graph, also inside a FlexAttention ``mask_mod``; the result is of the same kind. ``row`` and ``key`` are absolute
positions: the last row stands at the last key. ``start`` and ``end`` bound a sequence's valid keys. The GPU
kernels cannot call Python functions: ``seen`` in ``lowering/triton/walk.py`` is the formula for them.
"""

from __future__ import annotations

from typing import Any

from tmx_compile.mask.geometry import ALL_ROWS, Geometry


def causal(row: Any, key: Any) -> Any:
    """Whether a key is not behind its row."""
    return key <= row


def in_sinks(key: Any, start: Any, sink: int) -> Any:
    """Whether a key is one of the first ``sink`` of its sequence, or before them."""
    return key < start + sink


def in_window(row: Any, key: Any, window: int) -> Any:
    """Whether a key is at most ``window`` behind its row, or after it."""
    return row - key <= window


def is_last(row: Any, end: Any, last: int) -> Any:
    """Whether a row is a last row: one behind the last valid key, most often padding, is none, unless all rows are."""
    final = row >= end - last
    return final if last >= ALL_ROWS else final & (row < end)


def streamed(row: Any, key: Any, start: Any, geometry: Geometry) -> Any:
    """Whether a key is in the sinks or the window of its row."""
    return in_sinks(key, start, geometry.sink) | in_window(row, key, geometry.window)


def within(allowed: Any, row: Any, key: Any, reach: int | None) -> Any:
    """``allowed`` limited to the keys that a layer's own window lets a row see."""
    return allowed if reach is None else allowed & in_window(row, key, reach)


def attended(row: Any, key: Any, start: Any, end: Any, geometry: Geometry) -> Any:
    """Whether a row attends to a key, where no key between ``start`` and ``end`` is padding."""
    kept = streamed(row, key, start, geometry) | is_last(row, end, geometry.last)
    kept = within(kept, row, key, geometry.reach)
    return kept & causal(row, key) & (key >= start) & (key < end)
