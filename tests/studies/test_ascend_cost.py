"""The cost on paper: its walk over blocks against one over cells, its file and its page against the formulae."""

import json
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.common import RESULTS
from studies import ascend_cost
from studies.ascend_cost import CHECK, CHIPS, FORMS, GEOMETRIES, LENGTHS, TILINGS, Problem, Tiling, Work, fused
from tmx_compile.bench.floor import attended_pairs, causal_pairs
from tmx_compile.mask.geometry import Geometry
from tools.pages import blocks, page_ascend, run
from tools.pages.markdown import Fields


def stored():
    return json.loads((RESULTS / ascend_cost.FILE).read_text(encoding="utf-8"))


def cells(tiling, rows, keys, before, after):
    """Scores, keys read and rescaled rows, from the visible cells of every block of rows."""
    scores = reads = rescaled = 0
    for first in range(0, rows, tiling.rows):
        block = range(first, min(first + tiling.rows, rows))
        seen = [j for i in block for j in range(keys) if i - before <= j <= i + after]
        if not seen:
            continue
        unit = tiling.trim
        touched = {
            j
            for place in range(min(seen) // unit, max(seen) // unit + 1)
            for j in range(unit * place, unit * place + unit)
        }
        touched = {j for j in touched if j < -(-keys // 64) * 64}
        scores += len(block) * len(touched)
        reads += len(touched)
        rescaled += len(block) * len({j // tiling.step for j in range(min(seen), max(seen) + 1)})
    return scores, reads, rescaled


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 200)),
    reach=st.tuples(st.integers(0, 250), st.integers(0, 60)),
    rows=st.sampled_from([16, 32]),
    trim=st.sampled_from([8, 64]),
)
def test_the_walk_over_blocks_equals_one_over_cells(sizes, reach, rows, trim):
    tiling = Tiling("", rows, 64, trim, 2, "")
    scores, reads, rescaled = cells(tiling, *sizes, *reach)
    problem = Problem(sizes[0], heads=4, kv_heads=2, dim=8)
    work, computed = fused(problem, tiling, *sizes, *reach)
    assert computed == 4 * scores
    assert work.cube == 4 * 8 * 4 * scores
    assert work.vector == 4 * (ascend_cost.VECTOR_OPS * scores + 3 * 8 * rescaled)
    assert work.l2 == 4 * (6 * scores + 4 * 8 * rescaled + 2 * 2 * 8 * reads / 2)


def test_operands_and_results_move_once():
    problem = Problem(1000, heads=4, kv_heads=2, dim=8)
    work, _ = fused(problem, TILINGS[0], 1000, 1000, 1000, 0, lse=True)
    assert work.hbm == 2 * 2 * 1000 * (4 + 2) * 8 + 4 * 4 * 1000
    # Two blocks of queries on the first 64 keys read those keys alone from memory.
    assert fused(problem, TILINGS[0], 200, 64, 200, 0)[0].hbm == 2 * 2 * 8 * (200 * 4 + 64 * 2)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.name)
@pytest.mark.parametrize("geometry", [*(g.counts for g in GEOMETRIES), (0, 0, 0), (8, 9000, 5), (3, 5, 9000)], ids=str)
def test_whole_blocks_cover_every_attended_pair(tiling, geometry):
    problem = Problem(8192)
    _, dense = ascend_cost.dense(problem, tiling)
    _, scores = ascend_cost.lowering(problem, tiling, Geometry(*geometry))
    assert dense >= 32 * causal_pairs(8192)
    assert 32 * attended_pairs(8192, Geometry(*geometry)) <= scores <= dense


def test_a_floor_is_the_slowest_of_four_rates():
    chip = CHIPS[0]
    rates = chip.rates
    # 24 cores of 16 x 16 x 16 multiplications and additions, 48 of 64 lanes, at 1.8 GHz: the published 353 and 22 / 4.
    assert rates["cube"] == pytest.approx(353.9e12, rel=1e-3)
    assert rates["vector"] == pytest.approx(22.1e12 / 4, rel=1e-2)
    work = Work(cube=rates["cube"], vector=0.5 * rates["vector"], l2=2 * rates["l2"], hbm=0)
    assert work.floor(chip) == pytest.approx(2000)
    assert (work + work).floor(chip) == pytest.approx(4000)


def test_a_floor_lies_under_what_was_measured():
    shares = [item["share"] for item in ascend_cost.check()]
    assert len(shares) == len(TILINGS) * len(CHECK["microseconds"])
    assert all(0.1 < share < 1 for share in shares)


def test_the_lowering_costs_more_than_one_kernel_and_less_than_dense():
    records = ascend_cost.records()
    kinds = {(r["form"], r["chip"], r["tiling"], r["n"], tuple(r["geometry"])): r for r in records}
    for r in records:
        if r["form"] == "lowering":
            kernel = kinds["one kernel", r["chip"], r["tiling"], r["n"], tuple(r["geometry"])]
            assert kernel["floor_ms"] < r["floor_ms"] < r["dense_floor_ms"], r
            assert 0.7 * r["computed_scores"] < kernel["computed_scores"] < r["computed_scores"]
            assert sum(part["floor_ms"] for part in r["parts"].values()) == pytest.approx(r["floor_ms"])


def test_the_stored_file_is_what_the_formulae_give(tmp_path):
    ascend_cost.main(["--out", str(tmp_path)])
    again = (tmp_path / ascend_cost.FILE).read_text(encoding="utf-8")
    assert again == (RESULTS / ascend_cost.FILE).read_text(encoding="utf-8")
    kinds = [(r["chip"], r["tiling"], r["form"], r["n"], tuple(r["geometry"])) for r in json.loads(again)["records"]]
    assert (
        len(set(kinds)) == len(kinds) == len(CHIPS) * len(TILINGS) * len(LENGTHS) * (1 + len(FORMS) * len(GEOMETRIES))
    )


def test_the_page_has_the_tables_of_the_stored_file(tmp_path):
    page = tmp_path / page_ascend.PAGE
    begin, end = blocks.marks(page_ascend.BLOCK)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert page_ascend.generate(tmp_path, tmp_path) is None
    (tmp_path / ascend_cost.FILE).write_text((RESULTS / ascend_cost.FILE).read_text())
    text = page_ascend.generate(tmp_path, tmp_path)
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    kernel, some = (
        next(r for r in stored()["records"] if (r["chip"], r["form"], r["n"]) == ("910B3", form, 131072))
        for form in ("one kernel", "lowering")
    )
    assert some["geometry"] == kernel["geometry"] == [4, 32, 64]
    told = [f"{r['floor_ms']:.3g} ({r['reduction']:+.1%})" for r in (some, kernel)]
    assert f"| 131,072 | 4/32/64 | {' | '.join(told)} |\n" in text
    dense = next(r for r in stored()["records"] if (r["chip"], r["form"], r["n"]) == ("910B3", "dense", 8192))
    assert f"| 8,192 | dense | {dense['floor_ms']:.3g} |  |\n" in text
    damaged = stored()
    del damaged["records"][0]["chip"]
    with pytest.raises(ValueError, match="record 0 lacks the field 'chip'"):
        page_ascend.section(Fields(damaged, "x"))


def test_a_stale_page_is_told(tmp_path):
    results, out = tmp_path / "results", tmp_path / "docs"
    shutil.copytree(RESULTS, results)
    shutil.copytree(RESULTS.parents[1] / "docs", out)
    arguments = ["--results", str(results), "--docs", str(out)]
    run.main(arguments)
    run.main([*arguments, "--check"])
    text = (out / page_ascend.PAGE).read_text()
    (out / page_ascend.PAGE).write_text(re.sub(r"-98\.\d%", "-99.9%", text))
    with pytest.raises(SystemExit, match=r"ascend\.md is out of date"):
        run.main([*arguments, "--check"])
