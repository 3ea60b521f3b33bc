"""The measuring code: its floor, its reference, its records. Nothing is compared with a clock."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.oracle import oracle
from tmx_compile.bench import floor, layer, record, reference, timing
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Ceilings, Shape
from tmx_compile.bench.timing import Rounds
from tmx_compile.mask.geometry import Geometry

SMALL = dict(
    device="cpu",
    lengths=(300,),
    geometries=(Geometry(4, 32, 64),),
    dtypes=("float32",),
    heads=4,
    kv_heads=2,
    head_dim=16,
    lowerings=("operator",),
    rounds=Rounds(0.0, 2, 2),
)


def tensors(n, heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    return tuple(torch.randn(1, h, n, dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))


def test_the_floor_is_the_larger_of_two_times():
    # 4 tokens, sinks 1, window 0, last rows 1: rows attend to 1, 2, 2 and 4 keys.
    assert floor.attended_pairs(4, Geometry(1, 0, 1)) == 9
    assert floor.causal_pairs(4) == 10
    shape = Shape(n=4, batch=1, heads=6, kv_heads=2, dim=8, element=2)
    # q and out: 6 x 4 x 8 numbers; k and v: 2 x 4 x 8; two bytes each.
    assert shape.bytes == 2 * (192 + 192 + 64 + 64)
    assert shape.flops(9) == 9 * 4 * 6 * 8
    assert Ceilings(1024.0, 1e30).floor(shape, Geometry(1, 0, 1)) == (1000.0, "bytes")
    assert Ceilings(1e30, 864.0).floor(shape, Geometry(1, 0, 1)) == (2000.0, "pairs")


def test_the_floor_of_a_known_machine():
    """32/8 heads of 128 in bfloat16 at 4,096 tokens, at 3.02 TB/s: 0.028 ms."""
    shape = Shape(4096, 1, 32, 8, 128, 2)
    ms, by = Ceilings(3.02e12, 540e12).floor(shape, Geometry(4, 32, 64))
    assert (round(ms, 3), by) == (0.028, "bytes")
    ms, by = Ceilings(3.02e12, 540e12).floor(Shape(131072, 1, 32, 8, 128, 2), Geometry(64, 1024, 128))
    assert by == "pairs"
    assert ms == pytest.approx(1e3 * floor.attended_pairs(131072, Geometry(64, 1024, 128)) * 4 * 32 * 128 / 540e12)


@pytest.mark.parametrize("geometry", [(4, 32, 16), (0, 0, 0), (200, 3, 500), (0, 0, 150)], ids=str)
def test_the_reference_has_the_oracles_numbers(monkeypatch, geometry):
    monkeypatch.setattr(reference, "CELLS", 150 * 2 * 7)
    query, key, value = tensors(150)
    want, _ = oracle(query, key, value, None, *geometry, 0.25)
    rows = torch.randperm(150)[:90]
    got = reference.attention_rows(query, key, value, rows, Geometry(*geometry))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want[:, :, rows], atol=1e-12, rtol=0)
    assert reference.largest_error(want, rows, got) < 1e-12
    want[0, 1, rows[3], 2] += 0.5
    assert reference.largest_error(want, rows, got) == pytest.approx(0.5)
    want[0, 1, rows[3], 2] = math.nan
    assert math.isnan(reference.largest_error(want, rows, got))


def test_sampled_rows_hold_every_border():
    rows = reference.sampled_rows(5000, [Geometry(8, 512, 128), Geometry(4, 32, 64)], 100, torch.device("cpu")).tolist()
    assert rows == sorted(set(rows))
    assert rows[0] == 0
    assert rows[-1] == 4999
    assert {7, 8, 511, 512, 513, 519, 520, 4871, 4872, 4935, 4936, 3, 4, 31, 32, 33} <= set(rows)
    assert 100 < len(rows) < 250


def test_dense_variants_are_causal_attention():
    query, key, value = tensors(70)
    found, refused = dense_variants(query, key, value)
    assert set(found) == {"flash", "math"}
    assert refused == {}
    expanded = [x.repeat_interleave(2, 1) for x in (key, value)]
    for run in found.values():
        torch.testing.assert_close(run(), F.scaled_dot_product_attention(query, *expanded, is_causal=True))


def test_a_backend_that_refuses_is_told_with_its_reason():
    query, key, value = tensors(70, heads=3)
    found, refused = dense_variants(query, key, value)
    assert found == {}
    assert set(refused) == {"dense flash", "dense math"}
    assert all(reason.startswith("RuntimeError: ") for reason in refused.values())


def test_timings_are_medians_of_interleaved_rounds(monkeypatch):
    order = []
    clock = iter([0.0, *(0.1 * i for i in range(1, 10))])
    monkeypatch.setattr(timing, "seconds", lambda run: run() or 1.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = timing.interleaved(runs, budget_s=0.25, least=2, most=9)
    assert "".join(order) == "ab" + "ab" * 4
    assert {t.rounds for t in timings.values()} == {4}
    taken = timing.Timing.of([0.003, 0.001, 0.002])
    assert taken.fields("x_") == {"x_ms": 2.0, "x_ms_min": 1.0, "x_ms_max": 3.0, "x_rounds": 3}
    assert taken.how == "wall"


def test_an_error_is_one_line_that_names_the_cause():
    outer = RuntimeError("the compiler failed\nlong trace")
    assert timing.describe(outer) == "RuntimeError: the compiler failed"
    outer.inner_exception = ValueError("\n window=3\nmore")
    assert timing.describe(outer) == "ValueError: window=3"


@pytest.fixture(scope="module")
def measured():
    """Two lengths, dense at the first only, and a peer that is wrong by a known amount."""

    def wrong(query, key, value, geometry):
        rows = torch.arange(query.shape[2])
        right = reference.attention_rows(query, key, value, rows, geometry).float()
        return lambda: right + 0.25

    def refuses(query, key, value, geometry):
        return None

    def fails(query, key, value, geometry):
        raise RuntimeError("no such kernel")

    plan = layer.Plan(**(SMALL | dict(lengths=(400, 300), dense_up_to=300, dynamic=True)))
    return layer.measure(plan, {"wrong": wrong, "refuses": refuses, "fails": fails})


def test_a_record_has_what_it_promises(measured):
    first, wrong, longer, _ = measured.records
    assert [r["lowering"] for r in measured.records] == ["operator", "wrong"] * 2
    assert [r["n"] for r in measured.records] == [300, 300, 400, 400]
    assert set(layer.COLUMNS) <= first.keys()
    assert first["dense_ms"] == min(first["dense_all_ms"].values())
    assert first["dense_all_ms"][first["dense_backend"]] == first["dense_ms"]
    assert first["speedup"] == first["dense_ms"] / first["ms"]
    assert first["over_floor"] == first["ms"] / first["floor_ms"]
    assert first["timed"] == "wall"
    assert first["extra_bytes"] is None
    assert first["error"] < 1e-5
    assert first["dense_error"] < 1e-5
    assert wrong["error"] == pytest.approx(0.25, abs=1e-5)
    assert longer["dense_ms"] is None
    assert longer["dense_backend"] is None
    assert longer["speedup"] is None
    assert longer["floor_ms"] > first["floor_ms"]


def test_the_floor_follows_from_the_stored_ceilings(measured):
    settings = measured.settings
    ceilings = Ceilings(settings["copy_bytes_per_s"], settings["dense_flops_per_s"]["float32"])
    for r in measured.records:
        shape = Shape(r["n"], 1, 4, 2, 16, 4)
        assert (r["floor_ms"], r["floor_by"]) == ceilings.floor(shape, Geometry(4, 32, 64))
    r = measured.records[0]
    assert settings["dense_flops_per_s"]["float32"] == pytest.approx(
        300 * 301 // 2 * 4 * 4 * 16 / (r["dense_ms"] / 1e3)
    )
    assert settings["dense_lengths"] == [300]


def test_what_fails_is_left_out_with_its_reason(measured):
    left_out = measured.settings["left_out"]
    assert left_out == {f"fails, 4/32/64, float32, n = {n}": "RuntimeError: no such kernel" for n in (300, 400)}


def test_a_layer_that_is_not_lowered_as_asked_is_left_out(monkeypatch):
    monkeypatch.setattr(layer, "MIN_SEQ_LEN", 1 << 20)
    monkeypatch.setattr(layer.Plan, "__post_init__", lambda self: None)
    found = layer.measure(layer.Plan(**SMALL))
    assert found.records == []
    (reason,) = found.settings["left_out"].values()
    assert reason.startswith("RuntimeError: asked for operator, got")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(device="tpu"), "device must be one of cpu, cuda, got 'tpu'"),
        (dict(lengths=()), "lengths must not be empty"),
        (dict(lengths=(4096, 256)), "lengths must be over 256 tokens, got 256"),
        (dict(heads=0), "heads must be at least 1, got 0"),
        (dict(kv_heads=3), "kv_heads must divide heads, got 3 and 4"),
        (dict(dtypes=("int8",)), "dtypes must be among float32, bfloat16, float16, got 'int8'"),
        (dict(geometries=((1, 2),)), r"geometries must be of Geometry, with counts of at least 0, got \(1, 2\)"),
        (dict(geometries=(Geometry(1, -2, 3),)), r"geometries must be of Geometry, .*window=-2"),
        (dict(lowerings=("fast",)), "lowerings must be among .*, got 'fast'"),
    ],
)
def test_a_bad_plan_is_refused_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        layer.Plan(**(SMALL | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="device must be usable here"):
        layer.Plan(**(SMALL | dict(device="cuda")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_graphs_and_memory():
    """On the device itself: a graph, the extra memory of a call, a fallback where a call cannot be captured."""
    plan = layer.Plan(**(SMALL | dict(device="cuda", lengths=(1024,), lowerings=("blocked",), dtypes=("bfloat16",))))
    found = layer.measure(plan)
    (r,) = found.records
    assert r["timed"] == "graph", found.settings["left_out"]
    assert r["extra_bytes"] >= 0
    assert r["error"] < 0.05
    x = torch.ones(1000, 1000, device="cuda")
    taken = timing.interleaved_on(x.device, {"captured": x.sin, "not": lambda: x.sum().item()}, Rounds(0.0, 2, 2))
    assert [taken[name].how for name in ("captured", "not")] == ["graph", "call"]
    assert taken["not"].why
    assert timing.extra_bytes(lambda: x.sin()) == 0
    assert timing.extra_bytes(lambda: x.sin().cos()) >= 4_000_000


def test_a_result_file_reads_back(tmp_path):
    found = record.Measured({"device": "cpu", "rate": 1234567.891}, [{"n": 3, "ms": 0.123456789, "none": None}])
    content = record.result("case", "command", False, record.hardware(), found)
    record.write(content, tmp_path / "deep" / "x.json")
    stored = json.loads((tmp_path / "deep" / "x.json").read_text(encoding="utf-8"))
    assert stored == content
    assert stored["records"] == [{"n": 3, "ms": 0.123457, "none": None}]
    assert stored["settings"]["rate"] == 1234570.0
    table = record.table(content, ("n", "ms", "none", "absent"))
    assert [list(column.cells) for column in table.columns] == [["3"], ["0.1235"], ["-"], ["-"]]
