"""Block plans against the pair-by-pair oracle."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.masks import brute, grids, masks
from tmx_compile.mask.algebra import Causal, Grid, LastRows, Mask, Sink, Window, dense_section, triangle
from tmx_compile.mask.blocks import BlockKind, BlockPlan, Runs, block_plan
from tmx_compile.mask.intervals import pair_count

MILLION = 1_048_576
sizes = st.integers(1, 9)


def cells_of(mask: Mask, grid: Grid, q_block: int, kv_block: int) -> list[list[list[bool]]]:
    """The attended pairs of every block, by cutting up the oracle's mask."""
    pairs = brute(mask, grid)
    return [
        [
            [on for line in pairs[top : top + q_block] for on in line[left : left + kv_block]]
            for left in range(0, grid.kv_len, kv_block)
        ]
        for top in range(0, grid.q_len, q_block)
    ]


def kind_of(cells: list[bool]) -> BlockKind:
    if all(cells):
        return BlockKind.FULL
    return BlockKind.PARTIAL if any(cells) else BlockKind.SKIP


def runs_where(kinds: list[BlockKind], wanted: set[BlockKind]) -> list[tuple[int, int]]:
    inside = [kind in wanted for kind in kinds]
    edges = [i for i, (a, b) in enumerate(zip([False, *inside], [*inside, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def check_runs(runs: Runs, expected: list[list[tuple[int, int]]], num_kv_blocks: int) -> None:
    width = max(1, *map(len, expected))
    padded = [line + [(num_kv_blocks, num_kv_blocks)] * (width - len(line)) for line in expected]
    assert runs.start.dtype == runs.stop.dtype == torch.int32
    assert runs.start.tolist() == [[start for start, _ in line] for line in padded]
    assert runs.stop.tolist() == [[stop for _, stop in line] for line in padded]


@given(masks(max_leaves=8), grids(), sizes, sizes)
def test_every_reading_of_the_plan_is_exact(mask: Mask, grid: Grid, q_block: int, kv_block: int) -> None:
    cells = cells_of(mask, grid, q_block, kv_block)
    kinds = [[kind_of(block) for block in line] for line in cells]
    flat = [kind for line in kinds for kind in line]
    plan = block_plan(mask, grid, q_block, kv_block)

    assert (plan.num_q_blocks, plan.num_kv_blocks) == (len(kinds), len(kinds[0]))
    assert plan.to_dense().tolist() == kinds
    for a, line in enumerate(kinds):
        assert [plan.kind(a, b) for b in range(len(line))] == line
    assert plan.counts() == tuple(map(flat.count, BlockKind))
    assert plan.touched_pairs() == sum(len(block) for line in cells for block in line if any(block))

    for runs, wanted in (
        (plan.touched, {BlockKind.PARTIAL, BlockKind.FULL}),
        (plan.full, {BlockKind.FULL}),
        (plan.partial, {BlockKind.PARTIAL}),
    ):
        check_runs(runs, [runs_where(line, wanted) for line in kinds], plan.num_kv_blocks)


@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(2, 2), Grid(31, 31), Grid(1, 31), Grid(7, 31), Grid(9, 9, 5, 5)])
@pytest.mark.parametrize("geometry", [(0, 0, 0), (1, 0, 1), (99, 0, 0), (0, 99, 0), (0, 0, 99), (3, 4, 5)])
@pytest.mark.parametrize(("q_block", "kv_block"), [(1, 1), (4, 8), (8, 4), (64, 64)])
def test_edge_geometries(grid: Grid, geometry: tuple[int, int, int], q_block: int, kv_block: int) -> None:
    mask = triangle(*geometry)
    kinds = [[kind_of(block) for block in line] for line in cells_of(mask, grid, q_block, kv_block)]
    assert block_plan(mask, grid, q_block, kv_block).to_dense().tolist() == kinds


def test_a_gap_that_slides_through_a_row_block_leaves_no_block_full() -> None:
    mask = ~(Causal() & Window(0))  # every key but the row's own
    assert block_plan(mask, Grid(8, 8), 8, 1).to_dense().tolist() == [[1] * 8]
    assert block_plan(mask, Grid(8, 8), 4, 4).to_dense().tolist() == [[1, 2], [2, 1]]


def test_runs_that_touch_are_one_run() -> None:
    two_intervals = Sink(4) | (Sink(9) & ~Sink(5))
    check_runs(block_plan(two_intervals, Grid(12, 12), 4, 4).touched, [[(0, 3)]] * 3, 3)
    two_segments = (Sink(4) & ~LastRows(6)) | (Sink(8) & ~Sink(4) & LastRows(6))
    check_runs(block_plan(two_segments, Grid(12, 12), 12, 4).touched, [[(0, 2)]], 3)


def test_blocks_past_the_grid_count_only_its_pairs() -> None:
    assert block_plan(~Sink(0), Grid(5, 5), 4, 4).counts() == (0, 0, 4)
    assert block_plan(LastRows(1), Grid(5, 5), 4, 4).to_dense().tolist() == [[0, 0], [2, 2]]


def tensor_bytes(plan: BlockPlan) -> int:
    return sum(tensor.nbytes for runs in (plan.touched, plan.full, plan.partial) for tensor in runs)


def test_a_million_tokens_fit_in_a_few_megabytes() -> None:
    tracemalloc.start()
    plan = block_plan(triangle(8, 512, 128), Grid(MILLION, MILLION), 64, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
    assert tensor_bytes(plan) < 8_000_000
    assert plan.touched.start.shape == (16_384, 2)
    assert plan.full.start.shape == (16_384, 1)

    # Sinks touch block 0, the window its own block and the eight before it; the last two row blocks see all.
    touched = sum(min(a + 1, 10) for a in range(16_382)) + 16_383 + 16_384
    # Full are at most the seven blocks before its own: the eighth starts 575 keys before the last row.
    full = sum(min(a, 7) for a in range(16_382)) + 16_382 + 16_383
    assert plan.counts() == (16_384**2 - touched, touched - full, full)
    assert pair_count(triangle(8, 512, 128), plan.grid) <= plan.touched_pairs() == touched * 64 * 64


def test_a_plan_too_large_to_look_at_is_refused() -> None:
    plan = block_plan(dense_section(), Grid(MILLION, MILLION), 128, 128)
    with pytest.raises(ValueError, match="limited to 16777216 blocks, this one has 67108864"):
        plan.to_dense()


@pytest.mark.parametrize("size", [0, -8, 64.0, True, None])
@pytest.mark.parametrize("name", ["q_block", "kv_block"])
def test_block_sizes_are_checked(name: str, size: object) -> None:
    arguments = {"q_block": 8, "kv_block": 8, name: size}
    with pytest.raises(ValueError, match=f"{name} must be an int of at least 1, got {size!r}"):
        block_plan(dense_section(), Grid(4, 4), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("q_index", "kv_index"), [(-1, 0), (2, 0), (0, -1), (0, 3)])
def test_blocks_outside_the_plan_are_refused(q_index: int, kv_index: int) -> None:
    plan = block_plan(dense_section(), Grid(4, 6), 2, 2)
    with pytest.raises(ValueError, match=rf"block \({q_index}, {kv_index}\) is outside the plan of 2 by 3 blocks"):
        plan.kind(q_index, kv_index)
