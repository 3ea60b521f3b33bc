"""``advise``: against brute force on random tables, its times, its code and its profile, and what it refuses."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.models import tiny_qwen3
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.analysis import Choice, Evaluation, Interval, Record, advise
from tmx_compile.analysis.judge.evaluation import METRICS
from tmx_compile.bench import layer, layer_times, record
from tmx_compile.bench.layer_times import AttentionShape, LayerTime, measure_times, read_times
from tmx_compile.bench.timing import Rounds
from tmx_compile.config.fingerprint import ModelFingerprint
from tmx_compile.mask.geometry import Geometry

LAYERS, TOKENS = 5, 4096
WIDE, NARROW = AttentionShape(8, 2, 64, 64), AttentionShape(4, 4, 32, 32)
WINDOWED = AttentionShape(8, 2, 64, 64, reach=99)
# Layer 3 has two calls, and layer 4 a window of its own.
SHAPES = {0: (WIDE,), 1: (NARROW,), 2: (WIDE,), 3: (WIDE, NARROW), 4: (WINDOWED,)}
GEOMETRIES = [Geometry(4, 32, 64), Geometry(8, 512, 128)]


def evaluation(records, shapes=SHAPES, **changes):
    return Evaluation(
        num_layers=len(shapes),
        fingerprint=ModelFingerprint("0123", "4567"),
        shapes=shapes,
        tokens=(2048, 2048),
        prompts=8,
        final=64,
        following=128,
        dense={"ppl_final": 12.0, "ppl_following": 11.0, "right": 0.5},
        records=records,
        about={"class": "Model", "versions": {"torch": "2"}},
        **({"dtype": "float32", "device": "cpu"} | changes),
    )


def costs(mean, spread=0.0):
    """A record's intervals, all the same."""
    return dict.fromkeys((*METRICS, "right"), Interval(mean, mean - spread, mean + spread))


def time_of(shape, geometry, dense, triangle, tokens=TOKENS, dtype="float32"):
    return LayerTime(shape, geometry, tokens, dtype, dense, triangle, "blocked", "some processor")


TIMES = [
    time_of(shape, geometry, dense, triangle)
    for shape, dense in ((WIDE, 10.0), (NARROW, 6.0))
    for geometry, triangle in zip(GEOMETRIES, (1.0, 2.5), strict=True)
]


def table(**rows):
    """An evaluation of choices by name: (geometry number, layers, mean, spread)."""
    return evaluation({name: Record(Choice(GEOMETRIES[g], ls), **costs(m, s)) for name, (g, ls, m, s) in rows.items()})


def ask(found, **kwargs):
    return advise(found, **({"budget": 0.01, "tokens": TOKENS, "times": TIMES} | kwargs))


# Against brute force.

numbers = st.floats(-0.02, 0.06).map(lambda x: round(x, 4))
intervals = st.tuples(numbers, numbers, numbers).map(lambda x: Interval(*(sorted(x)[i] for i in (1, 0, 2))))
choices = st.builds(
    Choice,
    st.sampled_from(GEOMETRIES),
    st.sets(st.integers(0, LAYERS - 1), min_size=1).map(lambda x: tuple(sorted(x))),
    st.booleans(),
)
records = st.builds(Record, choices, *[intervals] * 5)
milliseconds = st.integers(1, 40).map(float)


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), records, min_size=1),
    st.floats(0, 0.05),
    st.sampled_from(METRICS),
    st.sampled_from(["upper", "mean"]),
    st.booleans(),
    st.lists(milliseconds, min_size=8, max_size=8),
)
def test_the_best_is_that_of_brute_force(rows, budget, metric, bound, streaming, drawn):
    if streaming and not metric.endswith("following"):
        metric = metric.replace("final", "following")
    clock = iter(drawn)
    times = [time_of(s, g, next(clock), next(clock)) for s in (WIDE, NARROW) for g in GEOMETRIES]
    of = {name: row for name, row in rows.items() if row.choice.streaming == streaming}
    if not of:
        with pytest.raises(ValueError, match=f"none has streaming={streaming}"):
            ask(evaluation(rows), budget=budget, metric=metric, bound=bound, streaming=streaming, times=times)
        return
    found = ask(evaluation(rows), budget=budget, metric=metric, bound=bound, streaming=streaming, times=times)
    cost = {name: getattr(getattr(row, metric), bound) for name, row in of.items()}
    saved = {}
    for name, row in of.items():
        total = 0.0
        for index in row.choice.layers:
            for shape in SHAPES[index]:
                # A layer with a window of its own saves nothing that is known.
                for t in times:
                    if t.shape == shape and t.geometry == row.choice.geometry:
                        total += t.dense_ms - t.triangle_ms
        saved[name] = total
    best = None
    for name in of:
        if cost[name] <= budget and saved[name] > 0:
            key = (-saved[name], cost[name], name)
            if best is None or key < best:
                best = key
    assert (found.best and found.best.name) == (best and best[2])
    assert {x.name: x.saved_ms for x in found.candidates if x.fits} == {n: saved[n] for n in of if cost[n] <= budget}
    assert all(x.saved_ms is None for x in found.candidates if not x.fits)
    assert found.nearest.name == min(of, key=lambda name: (cost[name], name))
    if best is None:
        assert found.config is None
        nothing = "nothing fits: " if min(cost.values()) > budget else "nothing is faster: "
        assert found.verdict.startswith(nothing)
        with pytest.raises(ValueError, match=nothing):
            found.code()
    else:
        row = of[best[2]]
        assert (found.config.geometry, found.config.layers()) == (row.choice.geometry, row.choice.layers)
        assert ('decode="streaming"' in found.code()) == streaming


def test_noise_does_not_pass_for_quality():
    found = table(sure=(0, (2,), 0.004, 0.001), noisy=(0, (0, 2), 0.004, 0.03))
    assert ask(found).best.name == "sure"
    assert ask(found, bound="mean").best.name == "noisy"
    assert "by the upper end of the 95% interval" in ask(found).verdict
    assert "by the mean" in ask(found, bound="mean").verdict
    # Exactly the budget is within it.
    assert ask(table(a=(0, (2,), 0.0075, 0.0025)), budget=0.01).best.name == "a"


def test_nothing_fits_is_an_answer_with_the_nearest(tmp_path):
    found = ask(table(far=(0, (0, 2), 0.2, 0.01), near=(0, (2,), 0.02, 0.005)), times=[])
    assert found.best is None
    assert found.times == ()
    assert found.verdict == (
        "nothing fits: no choice has ppl_final within 0.01 by the upper end of the 95% interval. The nearest is near "
        "with 0.02 [0.015, 0.025]"
    )
    with pytest.raises(ValueError, match="nothing fits"):
        found.save(tmp_path / "profile.json")
    assert list(tmp_path.iterdir()) == []


def test_more_layers_save_more_and_equal_savings_go_to_the_cheaper():
    found = ask(table(one=(0, (0,), 0.0, 0.0), two=(0, (0, 1), 0.001, 0.0), three=(0, (0, 1, 2), 0.002, 0.0)))
    assert [x.name for x in found.candidates] == ["three", "two", "one"]
    assert [x.saved_ms for x in found.candidates] == [23.0, 14.0, 9.0]
    assert "saves about 23 ms" in found.verdict
    assert ask(table(a=(0, (0,), 0.005, 0.0), b=(0, (2,), 0.001, 0.0))).best.name == "b"


def test_how_much_of_the_dense_time_is_saved_is_told_where_it_is_known():
    shapes = {i: calls for i, calls in SHAPES.items() if i != 4}
    rows = {"a": Record(Choice(GEOMETRIES[0], (3,)), **costs(0.0))}
    known = ask(evaluation(rows, shapes))
    assert known.dense_ms == 10 + 6 + 10 + 16
    assert "saves about 14 ms of 42 ms of attention in a prompt of 4,096 tokens" in known.verdict
    unknown = ask(table(a=(0, (3, 4), 0.0, 0.0)))
    assert unknown.dense_ms is None
    assert unknown.best.saved_ms == 14.0
    (longer, untimed) = unknown.notes
    assert longer == "the cost was measured with prompts of 2,048 to 2,048 tokens; it is not known at 4,096"
    assert untimed.startswith("layers [4] have a window of their own")
    assert (
        ask(
            evaluation(rows, shapes, dtype="float32"),
            tokens=2049,
            times=[dataclasses.replace(t, tokens=2049) for t in TIMES],
        )
        .notes[0]
        .endswith("not known at 2,049")
    )


# What comes out.


def test_the_code_runs_and_is_the_configuration():
    found = ask(table(a=(1, (2, 3), 0.0, 0.0)), min_seq_len=100)
    names = {"model": torch.nn.Linear(2, 2)}
    exec(found.code(), names)
    assert names["cfg"] == found.config
    assert names["cfg"] == TriangleMixConfig(8, 512, 128, triangle_layer_indices=(2, 3), min_seq_len=100)
    one = ask(table(a=(0, (2,), 0.0, 0.0)))
    exec(one.code(), names)
    assert names["cfg"].layers() == (2,)
    streamed = {"a": Record(Choice(GEOMETRIES[0], (2,), True), **costs(0.0))}
    text = ask(evaluation(streamed), streaming=True, metric="kl_following").code()
    with pytest.warns(UserWarning, match="streaming decode"):
        exec(text, names)


def test_a_profile_is_loaded_for_the_model_alone(tmp_path):
    model = tiny_qwen3(layers=2)
    rows = {"a": Record(Choice(GEOMETRIES[0], (1,)), **costs(0.002, 0.001))}
    found = evaluation(rows, {0: (WIDE,), 1: (WIDE,)})
    found = ask(dataclasses.replace(found, fingerprint=ModelFingerprint.of(model)), min_seq_len=1000)
    path = tmp_path / "profile.json"
    found.save(path)
    config = TriangleMixConfig.from_profile(path, num_layers=2, model=model)
    assert config == found.config
    assert config.min_seq_len == 1000
    with pytest.raises(ValueError, match="it is for other weights of the same architecture"):
        TriangleMixConfig.from_profile(path, num_layers=2, model=tiny_qwen3(layers=2, seed=1))
    with pytest.raises(ValueError, match="it is for a model of 2 layers"):
        TriangleMixConfig.from_profile(path, num_layers=3)
    about = json.loads(path.read_text(encoding="utf-8"))["advice"]
    assert about["costs"]["ppl_final"] == pytest.approx([0.002, 0.001, 0.003])
    assert (about["choice"], about["metric"], about["budget"], about["bound"]) == ("a", "ppl_final", 0.01, "upper")
    assert (about["saved_ms"], about["dense_ms"], about["tokens"]) == (9.0, 20.0, TOKENS)
    assert about["times"] == [TIMES[0].to_dict() | {"shape": dataclasses.asdict(WIDE)}]
    assert about["evaluated"]["versions"] == {"torch": "2"}
    assert about["decode"] == "dense"
    assert tmx_backend(config).config == config


# Times.


@pytest.fixture(scope="module")
def bench_file(tmp_path_factory):
    """What `tmx bench --out` writes, of a small layer."""
    heads = dict(heads=4, kv_heads=2, head_dim=16)
    plan = layer.Plan(
        "cpu",
        (300,),
        (Geometry(2, 6, 5), Geometry(4, 9, 5)),
        ("float32",),
        **heads,
        lowerings=("operator",),
        rounds=Rounds(0.0, 1, 1),
    )
    before = record.hardware()
    path = tmp_path_factory.mktemp("bench") / "layer.json"
    record.write(record.result("operator", "tmx bench", False, before, layer.measure(plan)), path)
    return path


def test_times_are_read_from_a_benchmark(bench_file, tmp_path):
    content = json.loads(bench_file.read_text(encoding="utf-8"))
    first, second = content["records"]
    # A second lowering, faster at one geometry and slower at the other; and one without a dense time.
    first["ms"], second["ms"] = 5.0, 7.0
    content["records"] += [first | {"lowering": "blocked", "ms": 4.0}, second | {"lowering": "blocked", "ms": 8.0}]
    content["records"].append(first | {"n": 9000, "dense_ms": None})
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(content))
    found = {t.geometry: t for t in read_times(path)}
    shape = AttentionShape(4, 2, 16, 16)
    machine = content["hardware"]["cpu"]
    assert found == {
        Geometry(2, 6, 5): LayerTime(
            shape, Geometry(2, 6, 5), 300, "float32", first["dense_ms"], 4.0, "blocked", machine
        ),
        (4, 9, 5): LayerTime(shape, (4, 9, 5), 300, "float32", second["dense_ms"], 7.0, "operator", machine),
    }
    for text in ("[]", "{", json.dumps(content | {"records": [{"n": 1}]}), json.dumps({"settings": {}})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"times must be a file of `tmx bench --out`, .*layer\.json is none"):
            read_times(path)


def test_times_are_measured_for_the_choices_that_fit_alone(monkeypatch):
    """On this machine, at a small size: no number is compared with a clock."""
    asked = []
    original = layer_times.measure

    def spy(plan, **kwargs):
        asked.append(plan)
        return original(plan, **kwargs)

    monkeypatch.setattr(layer_times, "measure", spy)
    shape = AttentionShape(2, 1, 16, 16)
    fits, not_fits = Choice(Geometry(2, 6, 5), (0, 1)), Choice(Geometry(2, 7, 5), (1,))
    rows = {"a": Record(fits, **costs(0.0)), "b": Record(not_fits, **costs(1.0))}
    found = advise(evaluation(rows, {0: (shape,), 1: (shape,)}), budget=0.1, tokens=300, min_seq_len=256, seconds=0.0)
    (plan,) = asked
    assert (plan.lengths, plan.geometries, plan.dtypes) == ((300,), (Geometry(2, 6, 5),), ("float32",))
    assert (plan.heads, plan.kv_heads, plan.head_dim) == (2, 1, 16)
    (time,) = found.times
    assert (time.shape, time.geometry, time.tokens, time.lowering) == (shape, Geometry(2, 6, 5), 300, "blocked")
    assert time.machine == record.hardware()["cpu"]
    assert found.candidates[0].saved_ms == pytest.approx(2 * (time.dense_ms - time.triangle_ms))
    assert found.dense_ms == pytest.approx(2 * time.dense_ms)


def test_where_auto_stays_dense_nothing_is_saved(monkeypatch):
    monkeypatch.setattr(layer_times, "auto_lowering", lambda *_: "dense")
    (time,) = measure_times(
        AttentionShape(2, 1, 16, 16), [Geometry(2, 6, 5)], tokens=300, dtype="float32", device="cpu", seconds=0.0
    )
    assert (time.lowering, time.saved_ms) == ("dense", 0.0)
    assert time.dense_ms > 0


def test_the_lowering_is_the_one_that_auto_takes():
    plan = layer.Plan("cpu", (400,), GEOMETRIES, ("float32",), 2, 1, 16)
    taken = [layer.auto_lowering(plan, 400, "float32", geometry) for geometry in GEOMETRIES]
    assert taken == ["blocked", "flex"]
    assert layer.auto_lowering(plan, 200, "float32", GEOMETRIES[0]) == "dense"
    backend = tmx_backend(TriangleMixConfig(*GEOMETRIES[0].counts, triangle_layer_indices=[0], min_seq_len=256))
    x = torch.randn(1, 2, 400, 16)
    with torch.no_grad():
        torch.compile(layer.Model(), backend=backend)(x, x[:, :1], x[:, :1])
    assert [site.lowering for site in backend.report] == taken[:1]


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "1"])
def test_a_time_is_a_positive_number(value):
    with pytest.raises(ValueError, match="triangle_ms must be a positive number of milliseconds, got"):
        time_of(WIDE, GEOMETRIES[0], 1.0, value)


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(budget=-0.1), "budget must be a finite number of at least 0, got -0.1"),
        (dict(budget=math.nan), "budget must be a finite number of at least 0, got nan"),
        (dict(budget="1"), "budget must be a finite number of at least 0, got '1'"),
        (dict(metric="loss"), "metric must be one of kl_final, kl_following, ppl_final, ppl_following, got 'loss'"),
        (dict(bound="lower"), "bound must be one of upper, mean, got 'lower'"),
        (dict(tokens=0), "tokens must be a positive integer, got 0"),
        (dict(tokens=2048), "tokens must be over min_seq_len=2048, up to which prompts stay dense, got 2048"),
        (dict(min_seq_len=-1), "min_seq_len must be a non-negative integer, got -1"),
        (dict(streaming=1), "streaming must be a bool, got 1"),
        (dict(streaming=True), "metric must be kl_following or ppl_following for streaming decode, got 'ppl_final'"),
        (
            dict(streaming=True, metric="kl_following"),
            "streaming must be what some choice was evaluated with, and none has streaming=True",
        ),
        (dict(device="cpu"), "device must not be given with times, which have their own, got 'cpu'"),
        (dict(times=None, device="tpu"), "device must be one of cpu, cuda, got 'tpu'"),
        (dict(times=None, dtype="float64"), "dtypes must be among float32, bfloat16, float16, got 'float64'"),
        (dict(times=None, tokens=200, min_seq_len=0), "lengths must be over 256 tokens, got 200"),
        (dict(times=None, seconds=-1), "seconds must be a finite number of at least 0, got -1"),
        (dict(tokens=5000), "times must hold 4 query and 4 key heads of 32, 4/32/64, 5000 tokens, float32; they hold"),
        (dict(dtype="bfloat16"), "times must hold 4 query and 4 key heads of 32, 4/32/64, 4096 tokens, bfloat16; they"),
        (dict(times=TIMES[2:]), "times must hold 8 query and 2 key heads of 64, 4/32/64, 4096 tokens, float32; they"),
        (
            dict(times=[]),
            "times must hold 4 query and 4 key heads of 32, 4/32/64, 4096 tokens, float32; they hold noth",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, changes, message):
    monkeypatch.setattr(layer_times, "measure", None)
    with pytest.raises(ValueError) as refused:
        ask(table(a=(0, (0, 1), 0.0, 0.0)), **changes)
    assert str(refused.value).startswith(message)


def test_an_evaluation_is_needed():
    with pytest.raises(ValueError, match="evaluation must be an Evaluation, got dict"):
        ask({})
    with pytest.raises(ValueError, match="shape must have full attention and one head dim to be timed"):
        measure_times(WINDOWED, GEOMETRIES, tokens=300, dtype="float32", device="cpu")
