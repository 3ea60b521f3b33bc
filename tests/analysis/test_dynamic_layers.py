"""Dynamic layers measured and chosen: on a model whose layers are known, and against the attention implementation."""

import copy
import json

import pytest
import torch

from tests.support.lookup import Lookup, prompts
from tests.support.models import tiny_qwen3
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import (
    CapturedModel,
    Choice,
    Continued,
    DynamicLayers,
    Evaluation,
    Inputs,
    advise,
    compare,
    evaluate,
    mixes,
    read_scores,
)
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.bench.layer_times import LayerTime
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection

N, FIRST, SECOND = 240, 50, 180
GEOMETRY = Geometry(2, 6, 5)
CONFIG = TriangleMixConfig(*GEOMETRY.counts, dynamic_block=16)
HALF = Selection("sampled", 0.5, 16, 16, 2, 5)
# One key, and one of everything else.
TIMES = DynamicTimes(
    "a GPU",
    "float32",
    (
        {
            "tokens": 4096,
            "block": 16,
            "kernel": "triton",
            "select": {"sampled 16": 0.05},
            "density": [0.1, 1.0],
            "attend": [0.1, 1.0],
        },
    ),
)


def run(model, given, **kwargs):
    settings = {"config": CONFIG, "estimator": "direct", "greedy": 0, "shares": [0.5], "progress": False}
    return calibrate(model, given, **(settings | kwargs))


def of(*layers, shares=None, triangle=()):
    return Choice(GEOMETRY, triangle, dynamic=DynamicLayers(layers, shares or (0.5,) * len(layers), "sampled", 16))


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibrated") / "mine.json"
    run(Lookup(), list(prompts(2, N, FIRST, SECOND)[:, None])).to_profile(path, 1)
    return path


def test_calibrate_knows_which_layer_gives_its_blocks_away(profile):
    scores = read_scores(profile, num_layers=3, model=Lookup())
    (half,) = scores.dynamic
    assert half.divergence[0] > 0.05 > 1e-6 > half.divergence[1]
    assert half.divergence[2] < 1e-6
    assert half.ranking[-1] == 0
    # Rows see their own block, the one before, that of the sinks and that of the key; the last rows see all.
    rows = torch.arange(15)
    kept = (rows >= 0).int() + (rows >= 1) + (rows >= 2) + (rows >= FIRST // 16 + 2)
    kept[-1] = 15
    assert half.density[1] == pytest.approx(float(kept.sum()) / 120, rel=1e-4)
    # As triangle layers, layers 0 and 1 are both needed.
    assert scores.triangle[0] > 0.05 < scores.triangle[1]
    assert scores.triangle[2] < 1e-6


def test_each_layer_gets_what_it_can_be(profile, tmp_path):
    scores = {"mine": read_scores(profile, num_layers=3)}
    choices = mixes(scores, num_layers=3, counts=[1, 2, 3], tokens=4096, times=TIMES)
    assert choices["mine/2-6-5/mix/1"] == Choice(GEOMETRY, (2,))
    assert choices["mine/2-6-5/mix/2"] == of(1, triangle=(2,))
    choices["too much"] = of(0, 1, shares=(0.5, 0.6), triangle=(2,))
    model = Lookup()
    found = evaluate(
        model, list(prompts(3, N + 10, FIRST, SECOND, seed=7)), choices, final=4, following=10, progress=False
    )
    assert found.records["mine/2-6-5/mix/2"].kl_final.upper < 1e-3
    assert found.records["too much"].kl_final.lower > 0.05
    assert all(0.3 < x.lower <= x.upper < 0.6 for x in found.records["mine/2-6-5/mix/2"].densities)

    # As a file.
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found

    (shape,) = found.shapes[0]
    times = [LayerTime(shape, GEOMETRY, 4096, "float32", 10.0, 1.0, "triton", "NVIDIA test")]
    advice = advise(found, budget=0.01, metric="kl_final", tokens=4096, times=times, dynamic=TIMES)
    assert advice.best.name == "mine/2-6-5/mix/2"
    (density,) = advice.best.record.densities
    # A line from the price of one density to that of the other.
    assert advice.best.saved_ms == pytest.approx(9.0 + 10.0 * (1 - 0.05 - density.upper))
    assert "on a GPU in float32" in advice.notes[-1]
    advice.save(tmp_path / "profile.json")
    saved = TriangleMixConfig.from_profile(tmp_path / "profile.json", num_layers=3, model=model)
    assert (saved.layers(), saved.dynamic_layers(), saved.dynamic_share, saved.dynamic_block) == ((2,), (1,), 0.5, 16)
    assert saved == advice.config
    assert json.loads((tmp_path / "profile.json").read_text())["advice"]["densities"] == [density.as_list()]
    names = {"model": model}
    exec(advice.code(), names)
    assert names["cfg"] == saved

    # No price: on a CPU, and at a length that was not measured.
    for machine, tokens in (("some processor", 4096), ("NVIDIA test", 8192)):
        slow = [LayerTime(shape, GEOMETRY, tokens, "float32", 10.0, 1.0, "triton", machine)]
        advice = advise(found, budget=0.01, metric="kl_final", tokens=tokens, times=slow, dynamic=TIMES)
        assert {x.saved_ms for x in advice.candidates if x.fits} == {9.0}
        assert "dynamic layers count as saving nothing" in advice.notes[-1]


def test_costs_are_those_of_the_attention_implementation():
    """What a user runs, with a share for each layer, against dense attention."""
    model, final, following = tiny_qwen3(layers=3, initializer_range=0.2), 7, 12
    choice = of(0, 1, shares=(0.3, 0.6), triangle=(2,))
    given = torch.randint(0, 128, (2, N + following), generator=torch.Generator().manual_seed(3))
    record = evaluate(model, given, {"it": choice}, final=final, following=following, progress=False).records["it"]
    deployed = copy.deepcopy(model)
    want, densities = [], []
    with torch.no_grad():
        for ids in given:
            prompt = ids[None, :N]
            deployed.set_attn_implementation("sdpa")
            dense = deployed(prompt, use_cache=False).logits[0, -final - 1 : -1].double().log_softmax(-1)
            attention = register_attention(choice.config().replace(min_seq_len=0), name="deployed")
            deployed.set_attn_implementation("deployed")
            sparse = deployed(prompt, use_cache=False).logits[0, -final - 1 : -1].double().log_softmax(-1)
            want.append(float((dense.exp() * (dense - sparse)).sum(-1).mean()))
            densities.append([attention.report.density(site) for site in attention.report][:2])
    assert record.kl_final.mean == pytest.approx(sum(want) / 2, rel=1e-3)
    assert record.kl_final.mean > 1e-3
    # The evaluated sequence is longer by what follows, dense rows: 17 blocks of 16 in place of 15.
    for layer, found in enumerate(record.densities):
        mean = sum(x[layer] for x in densities) / 2
        assert mean < found.mean < mean + 0.15


def test_a_run_begins_at_the_first_change():
    captured = CapturedModel(Lookup(), CONFIG)
    inputs = Inputs(kwargs={"input_ids": prompts(1, N, FIRST, SECOND)})
    with torch.no_grad():
        _, trace = captured.trace(inputs)
        whole = captured.run(inputs, (2,), {1: HALF}).logits
        assert captured.densities.keys() == {1}
        again = captured.rerun(trace, (2,), {1: HALF}).logits
        torch.testing.assert_close(again, whole)
        assert captured.shapes.keys() == {1, 2}
        _, of_one = captured.trace(inputs, (), dynamic={1: HALF})
        other = captured.rerun(of_one, (), {1: Selection("sampled", 1.0, 16, 16, 2, 5)}).logits
    torch.testing.assert_close(other, captured.run(inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": [0.5], "estimator": "gradient"}, "shares must be given with estimator='direct', .* got 'gradient'"),
        ({"shares": 0.5}, "shares must be a list of numbers, got 0.5"),
        ({"shares": [0.5, 1.5]}, r"shares\[1\] must be above 0 and at most 1, got 1.5"),
        ({"shares": [0.5, 0.5]}, r"shares must differ, got \[0.5, 0.5\]"),
    ],
)
def test_shares_that_calibrate_refuses(changes, words):
    with pytest.raises(ValueError, match=words):
        run(None, [], **changes)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (of(0, shares=(0.5, 0.6)), "dynamic_share must be a number, or one for each of the 1 layers"),
        (of(0, shares=(1.5,)), r"is no choice: dynamic_share\[0\] must be above 0 and at most 1, got 1.5"),
        (of(2, triangle=(2,)), "dynamic_layer_indices must name no triangle layer, got 2"),
        (of(0, 7), r"choices\['it'\] must have layers whose attention can go sparse, \[0, 1, 2\], got \[7\]"),
        (of(), "must have at least one sparse layer, got none"),
    ],
)
def test_choices_that_evaluate_refuses(choice, words):
    with pytest.raises(ValueError, match=words):
        evaluate(Lookup(), list(prompts(2, 60, 5, 30)), {"it": choice}, final=5, following=5, progress=False)


def test_a_window_of_the_layers_own_is_refused():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 30}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    captured = CapturedModel(model, TriangleMixConfig(0, 0, 0))
    inputs = Inputs(kwargs={"input_ids": torch.randint(0, 64, (1, 100)), "use_cache": False})
    captured.run(inputs)
    assert (captured.layers, captured.dynamic_layers) == ((0, 1), ())
    with pytest.raises(ValueError, match="dynamic must not name layer 1, which has a sliding window of its own"):
        captured.run(inputs, (), {1: HALF})
    given = torch.randint(0, 64, (2, 100))
    with pytest.raises(ValueError, match=r"must have no dynamic layers with a window of their own, got \[1\]"):
        evaluate(model, given, {"it": of(1)}, final=5, following=5, progress=False)
    with pytest.raises(ValueError, match=r"dynamic must name no layer of sparse, got \[1\]"):
        captured.run(inputs, {1}, {1: HALF})


def test_a_continued_conversation_has_no_dynamic_layers():
    captured = CapturedModel(Lookup(), CONFIG)
    choice = Continued(GEOMETRY, (), dynamic=DynamicLayers((1,), (0.5,)), turn=20)
    with pytest.raises(ValueError, match=r"dynamic must name no layer in a continued conversation, got \[1\]"):
        next(compare(captured, prompts(1, N, FIRST, SECOND), [choice], final=5, following=5))
