"""``evaluate``: its numbers against an oracle with masks written out, what it resumes, saves and refuses."""

import copy
import json
import math
import statistics

import pytest
import torch

from tests.support.models import tiny_qwen3
from tests.support.oracle import attended
from tests.support.runs import Runs
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import Choice, Evaluation, candidates, evaluate, read_ranking
from tmx_compile.analysis.judge.evaluation import METRICS
from tmx_compile.analysis.judge.intervals import interval
from tmx_compile.bench.layer_times import AttentionShape
from tmx_compile.mask.geometry import Geometry

LAYERS, N, FINAL, FOLLOWING, WORDS = 3, 90, 7, 12, 6
GEOMETRY = Geometry(2, 6, 5)
DEEP, ALL = Choice(GEOMETRY, (1, 2)), Choice(Geometry(0, 3, 9), (0, 1, 2))
STREAMED = Choice(GEOMETRY, (1, 2), streaming=True)
CHOICES = {"deep": DEEP, "all": ALL, "streamed": STREAMED}


def model(seed=0):
    # A few words: some of those that follow are the most likely ones.
    return tiny_qwen3(layers=LAYERS, seed=seed, initializer_range=0.2, vocab_size=WORDS)


def prompts(count=3, n=N, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, WORDS, (1, n + FOLLOWING), generator=generator) for _ in range(count)]


def run(*args, **kwargs):
    return evaluate(*args, **({"final": FINAL, "following": FOLLOWING, "progress": False} | kwargs))


def choice_masks(choice, total):
    """(dense, sparse), (N + T, N + T) bool: the prompt's triangle, then decode steps, from the definition."""
    dense = attended(total, total, None, 0, 0, total)[0]
    n = total - FOLLOWING
    sparse = dense.clone()
    sparse[:n, :n] = attended(n, n, None, *choice.geometry.counts)[0]
    if choice.streaming:
        sparse[n:] = attended(total, total, None, *choice.geometry.counts[:2], 0)[0, n:]
    return dense, sparse


@torch.no_grad()
def log_probs(module, ids, choice):
    """(N + T, V) in float64 with every mask written out; nothing of the package takes part."""
    module = copy.deepcopy(module).double()
    dense, sparse = choice_masks(choice, ids.shape[1])
    zero = torch.zeros((), dtype=torch.float64)

    def hook(index):
        def before(_, args, kwargs):
            mask = sparse if index in choice.layers else dense
            return args, kwargs | {"attention_mask": torch.where(mask, zero, float("-inf"))[None, None]}

        return before

    for index, layer in enumerate(module.model.layers):
        layer.self_attn.register_forward_pre_hook(hook(index), with_kwargs=True)
    return module(ids, use_cache=False).logits[0].log_softmax(-1)


def expected(module, given, choice):
    """By metric, the value of every prompt (differences of log-likelihoods for perplexities), and dense ones."""
    found = {name: [] for name in (*METRICS, "right", "nll_final", "nll_following")}
    for ids in given:
        dense, sparse = (log_probs(module, ids, x) for x in (Choice(GEOMETRY, ()), choice))
        n = ids.shape[1] - FOLLOWING
        places = {"final": slice(n - FINAL - 1, n - 1), "following": slice(n - 1, n + FOLLOWING - 1)}
        for name, rows in places.items():
            targets = ids[0, rows.start + 1 : rows.stop + 1, None]
            found[f"kl_{name}"].append(float((dense[rows].exp() * (dense[rows] - sparse[rows])).sum(-1).mean()))
            nll = [-float(x[rows].gather(1, targets).mean()) for x in (dense, sparse)]
            found[f"ppl_{name}"].append(nll[1] - nll[0])
            found[f"nll_{name}"].append(nll[0])
        right = [(x[rows].argmax(-1) == targets[:, 0]).double().mean() for x in (dense, sparse)]
        found["right"].append(float(right[1] - right[0]))
    return found


@pytest.fixture(scope="module")
def measured():
    return run(model(), prompts(), CHOICES)


@pytest.mark.parametrize("name", CHOICES)
def test_costs_are_those_of_masks_written_out(measured, name):
    record, want = measured.records[name], expected(model(), prompts(), CHOICES[name])
    assert record.choice == CHOICES[name]
    for metric in METRICS:
        found = record.cost(metric)
        assert found.as_list() == pytest.approx(
            interval(want[metric], exponent=metric.startswith("ppl")).as_list(), rel=2e-3, abs=2e-6
        )
        assert found.lower < found.upper
    # Shares are of float32 numbers.
    assert record.right.as_list() == pytest.approx(interval(want["right"]).as_list(), abs=1e-6)
    assert measured.dense["right"] > 0.05
    for part in ("final", "following"):
        assert measured.dense[f"ppl_{part}"] == pytest.approx(math.exp(statistics.fmean(want[f"nll_{part}"])), rel=1e-4)
    assert record.kl_final.mean > 1e-5
    assert record.kl_following.mean > 1e-5


def test_streaming_is_paid_after_the_prompt_alone(measured):
    deep, streamed = measured.records["deep"], measured.records["streamed"]
    assert streamed.kl_final.as_list() == pytest.approx(deep.kl_final.as_list(), rel=1e-3)
    assert streamed.kl_following.mean > 1.5 * deep.kl_following.mean


def test_what_it_says_of_the_model_and_the_prompts(measured):
    assert (measured.num_layers, measured.dtype, measured.device) == (LAYERS, "float32", "cpu")
    assert measured.shapes == dict.fromkeys(range(LAYERS), (AttentionShape(4, 2, 16, 16),))
    assert (measured.tokens, measured.prompts) == ((N, N), 3)
    assert (measured.final, measured.following) == (FINAL, FOLLOWING)
    assert {"torch", "tmx_compile"} <= measured.about["versions"].keys()
    mixed = run(model(), [*prompts(1), *prompts(1, n=70)], {"deep": DEEP})
    assert mixed.tokens == (70, N)
    # One sequence by itself, without its batch dimension, is the same prompt.
    (ids, other) = prompts(2)
    assert run(model(), [ids[0], other], {"deep": DEEP}).records == run(model(), [ids, other], {"deep": DEEP}).records


def test_a_layers_own_window_is_told():
    windowed = tiny_qwen3(layers=2, use_sliding_window=True, sliding_window=30, max_window_layers=1, layer_types=None)
    kinds = windowed.config.layer_types
    assert kinds == ["full_attention", "sliding_attention"]
    found = run(windowed, prompts(2), {"one": Choice(GEOMETRY, (1,))})
    assert found.shapes[0] == (AttentionShape(4, 2, 16, 16),)
    assert found.shapes[1] == (AttentionShape(4, 2, 16, 16, reach=29),)
    assert not found.shapes[1][0].can_be_timed


# Its file.


def test_a_saved_evaluation_is_loaded_as_it_was(measured, tmp_path):
    path = tmp_path / "evaluation.json"
    measured.save(path)
    assert Evaluation.load(path) == measured
    assert path.stat().st_size < 6000
    json.loads(path.read_text(encoding="utf-8"))


def _without(name):
    return lambda data: data.pop(name)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda data: data.update(format="other"), "format must be 'tmx-evaluation-1', got 'other'"),
        (_without("records"), "it lacks 'records'"),
        (_without("attention"), "it lacks 'attention'"),
        (lambda data: data["attention"].clear(), r"records have layers \[0, 1, 2\], of which nothing is said"),
        (
            lambda data: data["records"]["deep"].update(layers=[3]),
            "triangle_layer_indices must be less than num_layers=3",
        ),
        (lambda data: data["records"]["deep"].update(streaming=1), "streaming must be a bool, got 1"),
        (lambda data: data["records"]["deep"].update(kl_final=[1, 2, 3]), "kl_final must be mean, lower and upper end"),
        (lambda data: data["model"].update(fingerprint={}), "fingerprint must hold structure and weights"),
        (lambda data: data.update(prompts=0), "prompts must be a positive integer, got 0"),
    ],
)
def test_a_file_that_is_none_is_refused(measured, tmp_path, break_it, message):
    path = tmp_path / "evaluation.json"
    measured.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    break_it(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"cannot use evaluation .*evaluation\.json: .*{message}"):
        Evaluation.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot use evaluation"):
        Evaluation.load(path)


# Going on.


def test_an_interrupted_evaluation_goes_on(monkeypatch, tmp_path, measured):
    path = tmp_path / "journal"
    with monkeypatch.context() as patch:
        Runs(patch, most=7)
        with pytest.raises(KeyboardInterrupt):
            run(model(), prompts(), CHOICES, resume=path)
    with monkeypatch.context() as patch:
        runs = Runs(patch)
        resumed = run(model(), prompts(), CHOICES, resume=path)
    # The first run, then dense and three choices for the first prompt, and two runs of the second are known.
    assert runs.count == (1 + 2) + (1 + 3)
    with monkeypatch.context() as patch:
        runs = Runs(patch)
        known = run(model(), prompts(), CHOICES, resume=path)
        assert runs.count == 0
        more = run(model(), prompts(), CHOICES | {"one": Choice(GEOMETRY, (2,))}, resume=path)
        assert runs.count == 3 * 2
    for found in (resumed, known):
        assert found.records == measured.records
        assert found.dense == measured.dense
        assert found.shapes == measured.shapes
    assert {name: more.records[name] for name in CHOICES} == measured.records
    with pytest.raises(ValueError, match=r"resume file .*journal has final=7, this evaluation 6"):
        run(model(), prompts(), CHOICES, resume=path, final=6)
    with pytest.raises(ValueError, match=r"resume file .*journal has model="):
        run(model(seed=1), prompts(), CHOICES, resume=path)
    (tmp_path / "text").write_text("once upon a time\n")
    with pytest.raises(ValueError, match=r"resume must be a file that an evaluation wrote, .*text is none"):
        run(model(), prompts(), CHOICES, resume=tmp_path / "text")


# Choices.


def test_candidates_are_rankings_and_the_deepest_without_repetition():
    found = candidates(
        {"mine": (1, 3, 2, 0)}, num_layers=4, geometries=[Geometry(1, 2, 3), Geometry(4, 5, 6)], counts=[1, 3]
    )
    assert found == {
        "deepest/1-2-3/1": Choice(Geometry(1, 2, 3), (3,)),
        "deepest/1-2-3/3": Choice(Geometry(1, 2, 3), (1, 2, 3)),
        "deepest/4-5-6/1": Choice(Geometry(4, 5, 6), (3,)),
        "deepest/4-5-6/3": Choice(Geometry(4, 5, 6), (1, 2, 3)),
        # Its first three are the deepest three.
        "mine/1-2-3/1": Choice(Geometry(1, 2, 3), (1,)),
        "mine/4-5-6/1": Choice(Geometry(4, 5, 6), (1,)),
    }
    both = candidates({}, num_layers=4, geometries=[Geometry(1, 2, 3)], counts=[2], streaming=True)
    assert both == {
        "deepest/1-2-3/2": Choice(Geometry(1, 2, 3), (2, 3)),
        "deepest/1-2-3/2/streaming": Choice(Geometry(1, 2, 3), (2, 3), True),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(geometries=[]), "geometries must not be empty"),
        (dict(counts=[]), "counts must not be empty"),
        (dict(counts=[0]), "counts must be a positive integer, got 0"),
        (dict(counts=[5]), "counts must be at most the 4 layers that the model has, got 5"),
        (dict(counts=[3]), "counts must be at most the 2 layers that mine ranks, got 3"),
        (dict(geometries=[Geometry(1, -2, 3)]), "sliding_window_size must be a non-negative integer, got -2"),
        (dict(rankings={"mine": (4, 0)}), "triangle_layer_indices must be less than num_layers=4, got 4"),
        (dict(rankings={"deepest": (0, 1)}), "rankings must not be called 'deepest'"),
    ],
)
def test_bad_candidates_are_refused(changes, message):
    given = {"rankings": {"mine": (2, 0)}, "num_layers": 4, "geometries": [Geometry(1, 2, 3)], "counts": [1]} | changes
    with pytest.raises(ValueError, match=message):
        candidates(given.pop("rankings"), **given)


def test_a_ranking_is_read_from_a_profile_of_the_model_alone(tmp_path):
    config = TriangleMixConfig(*GEOMETRY.counts)
    found = calibrate(model(), [ids[:, :N] for ids in prompts(1)], config=config, progress=False)
    path = tmp_path / "profile.json"
    found.to_profile(path, 1)
    assert read_ranking(path, num_layers=LAYERS, model=model()) == found.ranking
    with pytest.raises(ValueError, match="it is for other weights of the same architecture"):
        read_ranking(path, num_layers=LAYERS, model=model(seed=1))
    content = json.loads(path.read_text())
    for ranking, message in (([0, 7], "must be less than num_layers=3, got 7"), (None, "ranking must be a list")):
        path.write_text(json.dumps(content | {"ranking": ranking}))
        with pytest.raises(ValueError, match=message):
            read_ranking(path, num_layers=LAYERS, model=model())


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final": 0}, "final must be a positive integer, got 0"),
        ({"following": 0}, "following must be a positive integer, got 0"),
        ({"choices": {}}, "choices must be a mapping of names to Choice with at least one, got {}"),
        ({"choices": {"a": 3}}, "choices must be a mapping of names to Choice, got 'a': 3"),
        ({"choices": {"a": Choice(Geometry(1, 2, -3), (0,))}}, "choices['a'] is no choice: num_last_tokens must be"),
        (
            {"choices": {"a": Choice(Geometry(1, 2, 3), (0, 0))}},
            "choices['a'] is no choice: triangle_layer_indices must not rep",
        ),
        (
            {"choices": {"a": Choice(Geometry(1, 2, 3), ())}},
            "choices['a'] must have at least one sparse layer, got none",
        ),
        ({"prompts": prompts(1)}, "prompts must be at least 2, or intervals say nothing, got 1"),
        ({"prompts": ["text"]}, "prompts[0] must be a tensor of int64 token ids, got str"),
        ({"prompts": [torch.ones(1, 99)]}, "prompts[0] must be a tensor of int64 token ids, got torch.float32"),
        (
            {"prompts": [*prompts(1), prompts(1)[0][:, : FINAL + FOLLOWING]]},
            "prompts[1] must be one sequence of more than the 19 tokens that are compared, got (1, 19)",
        ),
        ({"prompts": [torch.cat(prompts(2))]}, "prompts[0] must be one sequence of more than the 19 tokens"),
        ({"prompts": prompts(1)[0][0]}, "prompts must be a sequence of token ids, got a tensor of shape (102,)"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, changes, message):
    Runs(monkeypatch, most=0)
    given = {"prompts": prompts(), "choices": CHOICES} | changes
    with pytest.raises(ValueError) as refused:
        run(model(), given.pop("prompts"), given.pop("choices"), **given)
    assert str(refused.value).startswith(message)


def test_layers_that_the_model_lacks_are_refused_after_one_run(monkeypatch):
    runs = Runs(monkeypatch)
    with pytest.raises(ValueError, match=r"choices\['a'\] must have layers whose attention can go sparse, \[0, 1, 2\]"):
        run(model(), prompts(), {"deep": DEEP, "a": Choice(GEOMETRY, (2, 3))})
    assert runs.count == 1
    with pytest.raises(ValueError, match=r"metric must be one of .*, got 'loss'"):
        run(model(), prompts(2), {"deep": DEEP}).records["deep"].cost("loss")


def test_a_choice_has_a_geometry():
    with pytest.raises(ValueError, match=r"geometry must be a tmx_compile.mask.Geometry, got \(1, 2, 3\)"):
        Choice((1, 2, 3), (0,))
