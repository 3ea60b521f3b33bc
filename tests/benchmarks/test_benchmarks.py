"""The benchmarks' own steps, and what their stored results say. Nothing here is timed."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import common, operator, peers, shapes, ttft
from benchmarks.account import account, floor_limit, kernel_class
from tests.support.ttft import ttft_records
from tmx_compile.bench.floor import Ceilings, Shape, attended_pairs, causal_pairs
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import Role, Wish, candidates
from tmx_compile.mask.geometry import Geometry

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("operator_cpu.json", "pass_cost.json", "prefill_memory.json", "first_n.json", "kv_cache.json")
# Measured on a GPU; the page has their sections where they are there.
GPU_FILES = tuple(
    name
    for name in ("operator_cuda.json", "ttft.json", "throughput_cuda.json", "million.json", "operator_cuda_peer.json")
    if (RESULTS / name).is_file()
)


def python(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def stored(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", FILES + GPU_FILES)
def test_a_stored_result_tells_where_it_comes_from(name):
    result = stored(name)
    assert not result["quick"]
    assert result["command"].startswith(("python -m benchmarks.run ", "python -m studies.run "))
    assert result["hardware"]["cpu"]
    assert result["hardware"]["memory_gib"] > 0
    assert {"python", "torch", "transformers", "tmx_compile"} <= result["versions"].keys()
    assert result["records"]
    assert ("gpu" in result["hardware"]) == (name in GPU_FILES)


def test_auto_prefers_what_was_measured_fastest():
    result = stored("operator_cpu.json")
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
        call = AttentionCall(query, key, value, None, Geometry(*geometry), settings["head_dim"] ** -0.5, False)
        chosen = next(lowering.name for lowering in candidates("cpu", Role.PROMPT, call, Wish()) if lowering.name in of)
        if of[chosen] > 1.15 * min(of.values()):
            wrong.append((dtype, geometry, n, chosen, of))
    assert not wrong


def test_a_quick_run_writes_valid_records(tmp_path):
    done = python("benchmarks.run", "operator", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / operator.file()).read_text(encoding="utf-8"))
    assert result["quick"]
    assert str(tmp_path) not in json.dumps(result)
    assert result["settings"]["left_out"] == {}
    plan = operator.plan(True, common.device().type)
    assert [r["lowering"] for r in result["records"]] == list(plan.lowerings)
    for record in result["records"]:
        assert 0 < record["ms_min"] <= record["ms"] <= record["ms_max"]
        assert 0 < record["attended_pairs"] < record["causal_pairs"] == record["n"] * (record["n"] + 1) // 2
        assert record["ideal_speedup"] == pytest.approx(record["causal_pairs"] / record["attended_pairs"], rel=1e-5)
        assert record["over_floor"] == pytest.approx(record["ms"] / record["floor_ms"], rel=1e-4)
        assert record["error"] < 0.05


def test_the_switch_is_measured_beside_sdpa(tmp_path):
    done = python("studies.run", "switch", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "switch.json").read_text(encoding="utf-8"))
    found = [(r["padding"], r["attention"]) for r in result["records"]]
    assert found == [(padding, name) for padding in ("none", "left") for name in ("sdpa", "tmx")]
    assert all(r["ms"] > 0 and r["failed"] is None for r in result["records"])


@pytest.mark.parametrize("module", ["benchmarks.run", "studies.run"])
def test_an_unknown_case_is_refused_with_the_known_ones(module):
    cases = ", ".join(case.name for case in importlib.import_module(module).CASES)
    assert len(cases.split()) > 2
    done = python(module, "no_such_case")
    assert done.returncode == 2
    assert f"python -m {module}: error: unknown case no_such_case; known: {cases}\n" in done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "reason"),
    [
        (
            "benchmarks.run",
            ["ttft", "--quick", "--only", "gpt/*"],
            "--only 'gpt/*' fits no part; known: llama/dense-causal, ",
        ),
        ("benchmarks.run", ["operator", "--only", "llama"], "--only and --missing are for a case that comes in parts"),
        pytest.param(
            "studies.run",
            ["million"],
            "case million needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_be_run_is_refused(module, arguments, reason):
    done = python(module, *arguments)
    assert done.returncode == 2
    assert reason in done.stderr


def test_peers_are_those_that_are_installed(monkeypatch):
    assert peers.minference_tri_shape() is None
    assert peers.peers() == {}
    called = []

    def tri_shape_kernel(query, key, value, config):
        called.append((key.shape, value.shape, config))
        return query

    kernels = type(sys)("minference.ops.streaming_kernel")
    kernels.tri_shape_kernel = tri_shape_kernel
    monkeypatch.setitem(sys.modules, "minference", type(sys)("minference"))
    monkeypatch.setitem(sys.modules, "minference.ops", type(sys)("minference.ops"))
    monkeypatch.setitem(sys.modules, "minference.ops.streaming_kernel", kernels)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    (peer,) = peers.peers().values()
    x = torch.zeros(1, 4, 10, 8)
    assert peer(x, x[:, :2], x[:, :2], Geometry(4, 32, 5)) is None  # not on CUDA
    on_gpu = _Somewhere(x)
    assert peer(on_gpu, x[:, :2], x[:, :2], Geometry(4, 32, 0)) is None  # no last rows
    peer(on_gpu, x[:, :2], x[:, :2], Geometry(4, 32, 5))()
    config = {"attn_forward_config": {"n_init": 4, "n_local": 33, "n_last": 5}}
    assert called == [(x.shape, x.shape, config)]


class _Somewhere:
    """A tensor that says it is on a GPU."""

    def __init__(self, x):
        self.x, self.shape, self.device = x, x.shape, torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("triton_tem_fused_flex_attention_3", "attention"),
        ("triangle_kernel", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("aten::addmm", "matmul"),
        ("triton_tem_fused_mm_2", "matmul"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_transpose_4", "other"),
        ("triton_red_fused_rsqrt_mean_1", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_fall_into_classes(name, kind):
    assert kernel_class(name) == kind


def test_the_account_sums_what_was_run():
    a = torch.randn(300, 300)
    found = account(lambda: [a @ a for _ in range(3)] + [a.sin()], torch.device("cpu"))
    names = {name: kind for name, kind, _ in found["longest"]}
    assert names["aten::mm"] == "matmul"
    assert names["aten::sin"] == "other"
    assert found["matmul_ms"] > 0
    assert found["attention_ms"] == 0
    assert sum(ms for *_, ms in found["longest"]) <= found["matmul_ms"] + found["other_ms"] + 1e-9


def test_the_limit_is_arithmetic():
    """10 layers of 100 ms attention in a call of 3 s; a triangle layer at its floor costs what its pairs cost."""
    shape, geometry = Shape(4096, 1, 2, 1, 8, 2), Geometry(4, 32, 64)
    share = attended_pairs(4096, geometry) / causal_pairs(4096)
    limit = floor_limit(3000.0, 1000.0, 1e30, shape, 10, 4, geometry)
    assert limit == pytest.approx(3000 - 4 * (100 - 100 * share))
    slow = Ceilings(1e4, 1e30).floor(shape, geometry)[0]
    assert floor_limit(3000.0, 1000.0, 1e4, shape, 10, 4, geometry) == pytest.approx(3000 - 4 * (100 - slow))


def test_reductions_are_against_the_fastest_dense_of_the_same_kind():
    dense, wide, lost, short, failed, _, graphs = ttft_records()
    assert dense["reduction"] == 0
    assert wide["reduction"] == pytest.approx(0.3)
    assert wide["best_dense"] == "dense-causal"
    # 250 ms of attention a layer; the floor is a few milliseconds.
    assert 1 - 16 * 250 / 12000 < 1 - wide["limit_reduction"] < 1 - 16 * 240 / 12000
    assert (lost["reduction"], failed["reduction"], short["reduction"]) == (None, None, 0)
    assert graphs["reduction"] == pytest.approx(0.05)


def test_a_whole_model_is_measured_in_parts(tmp_path, monkeypatch):
    """One part of a tiny model for real; others are then put beside it, or found to be there."""
    done = python("benchmarks.run", "ttft", "--quick", "--only", "llama/triangle-4-32-64", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    path = tmp_path / "ttft.json"
    first = json.loads(path.read_text(encoding="utf-8"))
    assert str(tmp_path) not in json.dumps(first)
    assert [r["tokens"] for r in first["records"]] == ttft.QUICK["lengths"]
    for record in first["records"]:
        assert record["failed"] is None
        assert not record["oom"]
        assert record["ms"] > 0
        assert record["compilations"] == 1
        assert (record["triangle_layers"], record["layers"]) == (2, 4)
    assert first["records"][0]["compile_s"] > 0
    assert first["records"][1]["account"]["matmul_ms"] > 0

    monkeypatch.setattr(shapes, "build", None)
    monkeypatch.setattr(common, "note", lambda text: None)
    fake = common.Case(
        "ttft",
        "ttft.json",
        None,
        ttft.COLUMNS,
        common.Parts(ttft.names, ttft.settings, lambda part, quick: [{"ms": 1.0, "new": True}], lambda records: None),
    )
    merged = common.run_parts(fake, ["llama/dense-causal"], True, "again", path, 10)
    assert merged == json.loads(path.read_text(encoding="utf-8"))
    assert merged["records"] == [{"part": "llama/dense-causal", "ms": 1.0, "new": True}, *first["records"]]
    assert {name: run["command"] for name, run in merged["runs"].items()} == {
        "llama/triangle-4-32-64": first["command"],
        "llama/dense-causal": "again",
    }
    late = common.run_parts(fake, ["llama/dense"], True, "late", path, -1)
    assert late["records"] == merged["records"]
    with pytest.raises(ValueError, match="holds a run with quick=True"):
        common.run_parts(fake, ["llama/dense"], False, "real", path, 10)
    merged["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(merged), encoding="utf-8")
    with pytest.raises(ValueError, match=r"ttft.json holds versions torch '1.0', this is "):
        common.run_parts(fake, ["llama/dense"], True, "other", path, 10)
