"""docs/benchmarks.md says what the stored results say."""

import json
import re
import subprocess
import sys

import pytest

from benchmarks import ttft
from benchmarks.common import RESULTS
from tests.support.ttft import ttft_records
from tools.pages import page_benchmarks
from tools.pages import run as command

ROOT = RESULTS.parents[1]
PAGE = ROOT / "docs" / page_benchmarks.PAGE


def python(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def stored(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_the_page_is_generated_from_the_stored_results():
    done = python("tools.pages", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda r: r["records"][0].pop("saving"), "kv_cache.json: record 0 lacks the field 'saving'"),
        (lambda r: r["settings"].pop("tokens"), "kv_cache.json: settings lacks the field 'tokens'"),
        (lambda r: r.pop("date"), "kv_cache.json lacks the field 'date'"),
        (lambda r: r.update(quick=True), "kv_cache.json holds a --quick run"),
    ],
)
def test_the_page_is_not_written_from_a_damaged_result(tmp_path, damage, reason):
    for name in page_benchmarks.BLOCKS:
        result = stored(f"{name}.json")
        if name == "kv_cache":
            damage(result)
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    page = tmp_path / page_benchmarks.PAGE
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    done = python("tools.pages", "--results", str(tmp_path), "--docs", str(tmp_path))
    assert done.returncode != 0
    assert reason in done.stderr
    assert page.read_text(encoding="utf-8") == text


def test_a_missing_result_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"operator_cuda\.json is missing; measure it with python -m benchmarks\.run"):
        page_benchmarks.generate(tmp_path, PAGE.parent)


@pytest.fixture
def gpu_results(tmp_path):
    """The stored results, some of those of a GPU made up, and the page."""
    for name in page_benchmarks.BLOCKS:
        (tmp_path / f"{name}.json").write_text(json.dumps(stored(f"{name}.json")), encoding="utf-8")
    (tmp_path / page_benchmarks.PAGE).write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    layer = stored("operator_cpu.json")
    layer["hardware"] |= {"gpu": "Imaginary 9000", "gpu_memory_gib": 80.0}
    layer["versions"] |= {"cuda": "13.0"}
    layer["settings"]["left_out"] = {"slow, 4/32/64, bfloat16, n = 4096": "RuntimeError: too slow"}
    for r in layer["records"]:
        r["extra_bytes"], r["timed"] = 3 * 2**20, "graph"
    layer["records"][0] |= {"timed": "call", "ms": 77.7, "over_floor": 3.21, "speedup": 12.3}
    removed = layer["records"].pop(1)
    longest = dict(layer["records"][-1], n=1048576, dense_ms=None, dense_backend=None, speedup=None)
    million = dict(layer, settings=dict(layer["settings"], lengths=[1048576]), records=[longest])
    whole = dict(layer, command="last", settings=ttft.settings(False), records=ttft_records())
    whole["runs"] = {f"llama/{i}": {"command": f"command {i}", "tmx_compile_sources": "abc"} for i in range(2)}
    for name, content in (("operator_cuda.json", layer), ("million.json", million), ("ttft.json", whole)):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path, removed


def generated(folder):
    """The page, its blocks by name, and its pictures."""
    page, pictures = page_benchmarks.generate(folder, folder)
    found = re.findall(r"^<!-- begin (\w+) -->\n(.*?)^<!-- end \1 -->$", page, flags=re.MULTILINE | re.DOTALL)
    return page, dict(found), pictures


def test_the_page_says_what_the_gpu_results_say(gpu_results):
    folder, removed = gpu_results
    page, blocks, pictures = generated(folder)
    assert blocks.keys() == {*page_benchmarks.BLOCKS, "machines"}
    assert "Imaginary 9000, 80.0 GiB, CUDA 13.0; " in blocks["machines"]
    layer = blocks["operator_cuda"]
    machine = re.search(r"\*\*(Machine \w)\*\*: Imaginary", page)[1]
    assert f"<sub>{machine}; " in layer
    assert "| 77.7 (12.3x) * |" in layer
    row = next(line for line in layer.splitlines() if line.startswith("| 4,096") and "77.7" in line)
    assert row.count(" - |") == 1, (row, removed)
    assert "- slow, 4/32/64, bfloat16, n = 4096: RuntimeError: too slow" in layer
    assert "1,048,576 tokens, " in blocks["million"]
    models = blocks["ttft"]
    assert "| `triangle-8-512-128` | 16 of 32 |  | 8.4 (-30%) |" in models
    assert "| `dense` | 0 of 32 | 0.3 | out of memory |" in models
    assert "| `triangle-4-32-64` | 16 of 32 | failed |  |" in models
    assert "`triangle-4-32-64` at 4,096 tokens: RuntimeError: no luck" in models
    assert "`triangle-8-512-128+graphs` 0.19 (-5%) at 4,096" in models
    spent = "attention takes 8,000, matrix products 3,500, the rest 500."
    assert f"12,000 ms of `dense-causal` at 131,072 tokens {spent}" in models
    assert "`triangle-8-512-128` 30% of 33%." in models
    assert "; `command 0`, `command 1`; " in models
    assert [picture.file for picture in pictures] == ["operator-cuda.svg", "ttft.svg", "operator-cpu.svg"]


def test_a_machine_is_described_once(gpu_results):
    """Every block names one, and no two are the same."""
    folder, _ = gpu_results
    _, blocks, _ = generated(folder)
    told = blocks.pop("machines").strip().splitlines()
    named = [re.search(r"<sub>(Machine \w)[;,]", block)[1] for block in blocks.values()]
    assert [line.split("**")[1] for line in told] == list(dict.fromkeys(named))
    assert len({line.partition(": ")[2] for line in told}) == len(told) == 3


def test_the_page_tells_what_a_gpu_result_does_not_show_by_itself(gpu_results):
    """Kernels in a class of an older rule, parts that are missing, small windows."""
    folder, _ = gpu_results
    assert "a tile of a small window" not in generated(folder)[1]["operator_cuda"]
    whole = json.loads((folder / "ttft.json").read_text(encoding="utf-8"))
    whole["records"][0]["account"]["longest"] = [["triangle_kernel", "other", 100.0], ["aten::mm", "matmul", 7.0]]
    (folder / "ttft.json").write_text(json.dumps(whole), encoding="utf-8")
    layer = json.loads((folder / "operator_cuda.json").read_text(encoding="utf-8"))
    n = max(layer["settings"]["dense_lengths"])
    layer["settings"]["lowerings"].append("triton")
    for floor_by, geometry, over_floor in (("pairs", [8, 512, 128], 1.11), ("bytes", [4, 32, 64], 2.22)):
        like = next(r for r in layer["records"] if (r["n"], r["geometry"]) == (n, geometry))
        layer["records"].append(like | {"lowering": "triton", "floor_by": floor_by, "over_floor": over_floor})
    (folder / "operator_cuda.json").write_text(json.dumps(layer), encoding="utf-8")
    _, blocks, _ = generated(folder)
    assert "attention takes 8,100, matrix products 3,500, the rest 400." in blocks["ttft"]
    missing = next(line for line in blocks["ttft"].splitlines() if line.startswith("Not measured yet"))
    assert "`llama/dense+mask`" in missing
    assert "`llama/dense`" not in missing
    assert "`triton` takes 1.11x the floor for 8/512/128, but 2.22x the floor for 4/32/64" in blocks["operator_cuda"]


def test_pictures_show_the_stored_numbers(gpu_results, tmp_path):
    folder, _ = gpu_results
    out = tmp_path / "docs"
    out.mkdir()
    (out / page_benchmarks.PAGE).write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--results", str(folder), "--docs", str(out)]
    command.main(arguments)
    command.main([*arguments, "--check"])
    drawn = {path.name: path.read_bytes() for path in out.glob("*.svg")}
    assert set(drawn) == {"operator-cuda.svg", "ttft.svg", "operator-cpu.svg"}
    for picture in page_benchmarks.generate(folder, out)[1]:
        picture.write(out)
        assert (out / picture.file).read_bytes() == drawn[picture.file]
    (out / "ttft.svg").write_text((out / "ttft.svg").read_text().replace("data sha256 ", "data sha256 0"))
    with pytest.raises(SystemExit, match=r"ttft.svg is out of date"):
        command.main([*arguments, "--check"])
