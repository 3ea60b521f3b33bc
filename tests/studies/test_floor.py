"""The studies of one layer against its floor: their arithmetic, and their quick forms on a CPU. Nothing is timed."""

import json

import pytest
import torch

from benchmarks.common import RESULTS
from studies import amx, floor
from tests.support.oracle import oracle
from tmx_compile.bench.floor import Shape, attended_pairs, causal_pairs
from tmx_compile.lowering import blocked, fa4
from tmx_compile.mask.geometry import Geometry

N = 8192
SHAPE = [4, 2, 64, 2]


def record(what, ms, geometry=None, lowering="triton", **more):
    found = {"what": what, "n": N, "shape": SHAPE, "copy_bytes_per_s": 1e12, "lowering": lowering, "ms": ms}
    return found | ({} if geometry is None else {"geometry": list(geometry)}) | more


def made_up():
    """A kernel that takes 0.5 ms beside a thousandth for each key of a row, 90 keys at least."""
    return [
        record("dense", 20.0, lowering="fa4"),
        record("dense", 40.0, lowering="cudnn"),
        record("layer", 2.0, (8, 512, 128)),
        record("streaming", 1.5, (8, 512, 0), window_ms=3.0),
        record("band", 1.25, (0, 512, 0), window_ms=3.0),
        record("band", 3.0, (0, 512, 0), lowering=floor.FA4_WINDOW, window_ms=3.0),
        *(record("sweep", 0.5 + max(w + 1, 90) / 1000, (0, w, 0)) for w in (0, 100, 500, 1000)),
        *(record("sweep", 2.0 + (w + 1) / 500, (0, w, 0), lowering=floor.FA4_WINDOW) for w in (0, 100, 500, 1000)),
    ]


def test_the_floor_is_by_the_best_dense_kernel_and_the_parts_make_the_whole():
    records = made_up()
    floor.finish(records)
    layer, streaming, band, theirs = records[2:6]
    shape, mask = Shape(N, 1, *SHAPE), Geometry(8, 512, 128)
    assert records[0]["flops_per_s"] == pytest.approx(shape.flops(causal_pairs(N)) / 0.02)
    # What 20 ms of pairs come to, each at the same price.
    assert layer["floor_ms"] == pytest.approx(20.0 * attended_pairs(N, mask) / causal_pairs(N))
    assert layer["over_floor"] == pytest.approx(2.0 / layer["floor_ms"])
    assert (layer["speedup"], layer["dense_backend"]) == (10.0, "fa4")
    assert "ratio" not in layer
    assert (streaming["ratio"], band["ratio"], theirs["ratio"]) == (2.0, pytest.approx(2.4), 1.0)
    assert (band["key_ms"], theirs["key_ms"]) == (pytest.approx(0.001), pytest.approx(0.002))
    assert band["tile_ms"] == pytest.approx(1.25 - 0.513)
    assert band["pace_of_dense"] == pytest.approx(20.0 * N / causal_pairs(N) / 0.001)
    parts = layer["parts_ms"]
    assert parts["pairs"] == pytest.approx(20.0 * attended_pairs(N, Geometry(0, 512, 0)) / causal_pairs(N))
    assert (parts["tile"], parts["sinks"], parts["last rows"]) == (pytest.approx(0.737), 0.25, 0.5)
    assert sum(parts.values()) == pytest.approx(layer["ms"])


def test_without_a_sweep_no_parts_are_told():
    records = made_up()[:5]
    floor.finish(records)
    assert records[2]["parts_ms"] is None
    assert "pace_of_dense" not in records[4]


def test_the_quick_form_has_every_record():
    n = floor.QUICK["lengths"][0]
    records = [r for part in floor.names(True) for r in floor.measure(part, True)]
    floor.finish(records)
    for geometry in floor.GEOMETRIES:
        sink, window, last = geometry.counts
        for what, counts in (("layer", [sink, window, last]), ("streaming", [sink, window, 0])):
            of = [r for r in records if (r["n"], r["what"], r.get("geometry")) == (n, what, counts)]
            assert [r["lowering"] for r in of] == ["blocked"]
            assert of[0]["over_floor"] == pytest.approx(of[0]["ms"] / of[0]["floor_ms"])
    swept = [r["geometry"][1] for r in records if r["what"] == "sweep" and r["n"] == n]
    assert sorted(swept) == floor.QUICK["sweep"]
    assert {r["n"] for r in records if r["what"] == "sweep"} == {n}


def test_the_window_kernel_is_asked_for_our_band(monkeypatch):
    asked = []

    def dense(query, key, value, *, softmax_scale, causal, window_size):
        asked.append((query.shape, causal, window_size))
        moved = (x.transpose(1, 2) for x in (query, key, value))
        return oracle(*moved, None, 0, window_size[0], 0, softmax_scale)[0].transpose(1, 2), None

    monkeypatch.setattr(fa4, "functions", lambda: (dense, None))
    query, key, value = (torch.randn(1, heads, 90, 16, dtype=torch.float64) for heads in (4, 2, 2))
    got = floor.window_by_fa4(query, key, value, 7)
    assert asked == [((1, 90, 4, 16), True, (7, 0))]
    torch.testing.assert_close(got, oracle(query, key, value, None, 0, 7, 0, 0.25)[0])


def test_a_cpu_without_amx_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(RuntimeError, match="needs a CPU with AMX"):
        amx.measure("eager/SmolLM2-135M", quick=False)


def test_the_quick_form_on_a_cpu(monkeypatch):
    held = []
    attend = blocked.attend

    def seen(query, key, value, mask, scoring):
        held.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, mask, scoring)

    monkeypatch.setattr(blocked, "attend", seen)
    records = amx.measure("eager/SmolLM2-135M", quick=True)
    amx.finish(records)
    (n,) = amx.QUICK["lengths"]
    for r, geometry in zip(records, amx.GEOMETRIES, strict=True):
        assert (r["n"], r["geometry"], r["lowering"]) == (n, list(geometry.counts), "blocked")
        assert r["error"] < 0.02
        assert r["over_floor"] == pytest.approx(r["ms"] / r["floor_ms"])
        # The keys of a block, as the lowering made them.
        size = blocked.rows_per_block(geometry.window)
        (keys,) = {k for rows, k in held if rows == size and k != n} & {
            (-(-geometry.window // size) + 1) * size + geometry.sink
        }
        streaming = n - geometry.last
        in_mask = attended_pairs(streaming, Geometry(geometry.sink, geometry.window, 0))
        assert r["keys_over_mask"] == pytest.approx(streaming * keys / in_mask)
        assert r["rate_of_dense"] > 0


def test_the_floor_of_a_cpu_is_by_the_best_rates_with_amx_or_without():
    like = {
        "n": 4096,
        "heads": [2, 1, 64],
        "geometry": [4, 32, 64],
        "ms": 2.0,
        "dense_ms": 8.0,
        "copy_bytes_per_s": 1e12,
    }
    records = [
        like | {"form": form, "matmul_flops_per_s": rate}
        for form, rate in (("eager", 1e11), ("compiled", 2e11), ("avx512", 5e10))
    ]
    amx.finish(records)
    with_amx, compiled, without = records
    flops = Shape(4096, 1, 2, 1, 64, 2).flops(attended_pairs(4096, Geometry(4, 32, 64)))
    assert with_amx["floor_ms"] == compiled["floor_ms"] == pytest.approx(flops / 2e11 * 1e3)
    assert without["floor_ms"] == pytest.approx(4 * with_amx["floor_ms"])
    assert (with_amx["speedup"], with_amx["floor_by"]) == (4.0, "pairs")


def test_the_stored_layers_are_all_there_and_their_parts_make_the_whole():
    result = json.loads((RESULTS / floor.CASE.file_name).read_text(encoding="utf-8"))
    layers = [r for r in result["records"] if r["what"] == "layer"]
    wanted = {(n, geometry.counts) for n in floor.FULL["lengths"] for geometry in floor.GEOMETRIES}
    assert {(r["n"], tuple(r["geometry"])) for r in layers} == wanted
    assert result["settings"]["fa4"] == "installed"
    for r in layers:
        assert r["timed"] == "graph"
        assert r["over_floor"] >= 1
        assert (r["parts_ms"] is None) == (r["n"] < floor.FULL["sweep_from"])
        if r["parts_ms"]:
            assert sum(r["parts_ms"].values()) == pytest.approx(r["ms"], rel=1e-4)
    # Both kernels computed the same band.
    assert all(
        r["error"] < 0.05 for r in result["records"] if r["what"] == "band" and r["lowering"] == floor.FA4_WINDOW
    )


def test_where_auto_takes_the_triangle_on_a_cpu_with_amx_it_was_faster():
    result = json.loads((RESULTS / amx.CASE.file_name).read_text(encoding="utf-8"))
    assert "amx_bf16" in result["hardware"]["flags"]
    assert "gpu" not in result["hardware"]
    taken = [r for r in result["records"] if r["auto"] == r["lowering"]]
    assert {r["n"] for r in taken} == set(amx.FULL["lengths"])
    assert all(r["speedup"] > 1 for r in taken)
