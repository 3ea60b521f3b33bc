"""A mask as intervals of keys: exact, and as small for a million tokens as for ten.

On the (row, key) plane every rule of the mask algebra is bounded by straight lines: fixed rows, fixed keys
and diagonals. Cut the rows at the fixed ones and wherever a fixed key meets a diagonal. Between two cuts
the lines keep their order, each strip between neighbouring lines is attended to throughout or not at all,
and asking about one pair of a strip settles which. That argument covers whatever ``&``, ``|`` and ``~``
build, so no connective needs code of its own, and the number of cuts depends on the mask alone, never on
the lengths.

>>> from tmx_compile.mask.algebra import triangle
>>> reading = row_intervals(triangle(sink=4, window=32, last=64), Grid(q_len=1000, kv_len=1000))
>>> print(reading)
rows 0 to 36: [0, row + 1)
rows 37 to 935: [0, 4) [row - 32, row + 1)
rows 936 to 999: [0, row + 1)
>>> reading.row(500)
((0, 4), (468, 501))
>>> reading.pair_count()
95950
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from tmx_compile.mask.algebra import (
    And,
    Causal,
    Grid,
    LastRows,
    Mask,
    Not,
    Or,
    Padding,
    Sink,
    Window,
    attends,
    dense_section,
    triangle,
)
from tmx_compile.mask.geometry import Geometry


@dataclass(frozen=True)
class Affine:
    """The key ``base + slope * row``; ``slope`` is 0 (a fixed key) or 1 (a diagonal)."""

    base: int
    slope: int

    def at(self, row: int) -> int:
        """The key on one row."""
        return self.base + self.slope * row

    def __str__(self) -> str:
        if self.slope == 0:
            return str(self.base)
        return f"row {'-' if self.base < 0 else '+'} {abs(self.base)}" if self.base else "row"


@dataclass(frozen=True)
class Segment:
    """Rows ``[start, stop)``, which share the same intervals ``[lo, hi)`` of attended keys.

    On each of these rows the intervals are non-empty and ascending, with at least one key between neighbours.
    """

    start: int
    stop: int
    intervals: tuple[tuple[Affine, Affine], ...]

    def __str__(self) -> str:
        keys = " ".join(f"[{lo}, {hi})" for lo, hi in self.intervals)
        return f"rows {self.start} to {self.stop - 1}: {keys or 'none'}"


@dataclass(frozen=True)
class RowIntervals:
    """A mask on a grid as segments, which partition rows ``0 .. q_len - 1`` in ascending order.

    The form is canonical: two masks attend to the same pairs of a grid if and only if these values are equal.
    """

    grid: Grid
    segments: tuple[Segment, ...]

    def row(self, index: int) -> tuple[tuple[int, int], ...]:
        """The attended keys of one row, as half-open intervals in ascending order with gaps between them.

        Raises:
            ValueError: if there is no such row.
        """
        if not 0 <= index < self.grid.q_len:
            raise ValueError(f"row {index} is outside the grid of {self.grid.q_len} rows")
        segment = self.segments[bisect_right(self.segments, index, key=lambda s: s.start) - 1]
        return _on_row(segment.intervals, index)

    def pair_count(self) -> int:
        """The exact number of attended (row, key) pairs, summed in closed form."""
        total = 0
        for segment in self.segments:
            rows = segment.stop - segment.start
            sum_of_rows = rows * (segment.start + segment.stop - 1) // 2
            for lo, hi in segment.intervals:
                total += (hi.base - lo.base) * rows + (hi.slope - lo.slope) * sum_of_rows
        return total

    def __str__(self) -> str:
        return "\n".join(map(str, self.segments))


def row_intervals(mask: Mask, grid: Grid) -> RowIntervals:
    """Read a mask as intervals of keys. The time and the number of segments do not depend on the lengths."""
    lines, cuts = {Affine(0, 0), Affine(grid.kv_len, 0)}, {0, grid.q_len}
    _collect(mask, grid, lines, cuts)
    for diagonal in lines:
        for fixed in lines:
            if diagonal.slope > fixed.slope:
                # They meet on one row, a segment of its own: the order differs before, on and after it.
                crossing = fixed.base - diagonal.base
                cuts |= {crossing, crossing + 1}
    rows = sorted(cut for cut in cuts if 0 <= cut <= grid.q_len)
    pieces = [Segment(start, stop, _read(mask, grid, lines, start)) for start, stop in pairwise(rows)]
    return RowIntervals(grid, tuple(_canonical(pieces)))


def pair_count(mask: Mask, grid: Grid) -> int:
    """The exact number of (row, key) pairs that the mask attends to."""
    return row_intervals(mask, grid).pair_count()


def pair_counts(geometry: Geometry, q_len: int, kv_len: int) -> tuple[int, int]:
    """The pairs of one sequence without padding and one head that a triangle layer attends to, and the causal ones.

    Both within the layer's own reach; (0, 0) where there are no rows, or more of them than keys.
    """
    if not 0 < q_len <= kv_len:
        return 0, 0
    grid, causal, section = Grid(q_len, kv_len), dense_section(), triangle(*geometry.counts)
    if geometry.reach is not None:
        causal, section = causal & Window(geometry.reach), section & Window(geometry.reach)
    return pair_count(section, grid), pair_count(causal, grid)


def equal(a: Mask, b: Mask, grid: Grid) -> bool:
    """Whether two masks attend to the same pairs of a grid, however they are written."""
    return row_intervals(a, grid) == row_intervals(b, grid)


def subset(a: Mask, b: Mask, grid: Grid) -> bool:
    """Whether ``b`` attends to every pair of a grid that ``a`` attends to."""
    return pair_count(a & ~b, grid) == 0


def _collect(mask: Mask, grid: Grid, lines: set[Affine], cuts: set[int]) -> None:
    """Add the lines at which a mask may change along a row, and the rows from which it may change."""
    match mask:
        case Causal():
            lines.add(Affine(grid.offset + 1, 1))
        case Sink(n):
            lines |= {Affine(grid.start, 0), Affine(grid.start + n, 0)}
        case Window(n):
            lines.add(Affine(grid.offset - n, 1))
        case LastRows(n):
            cuts.add(grid.end - n - grid.offset)
        case Padding():
            lines |= {Affine(grid.start, 0), Affine(grid.end, 0)}
            cuts |= {grid.start - grid.offset, grid.end - grid.offset}
        case And(left, right) | Or(left, right):
            _collect(left, grid, lines, cuts)
            _collect(right, grid, lines, cuts)
        case Not(inner):
            _collect(inner, grid, lines, cuts)
        case _:
            raise TypeError(f"not a mask: {mask!r}")


def _read(mask: Mask, grid: Grid, lines: set[Affine], row: int) -> tuple[tuple[Affine, Affine], ...]:
    """The attended intervals of one row, written with the lines that bound them."""
    # Where several lines meet, one of them stands for all: in a segment of many rows they are the same line.
    by_key = {line.at(row): line for line in lines if 0 <= line.at(row) <= grid.kv_len}
    intervals: list[tuple[Affine, Affine]] = []
    for lo, hi in pairwise(sorted(by_key)):
        if attends(mask, grid, row, lo):
            first = by_key[lo]
            if intervals and intervals[-1][1] == first:
                first = intervals.pop()[0]
            intervals.append((first, by_key[hi]))
    return tuple(intervals)


def _canonical(pieces: list[Segment]) -> list[Segment]:
    """Rewrite segments as the one sequence in which each, beginning at row 0, is as long as it can be."""
    done: list[Segment] = []
    todo = pieces[::-1]
    while todo:
        piece = todo.pop()
        shared = _continue(done[-1], piece) if done else None
        if shared is None:
            done.append(piece)
        elif piece.stop - piece.start == 1 or shared == piece.intervals:
            done[-1] = Segment(done[-1].start, piece.stop, shared)
        else:  # different lines that meet on the first row only
            done[-1] = Segment(done[-1].start, piece.start + 1, shared)
            todo.append(Segment(piece.start + 1, piece.stop, piece.intervals))
    return [_constant(segment) if segment.stop - segment.start == 1 else segment for segment in done]


def _continue(above: Segment, below: Segment) -> tuple[tuple[Affine, Affine], ...] | None:
    """The intervals that describe all rows of one segment and the first row of the next, if there are any."""
    row = below.start
    if len(above.intervals) != len(below.intervals):
        return None
    if above.stop - above.start > 1:
        return above.intervals if _on_row(above.intervals, row) == _on_row(below.intervals, row) else None
    # A single row fixes no slope; two rows do.
    joined = []
    for (lo, hi), (next_lo, next_hi) in zip(above.intervals, below.intervals, strict=True):
        ends = []
        for end, next_end in ((lo, next_lo), (hi, next_hi)):
            slope = next_end.at(row) - end.at(row - 1)
            if slope not in (0, 1):
                return None
            ends.append(Affine(next_end.at(row) - slope * row, slope))
        joined.append((ends[0], ends[1]))
    return tuple(joined)


def _constant(segment: Segment) -> Segment:
    """A segment of one row, written without slopes."""
    fixed = ((Affine(lo, 0), Affine(hi, 0)) for lo, hi in _on_row(segment.intervals, segment.start))
    return Segment(segment.start, segment.stop, tuple(fixed))


def _on_row(intervals: tuple[tuple[Affine, Affine], ...], row: int) -> tuple[tuple[int, int], ...]:
    return tuple((lo.at(row), hi.at(row)) for lo, hi in intervals)
