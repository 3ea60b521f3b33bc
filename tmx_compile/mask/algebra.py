"""The mask algebra: which keys a row may attend to, as a small value.

A mask is a rule about a row's *position* and a *key*, free of any length; a :class:`Grid` supplies the
lengths. Together they can be read in several ways: one pair at a time (:func:`attends`), as a tensor
(:func:`to_dense`), as intervals of keys (``intervals.py``), as blocks (``blocks.py``). All readings agree
with :func:`holds`, the one place that says what each rule means.

>>> mask = triangle(sink=1, window=1, last=1)
>>> to_dense(mask, Grid(q_len=5, kv_len=5)).int()
tensor([[1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 1, 1, 1, 1]], dtype=torch.int32)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from tmx_compile.mask import formula


class Mask:
    """A rule; combine rules with ``&``, ``|`` and ``~``. Masks compare and hash by how they are written.

    Masks that are written differently may still attend to the same pairs: ``intervals.equal`` decides that.
    """

    def __and__(self, other: Mask) -> And:
        if not isinstance(other, Mask):
            return NotImplemented
        return And(self, other)

    def __or__(self, other: Mask) -> Or:
        if not isinstance(other, Mask):
            return NotImplemented
        return Or(self, other)

    def __invert__(self) -> Not:
        return Not(self)

    def __bool__(self) -> NoReturn:
        # Without this, ``a and b`` would quietly return b.
        raise TypeError(
            f"{self!r} has no truth value: combine masks with & | ~ (not and, or, not), "
            "and read one with attends(mask, grid, row, key)"
        )


@dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the row's position: ``key <= position``."""


@dataclass(frozen=True)
class Sink(Mask):
    """The first ``n`` valid keys: ``start <= key < start + n``."""

    n: int

    def __post_init__(self) -> None:
        check_int("Sink.n", self.n, least=0)


@dataclass(frozen=True)
class Window(Mask):
    """Keys at most ``n`` behind: ``position - key <= n``, the row's own key and ``n`` more once causal.

    Code that writes ``position - key < n_local`` means ``Window(n_local - 1)``.
    """

    n: int

    def __post_init__(self) -> None:
        check_int("Window.n", self.n, least=0)


@dataclass(frozen=True)
class LastRows(Mask):
    """Every key, for the last ``n`` valid rows: ``position >= end - n``."""

    n: int

    def __post_init__(self) -> None:
        check_int("LastRows.n", self.n, least=0)


@dataclass(frozen=True)
class Padding(Mask):
    """Pairs without padding: ``start <= key < end`` and ``start <= position < end``."""


@dataclass(frozen=True)
class And(Mask):
    """Pairs that both masks attend to."""

    left: Mask
    right: Mask


@dataclass(frozen=True)
class Or(Mask):
    """Pairs that at least one of the masks attends to."""

    left: Mask
    right: Mask


@dataclass(frozen=True)
class Not(Mask):
    """Pairs that the mask does not attend to."""

    inner: Mask


@dataclass(frozen=True, init=False)
class Grid:
    """The extent of one attention problem, in tokens.

    Rows are numbered ``0 .. q_len - 1`` and keys ``0 .. kv_len - 1``. The last row stands at the last key:
    row ``i`` has position ``kv_len - q_len + i``, and earlier positions are those of tokens already in a
    cache. Valid (unpadded) keys and positions are those in ``[start, end)``, which may be empty; ``end``
    defaults to ``kv_len``.

    Raises:
        ValueError: unless ``1 <= q_len <= kv_len`` and ``0 <= start <= end <= kv_len``, all of them ints.
    """

    q_len: int
    kv_len: int
    start: int
    end: int

    def __init__(self, q_len: int, kv_len: int, start: int = 0, end: int | None = None) -> None:
        end = kv_len if end is None else end
        for name, value, least in (
            ("q_len", q_len, 1),
            ("kv_len", kv_len, 1),
            ("start", start, 0),
            ("end", end, 0),
        ):
            check_int(name, value, least)
            object.__setattr__(self, name, value)
        if q_len > kv_len:
            raise ValueError(f"q_len must not exceed kv_len, got q_len={q_len} and kv_len={kv_len}")
        if not start <= end <= kv_len:
            raise ValueError(f"start <= end <= kv_len must hold, got start={start}, end={end}, kv_len={kv_len}")

    @property
    def offset(self) -> int:
        """The position of row 0."""
        return self.kv_len - self.q_len


def triangle(sink: int, window: int, last: int) -> Mask:
    """The TriangleMix mask: streaming section plus last section (arXiv 2507.21526, which counts from 1).

    Args:
        sink: number of sink keys.
        window: how far behind a row may look; the window holds ``window + 1`` keys, the row's own among them.
        last: number of last rows, which stay dense.
    """
    return Padding() & Causal() & (Sink(sink) | Window(window) | LastRows(last))


def dense_section() -> Mask:
    """The causal triangle: the sum of the three disjoint sections below."""
    return Padding() & Causal()


def streaming_section(sink: int, window: int) -> Mask:
    """Sinks and the sliding window, on every row; the paper's ``j <= si or i - j <= sl`` with i, j from 1."""
    return Padding() & Causal() & (Sink(sink) | Window(window))


def last_section(sink: int, window: int, last: int) -> Mask:
    """What the last rows add to the streaming section; the paper's ``N - i < last`` with i from 1."""
    return Padding() & Causal() & LastRows(last) & ~(Sink(sink) | Window(window))


def middle_section(sink: int, window: int, last: int) -> Mask:
    """The rest of the causal triangle: what TriangleMix skips."""
    return Padding() & Causal() & ~LastRows(last) & ~(Sink(sink) | Window(window))


def holds(mask: Mask, grid: Grid, position: Any, key: Any) -> Any:
    """The definition of every mask: whether a row at absolute ``position`` attends to ``key``.

    Works on ints, giving a bool, and on integer tensors that broadcast together, giving a bool tensor (of
    size 1 in a dimension that the mask ignores). The pair may lie outside the grid; :func:`attends` checks.

    Raises:
        TypeError: if ``mask``, or something inside it, is not one of this module's masks.
    """
    match mask:
        case Causal():
            return formula.causal(position, key)
        case Sink(n):
            return (grid.start <= key) & formula.in_sinks(key, grid.start, n)
        case Window(n):
            return formula.in_window(position, key, n)
        case LastRows(n):
            return position >= grid.end - n
        case Padding():
            return (grid.start <= key) & (key < grid.end) & (grid.start <= position) & (position < grid.end)
        case And(left, right):
            return holds(left, grid, position, key) & holds(right, grid, position, key)
        case Or(left, right):
            return holds(left, grid, position, key) | holds(right, grid, position, key)
        case Not(inner):
            return holds(inner, grid, position, key) ^ True  # unlike ~, also right for a Python bool
        case _:
            raise TypeError(f"not a mask: {mask!r}")


def attends(mask: Mask, grid: Grid, row: int, key: int) -> bool:
    """Whether ``row`` (``0 .. q_len - 1``) attends to ``key`` (``0 .. kv_len - 1``).

    Raises:
        ValueError: if the pair lies outside the grid.
    """
    if not (0 <= row < grid.q_len and 0 <= key < grid.kv_len):
        raise ValueError(f"row {row}, key {key} is outside the grid of {grid.q_len} rows by {grid.kv_len} keys")
    return bool(holds(mask, grid, grid.offset + row, key))


def to_dense(mask: Mask, grid: Grid, device: torch.device | str = "cpu") -> torch.Tensor:
    """The mask as a bool tensor of shape (q_len, kv_len), True where attended; for small problems."""
    position = torch.arange(grid.offset, grid.kv_len, device=device)[:, None]
    key = torch.arange(grid.kv_len, device=device)[None, :]
    attended: torch.Tensor = holds(mask, grid, position, key)
    return attended.expand(grid.q_len, grid.kv_len).contiguous()


def check_int(name: str, value: int, least: int) -> None:
    """Raise a ``ValueError`` that names the value unless it is an int (no bool) of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
