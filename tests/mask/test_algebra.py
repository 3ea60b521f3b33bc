"""Masks against an oracle that is written apart from the package, one pair at a time."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given

from tests.support.masks import brute, geometries, grids, masks
from tmx_compile.mask import algebra as mask_module
from tmx_compile.mask.algebra import (
    And,
    Causal,
    Grid,
    LastRows,
    Mask,
    Not,
    Or,
    Sink,
    Window,
    attends,
    dense_section,
    holds,
    last_section,
    middle_section,
    streaming_section,
    to_dense,
    triangle,
)


@given(masks(), grids())
def test_all_readings_of_a_pair_agree(mask: Mask, grid: Grid) -> None:
    expected = brute(mask, grid)
    assert to_dense(mask, grid).tolist() == expected
    read = [[attends(mask, grid, row, key) for key in range(grid.kv_len)] for row in range(grid.q_len)]
    assert read == expected
    assert all(type(value) is bool for line in read for value in line)


@given(geometries, grids())
def test_the_triangle_is_what_the_sections_and_the_rule_say(geometry: dict[str, int], grid: Grid) -> None:
    sink, window, last = geometry["sink"], geometry["window"], geometry["last"]
    parts = [
        to_dense(streaming_section(sink, window), grid).int(),
        to_dense(last_section(**geometry), grid).int(),
        to_dense(middle_section(**geometry), grid).int(),
    ]
    assert torch.equal(parts[0] + parts[1], to_dense(triangle(**geometry), grid).int())
    assert torch.equal(parts[0] + parts[1] + parts[2], to_dense(dense_section(), grid).int())
    for row in range(grid.q_len):
        for key in range(grid.kv_len):
            p, valid = row + grid.offset, range(grid.start, grid.end)
            rule = key - grid.start < sink or p - key <= window or p >= grid.end - last
            assert attends(triangle(**geometry), grid, row, key) == (p in valid and key in valid and key <= p and rule)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(("sink", "window", "last"), [(0, 0, 0), (1, 0, 2), (2, 3, 1), (4, 2, 0), (0, 13, 99)])
def test_sections_follow_the_published_formulas_that_count_from_1(n: int, sink: int, window: int, last: int) -> None:
    grid = Grid(n, n)
    streaming, bottom, middle = (
        to_dense(section, grid)
        for section in (
            streaming_section(sink, window),
            last_section(sink, window, last),
            middle_section(sink, window, last),
        )
    )
    for i in range(1, n + 1):
        for j in range(1, n + 1):
            here = (i - 1, j - 1)
            assert streaming[here] == (i >= j and (j <= sink or i - j <= window))
            assert bottom[here] == (i >= j and n - i < last and j > sink and i - j > window)
            assert middle[here] == (i >= j and n - i >= last and j > sink and i - j > window)


def test_the_geometry_counts_exactly() -> None:
    rows = to_dense(triangle(sink=3, window=4, last=5), Grid(40, 40)).sum(1).tolist()
    assert rows[20] == 3 + 4 + 1
    assert [row for row in range(20, 40) if rows[row] == row + 1] == list(range(35, 40))


def test_masks_compare_and_hash_as_written() -> None:
    assert triangle(1, 2, 3) == triangle(1, 2, 3)
    assert len({triangle(1, 2, 3), triangle(1, 2, 3), triangle(1, 2, 4)}) == 2
    assert Sink(3) != Window(3)
    assert Causal() & Sink(1) == And(Causal(), Sink(1))
    assert Causal() | Sink(1) == Or(Causal(), Sink(1))
    assert ~Causal() == Not(Causal())
    assert Causal() & Sink(1) != Sink(1) & Causal()


def test_masks_refuse_python_logic_and_strangers() -> None:
    with pytest.raises(TypeError, match=r"Sink\(n=1\) has no truth value.*& \| ~"):
        bool(Sink(1))
    with pytest.raises(TypeError, match="truth value"):
        Causal() and Sink(1)
    with pytest.raises(TypeError, match="unsupported operand"):
        Causal() & 1  # type: ignore[operator]
    with pytest.raises(TypeError, match="unsupported operand"):
        Causal() | True  # type: ignore[operator]
    with pytest.raises(TypeError, match="not a mask: 3"):
        holds(Not(3), Grid(1, 1), 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Sink, Window, LastRows])
@pytest.mark.parametrize("n", [-1, 1.0, True, "3", None])
def test_counts_are_checked(kind: type[Mask], n: object) -> None:
    with pytest.raises(ValueError) as caught:
        kind(n)  # type: ignore[call-arg]
    assert f"{kind.__name__}.n must be an int of at least 0, got {n!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "q_len must be an int of at least 1, got 0"),
        ((4, 0), "kv_len must be an int of at least 1, got 0"),
        ((4.0, 4), "q_len must be an int of at least 1, got 4.0"),
        ((4, 4, -1), "start must be an int of at least 0, got -1"),
        ((4, 4, 0, True), "end must be an int of at least 0, got True"),
        ((5, 4), "q_len must not exceed kv_len, got q_len=5 and kv_len=4"),
        ((4, 4, 3, 2), "start=3, end=2, kv_len=4"),
        ((4, 4, 0, 5), "start=0, end=5, kv_len=4"),
    ],
)
def test_grids_are_checked(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Grid(*arguments)
    assert message in str(caught.value)


def test_grids_compare_by_extent() -> None:
    assert Grid(3, 5) == Grid(3, 5, 0, 5)
    assert hash(Grid(3, 5)) == hash(Grid(3, 5, 0, 5))
    assert Grid(3, 5) != Grid(3, 5, 1)
    assert Grid(3, 5).offset == 2


@pytest.mark.parametrize(("row", "key"), [(-1, 0), (3, 0), (0, -1), (0, 5)])
def test_pairs_outside_the_grid_are_refused(row: int, key: int) -> None:
    with pytest.raises(ValueError, match=f"row {row}, key {key} is outside the grid of 3 rows by 5 keys"):
        attends(dense_section(), Grid(3, 5), row, key)


@pytest.mark.parametrize("mask", [dense_section(), LastRows(2), Sink(1), Causal()])
def test_dense_reading_is_a_plain_bool_tensor_on_the_device_asked_for(mask: Mask) -> None:
    tensor = to_dense(mask, Grid(3, 5), device="meta")
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((3, 5), torch.bool, "meta")
    assert to_dense(mask, Grid(3, 5)).is_contiguous()


def test_docstring_examples() -> None:
    assert doctest.testmod(mask_module).failed == 0
