"""The interval reading against the pair-by-pair oracle."""

from __future__ import annotations

import doctest
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.masks import brute, geometries, grids, masks
from tmx_compile.mask import intervals as intervals_module
from tmx_compile.mask.algebra import (
    Causal,
    Grid,
    LastRows,
    Mask,
    Not,
    Padding,
    Sink,
    Window,
    dense_section,
    last_section,
    middle_section,
    streaming_section,
    triangle,
)
from tmx_compile.mask.intervals import Affine, RowIntervals, Segment, equal, pair_count, row_intervals, subset

MILLION = 1_048_576


def runs_of(line: list[bool]) -> tuple[tuple[int, int], ...]:
    runs, start = [], None
    for key, attended in enumerate([*line, False]):
        if attended and start is None:
            start = key
        elif not attended and start is not None:
            runs.append((start, key))
            start = None
    return tuple(runs)


def longest_segments(expected: list[list[bool]]) -> list[int]:
    """First rows of the segments, found greedily on concrete rows: ends move by one constant 0 or 1 each."""
    rows = [[end for run in runs_of(line) for end in run] for line in expected]
    firsts = [0]
    for row in range(1, len(rows)):
        steps = {
            tuple(below - above for above, below in zip(rows[r - 1], rows[r], strict=False))
            for r in range(firsts[-1] + 1, row + 1)
        }
        same_shape = len(rows[row]) == len(rows[firsts[-1]])
        if not (same_shape and len(steps) == 1 and set(next(iter(steps))) <= {0, 1}):
            firsts.append(row)
    return firsts


@given(masks(max_leaves=8), grids())
def test_rows_and_pair_count_are_exact(mask: Mask, grid: Grid) -> None:
    expected = brute(mask, grid)
    reading = row_intervals(mask, grid)
    assert [reading.row(i) for i in range(grid.q_len)] == [runs_of(line) for line in expected]
    assert reading.pair_count() == pair_count(mask, grid) == sum(map(sum, expected))


@given(masks(max_leaves=8), grids())
def test_segments_partition_the_rows_and_are_as_few_as_can_be(mask: Mask, grid: Grid) -> None:
    segments = row_intervals(mask, grid).segments
    assert segments[0].start == 0
    assert segments[-1].stop == grid.q_len
    assert all(above.stop == below.start for above, below in pairwise(segments))
    assert all(segment.start < segment.stop for segment in segments)
    assert [segment.start for segment in segments] == longest_segments(brute(mask, grid))


# On tiny grids many masks coincide, so that both answers are common.
@given(masks(), masks(), grids(max_len=4))
def test_equal_and_subset_decide_sets_of_pairs(a: Mask, b: Mask, grid: Grid) -> None:
    in_a, in_b = ({(i, j) for i, line in enumerate(brute(x, grid)) for j, on in enumerate(line) if on} for x in (a, b))
    assert equal(a, b, grid) == (in_a == in_b)
    assert subset(a, b, grid) == (in_a <= in_b)
    if in_a == in_b:
        assert hash(row_intervals(a, grid)) == hash(row_intervals(b, grid))


@given(masks(4), masks(4), grids())
def test_equal_sees_through_the_writing(a: Mask, b: Mask, grid: Grid) -> None:
    assert equal(~(a & b), ~a | ~b, grid)
    assert equal(a, (a & b) | (a & ~b), grid)
    assert equal(~~a, a, grid)
    assert not equal(a, Not(a), grid)
    assert subset(a & b, a, grid)
    assert subset(a, a | b, grid)
    assert pair_count(a | b, grid) == pair_count(a, grid) + pair_count(b, grid) - pair_count(a & b, grid)


@given(geometries, grids())
def test_sections_partition_the_causal_triangle(geometry: dict[str, int], grid: Grid) -> None:
    streaming = streaming_section(geometry["sink"], geometry["window"])
    last, middle = last_section(**geometry), middle_section(**geometry)
    assert equal(streaming | last, triangle(**geometry), grid)
    assert equal(streaming | last | middle, dense_section(), grid)
    counts = [pair_count(section, grid) for section in (streaming, last, middle)]
    assert sum(counts) == pair_count(dense_section(), grid)


@pytest.mark.parametrize("n", [1, 2, 31, 64])
@pytest.mark.parametrize("count", [0, 1, 64, 10_000])
def test_counts_beyond_the_length_or_zero(n: int, count: int) -> None:
    grid = Grid(n, n)
    for mask in (triangle(count, 0, 0), triangle(0, count, 0), triangle(0, 0, count)):
        assert equal(mask, dense_section(), grid) == (count >= n - 1)
    assert pair_count(triangle(0, 0, 0), grid) == n


def test_a_row_on_two_lines_belongs_to_the_segment_above() -> None:
    # One key more from row 1 on: rows 0 and 1 lie on a diagonal, and rows 2 and 3 remain.
    step = (Sink(2) & ~LastRows(3)) | (Sink(3) & LastRows(3))
    rewritten = Sink(2) | (Sink(3) & LastRows(2)) | (Sink(3) & LastRows(3) & ~LastRows(2))
    assert str(row_intervals(step, Grid(4, 4))) == "rows 0 to 1: [0, row + 2)\nrows 2 to 3: [0, 3)"
    assert equal(step, rewritten, Grid(4, 4))


def test_a_step_of_several_keys_is_no_diagonal() -> None:
    step = (Sink(2) & ~LastRows(3)) | (Sink(4) & LastRows(3))
    assert str(row_intervals(step, Grid(4, 4))) == "rows 0 to 0: [0, 2)\nrows 1 to 3: [0, 4)"


def test_degenerate_grids() -> None:
    assert row_intervals(triangle(2, 1, 0), Grid(1, 9)).segments == (
        Segment(0, 1, ((Affine(0, 0), Affine(2, 0)), (Affine(7, 0), Affine(9, 0)))),
    )
    assert row_intervals(triangle(2, 1, 3), Grid(5, 9, 4, 4)) == row_intervals(Sink(0), Grid(5, 9, 4, 4))
    assert row_intervals(Sink(0), Grid(5, 9)).segments == (Segment(0, 5, ()),)
    assert pair_count(~Sink(0), Grid(5, 9)) == 45


def test_a_reading_prints_itself() -> None:
    assert str(row_intervals(Padding() & Causal() & Window(0), Grid(4, 6, 3, 5))) == (
        "rows 0 to 0: none\nrows 1 to 2: [row + 2, row + 3)\nrows 3 to 3: none"
    )


@pytest.mark.parametrize("row", [-1, 5])
def test_rows_outside_the_grid_are_refused(row: int) -> None:
    with pytest.raises(ValueError, match=f"row {row} is outside the grid of 5 rows"):
        row_intervals(dense_section(), Grid(5, 9)).row(row)


def test_strangers_are_refused() -> None:
    with pytest.raises(TypeError, match="not a mask: 3"):
        row_intervals(Not(3), Grid(1, 1))  # type: ignore[arg-type]


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_a_million_tokens_are_counted_in_closed_form(sink: int, window: int, last: int) -> None:
    def growing(rows: int) -> int:
        return rows * (rows + 1) // 2

    width = sink + window + 1  # every row before the last ones sees min(row + 1, width) keys
    expected = growing(width) + width * (MILLION - last - width) + growing(MILLION) - growing(MILLION - last)
    reading = row_intervals(triangle(sink, window, last), Grid(MILLION, MILLION))
    assert reading.pair_count() == expected
    assert len(reading.segments) <= 3


def test_size_depends_on_the_mask_and_not_on_the_length() -> None:
    mask = (triangle(8, 512, 128) | (Window(3000) & ~Window(2000))) & ~(Sink(5000) & LastRows(900))

    def read(n: int) -> RowIntervals:
        return row_intervals(mask, Grid(n // 2, n, 100, n - 100))

    tracemalloc.start()
    reading = read(MILLION)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(reading.segments) == len(read(100 * MILLION).segments) == len(read(20_000).segments) < 12
    assert reading.row(300_000) == ((100, 108), (821_288, 822_288), (823_776, 824_289))


def test_docstring_examples() -> None:
    assert doctest.testmod(intervals_module).failed == 0
