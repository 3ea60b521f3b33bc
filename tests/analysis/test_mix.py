"""``mixes``: against brute force over all budgets, what it names, and what it refuses; the prices of dynamic layers."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmx_compile.analysis import Choice, DynamicLayers, Scores, ShareScores, mixes, read_scores
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.prices import prices
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.intervals import pair_counts

GEOMETRY, TOKENS, LAYERS = Geometry(8, 64, 16), 1000, 4
# The time is the density.
TIMES = DynamicTimes(
    "a GPU",
    "bfloat16",
    (
        {
            "tokens": TOKENS,
            "block": 64,
            "kernel": "triton",
            "select": {"pooled 16": 0.0},
            "density": [0.0, 1.0],
            "attend": [0.0, 1.0],
        },
    ),
)
costs = st.dictionaries(st.integers(0, LAYERS - 1), st.floats(0, 1).map(lambda x: round(x, 3)), min_size=1)
densities = st.lists(st.floats(0.05, 1.2).map(lambda x: round(x, 3)), min_size=LAYERS, max_size=LAYERS)


def scored(triangle, *shares):
    found = (ShareScores(share, costs, {i: density[i] for i in costs}) for share, costs, density in shares)
    return Scores(GEOMETRY, triangle, tuple(found), block=64)


def options(scores):
    """By layer, (cost, saved, what) of everything it can do."""
    attended, causal = pair_counts(GEOMETRY, TOKENS, TOKENS)
    found = {i: [(0.0, 0.0, None)] for i in range(LAYERS)}
    for i, cost in scores.triangle.items():
        found[i].append((cost, 1 - attended / causal, "triangle"))
    for x in scores.dynamic:
        for i, cost in x.divergence.items():
            found[i].append((cost, 1 - min(x.density[i], 1.0), x.share))
    return found


def what(choice, layer):
    if layer in choice.layers:
        return "triangle"
    return dict(zip(choice.dynamic.layers, choice.dynamic.shares, strict=True)).get(layer)


@settings(max_examples=60)
@given(costs, costs, densities, costs, densities)
def test_no_mix_saves_more_for_its_cost(triangle, first, dense_first, second, dense_second):
    scores = scored(triangle, (0.5, first, dense_first), (0.9, second, dense_second))
    found = mixes({"x": scores}, num_layers=LAYERS, counts=range(1, LAYERS + 1), tokens=TOKENS, times=TIMES)
    table = options(scores)
    every = [
        (*(math.fsum(x[k] for x in ways) for k in (0, 1)), sum(x[2] is not None for x in ways))
        for ways in itertools.product(*table.values())
    ]
    for name, choice in found.items():
        taken = [next(x for x in table[i] if x[2] == what(choice, i)) for i in range(LAYERS)]
        cost, saved = (math.fsum(x[k] for x in taken) for k in (0, 1))
        count = sum(x[2] is not None for x in taken)
        assert count == int(name.rsplit("/", 1)[1])
        assert all(x[1] > 0 for x in taken if x[2] is not None)
        # Brute force: none saves as much for less; and none of so few layers more for as little.
        assert not any(c < cost - 1e-9 and s >= saved - 1e-9 for c, s, _ in every)
        assert not any(c <= cost + 1e-9 and s > saved + 1e-9 and n <= count for c, s, n in every)


def test_a_layer_that_costs_too_much_comes_last():
    scores = scored({0: 0.4, 1: 0.3, 2: 0.0}, (0.9, {0: 0.5, 1: 0.001, 2: 0.02}, [0.3, 0.2, 0.3]))
    found = mixes({"mine": scores}, num_layers=3, counts=[1, 2], tokens=TOKENS, streaming=True, times=TIMES)
    both = Choice(GEOMETRY, (2,), dynamic=DynamicLayers((1,), (0.9,), block=64))
    assert found == {
        "mine/8-64-16/mix/1": Choice(GEOMETRY, (2,)),
        "mine/8-64-16/mix/1/streaming": Choice(GEOMETRY, (2,), True),
        "mine/8-64-16/mix/2": both,
        "mine/8-64-16/mix/2/streaming": Choice(GEOMETRY, (2,), True, both.dynamic),
    }
    # Nothing to mix: the rankings say it.
    assert mixes({"mine": Scores(GEOMETRY, {0: 0.4})}, num_layers=3, counts=[1], tokens=TOKENS) == {}


def test_the_groups_of_an_estimate_stay_with_it():
    scores = replace(scored({0: 0.4}, (0.9, {0: 0.001}, [0.3])), group=32)
    (choice,) = mixes({"mine": scores}, num_layers=1, counts=[1], tokens=TOKENS, times=TIMES).values()
    config = choice.config()
    assert (config.dynamic_group, Choice.of(config)) == (32, choice)


def test_refused():
    scores = {"mine": scored({5: 0.0}, (0.9, {5: 0.1}, [0.3] * 6))}
    with pytest.raises(ValueError, match="triangle_layer_indices must be less than num_layers=3, got 5"):
        mixes(scores, num_layers=3, counts=[1], tokens=TOKENS)
    with pytest.raises(ValueError, match="counts must not be empty"):
        mixes(scores, num_layers=6, counts=[], tokens=TOKENS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "best"}, "method must be one of pooled, antidiagonal, sampled, got 'best'"),
        ({"block": 7}, "block must be one of 16, 32, 64, 128, got 7"),
        ({"group": 128}, "group must be one of 16, 32, 64 in blocks of 64, got 128"),
        ({"shares": [{"share": 0.5}]}, "it lacks 'divergence'"),
        ({"shares": [{"share": 2, "divergence": {}, "density": {}}]}, "share must be above 0 and at most 1, got 2"),
        ({"shares": [{"share": 0.5, "divergence": {"1": 0}, "density": {}}]}, "must be of the same layers"),
        ({"shares": 3}, "is not iterable"),
    ],
)
def test_scores_that_are_none(tmp_path, changes, words):
    path = tmp_path / "profile.json"
    TriangleMixConfig(triangle_layer_indices=[1]).to_profile(path, num_layers=2)
    assert read_scores(path, num_layers=2) is None
    section = {"method": "pooled", "block": 64, "shares": []} | changes
    calibration = {"scores": {"divergence": {"0": 0.1}}, "dynamic": section}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": calibration}))
    with pytest.raises(ValueError, match=f"cannot use profile .*: calibration of dynamic layers: .*{words}"):
        read_scores(path, num_layers=2)


def test_prices_are_those_of_their_sources():
    found = prices()["dynamic"]
    sources = {name: json.loads(Path(path).read_text()) for name, path in found["sources"].items()}
    assert {x["hardware"]["gpu"] for x in sources.values()} == {found["machine"]}
    attended = {("triton", r["n"], r["block"], r["density"]): r["attend_ms"] / r["dense_ms"]
                for r in sources["triton"]["records"]}  # fmt: skip
    for r in sources["fa4"]["records"]:
        if r["kernel"] == "fa4":
            sdpa_ms = min(ms for name, ms in r["all_dense_ms"].items() if name != "fa4")
            attended["fa4", r["n"], 128, r["density"]] = r["ms"] / sdpa_ms
    seen = 0
    for row in found["times"]:
        chosen = {f"{r['method']} {r['group']}": r["ms"] / r["sdpa_ms"] for r in sources["select"]["records"]
                  if (r["n"], r["block"], r["tile"]) == (row["tokens"], row["block"], None)}  # fmt: skip
        # A length whose choosing was not measured alone has it from beside the attention.
        if not chosen:
            layer = next(
                r for r in sources["triton"]["records"] if (r["n"], r["block"]) == (row["tokens"], row["block"])
            )
            chosen = {way: layer["select_ms"][way] / layer["dense_ms"] for way in ("pooled 16", "antidiagonal 16")}
            for r in sources["fa4"]["records"] if row["block"] == 128 else ():
                if r["n"] == row["tokens"] and "select_ms" in r:
                    sdpa_ms = min(ms for name, ms in r["all_dense_ms"].items() if name != "fa4")
                    chosen["sampled 32"] = r["select_ms"] / sdpa_ms
        assert row["select"] == {way: pytest.approx(share, abs=1e-3) for way, share in chosen.items()}
        points = {
            key[3]: share for key, share in attended.items() if key[:3] == (row["kernel"], row["tokens"], row["block"])
        }
        assert row["density"] == pytest.approx(sorted(points), abs=1e-3)
        assert row["attend"] == pytest.approx([points[x] for x in sorted(points)], abs=1e-3)
        seen += len(points)
    assert seen == len(attended)


def test_between_and_beyond_what_was_measured():
    times = DynamicTimes.measured()
    at = [times.of_dense(tokens, "pooled", 16, 128, 0.25) for tokens in (32768, 65536, 131072)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2)
    assert times.of_dense(65536, "pooled", 16, 128, 0.01) == times.of_dense(65536, "pooled", 16, 128, 0.1) < at[1]
    for tokens, block in ((32767, 128), (131073, 128), (65536, 32)):
        assert times.of_dense(tokens, "pooled", 16, block, 0.25) is None
