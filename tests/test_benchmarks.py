"""What is written about speed and quality says what the stored measurements say. Nothing here is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tmx_compile import api
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.select import preference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("cpu_operator.json", "pass_cost.json", "prefill_memory.json", "first_n.json")


def python(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def stored(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES)
def test_a_stored_result_tells_where_it_comes_from(name):
    result = stored(name)
    assert not result["quick"]
    assert result["command"].startswith("python -m benchmarks.run ")
    assert result["hardware"]["cpu"]
    assert result["hardware"]["memory_gib"] > 0
    assert {"python", "torch", "transformers", "tmx_compile"} <= result["versions"].keys()
    assert result["records"]


def test_the_page_is_generated_from_the_stored_results():
    done = python("benchmarks.docs", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda r: r["records"][0].pop("kl"), "first_n.json: record 0 lacks the field 'kl'"),
        (lambda r: r["settings"].pop("score"), "first_n.json: settings lacks the field 'score'"),
        (lambda r: r.pop("date"), "first_n.json lacks the field 'date'"),
        (lambda r: r.update(quick=True), "first_n.json holds a --quick run"),
    ],
)
def test_the_page_is_not_written_from_a_damaged_result(tmp_path, damage, reason):
    for name in FILES:
        result = stored(name)
        if name == "first_n.json":
            damage(result)
        (tmp_path / name).write_text(json.dumps(result), encoding="utf-8")
    done = python("benchmarks.docs", "--results", str(tmp_path), "--out", str(tmp_path / "page.md"))
    assert done.returncode != 0
    assert reason in done.stderr
    assert not (tmp_path / "page.md").exists()


def test_auto_prefers_what_was_measured_fastest():
    result = stored("cpu_operator.json")
    settings = result["settings"]
    taken = {
        (r["dtype"], tuple(r["geometry"]), r["n"], r["lowering"]): r["ms"] for r in result["records"] if r["n"] >= 8192
    }
    cases = sorted({key[:3] for key in taken})
    assert len(cases) >= 2 * len(settings["geometries"]) * len(settings["dtypes"])
    wrong = []
    for dtype, geometry, n in cases:
        of = {name: taken[dtype, geometry, n, name] for name in ("flex", "blocked")}
        query, key, value = (
            torch.empty(1, heads, n, settings["head_dim"], dtype=getattr(torch, dtype), device="meta")
            for heads in (settings["heads"], settings["kv_heads"], settings["kv_heads"])
        )
        call = AttentionCall(query, key, value, None, *geometry, settings["head_dim"] ** -0.5, False)
        chosen = next(lowering.name for lowering in preference(call) if lowering.name in of)
        if of[chosen] > 1.15 * min(of.values()):
            wrong.append((dtype, geometry, n, chosen, of))
    assert not wrong


def test_the_warning_about_the_first_layers_quotes_the_measured_cost():
    records = {r["layers"]: r for r in stored("first_n.json")["records"]}
    measured = {name: records[name]["perplexity_increase"] for name in ("first", "deepest")}
    text = api._FIRST_N_WARNING
    assert text.format(n=9, **api._FIRST_N_COST) == text.format(n=9, **measured)


def test_a_quick_run_writes_valid_records(tmp_path):
    done = python("benchmarks.run", "operator", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu_operator.json").read_text(encoding="utf-8"))
    assert result["quick"]
    assert str(tmp_path) not in json.dumps(result)
    assert [r["lowering"] for r in result["records"]] == ["flex", "blocked", "operator"]
    for record in result["records"]:
        assert 0 < record["ms_min"] <= record["ms"] <= record["ms_max"]
        assert 0 < record["attended_pairs"] < record["causal_pairs"] == record["n"] * (record["n"] + 1) // 2
        assert record["ideal_speedup"] == pytest.approx(record["causal_pairs"] / record["attended_pairs"], rel=1e-5)
        assert record["error"] < 1e-5


def test_an_unknown_case_is_refused_with_the_known_ones():
    done = python("benchmarks.run", "no_such_case")
    assert done.returncode == 2
    assert "unknown case no_such_case; known: operator, pass_cost, prefill_memory, first_n" in done.stderr
