"""``calibrate``: what it records, resumes, saves and refuses."""

import itertools
import json
import statistics
import warnings

import pytest
import torch

from tests.support.gates import Decoder, GatedModel, middle_mask, one_gate
from tests.support.runs import Runs
from tmx_compile import TriangleMixConfig, TriangleMixInferenceConfig, calibrate, tmx_backend
from tmx_compile.analysis import Inputs, Sample
from tmx_compile.analysis.capture.samples import final_logits, samples_of
from tmx_compile.analysis.choose.direct import DirectMeasurement

N, LAYERS, HEADS = 48, 3, 4
GEOMETRY = (2, 6, 5)
CONFIG = TriangleMixConfig(*GEOMETRY)


def model(seed=0):
    return Decoder(layers=LAYERS, seed=seed)


def batches(count=3, batch=1, n=N):
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(0, 128, (batch, n + 1), generator=generator) for _ in range(count)]
    return [({"ids": x[:, :-1].clone()}, x[:, -1].clone()) for x in ids]


def run(*args, **kwargs):
    return calibrate(*args, **({"config": CONFIG, "progress": False} | kwargs))


# The gradient estimator.


def test_scores_are_means_over_the_middle_section_heads_and_sequences():
    given = batches(count=2, batch=2)
    found = run(model(), given, measure="signed")
    oracle = GatedModel(model(), N, renormalized=False)
    middle = middle_mask(N, GEOMETRY)
    expected = {layer: {"signed": [], "absolute": []} for layer in range(LAYERS)}
    for inputs, answers in given:
        for ids, answer in zip(inputs["ids"], answers, strict=True):
            gates = {i: torch.ones(1, HEADS, N, N, dtype=torch.float64, requires_grad=True) for i in range(LAYERS)}
            logit = oracle.logits(ids[None], gates)[0, -1, answer]
            for layer, grad in enumerate(torch.autograd.grad(logit, list(gates.values()))):
                inside = grad[middle.expand_as(grad)]
                expected[layer]["signed"].append(abs(float(inside.mean())))
                expected[layer]["absolute"].append(float(inside.abs().mean()))
    for layer, measures in expected.items():
        for name, values in measures.items():
            assert found.scores[name][layer] == pytest.approx(statistics.mean(values), rel=1e-5, abs=1e-12)
        assert found.analyzer.middle_qk_gradients[layer] == pytest.approx(measures["signed"], rel=1e-5, abs=1e-12)
    # The last layer computes nothing for the answer before the last rows.
    assert found.ranking[0] == LAYERS - 1
    assert found.scores["absolute"][LAYERS - 1] == 0.0
    by_score = sorted(range(LAYERS), key=lambda layer: (found.scores["signed"][layer], -layer))
    assert found.ranking == tuple(by_score)
    for n in range(LAYERS + 1):
        assert list(found.layers(n)) == found.analyzer.get_triangle_layers(n) == sorted(by_score[:n])
    assert len(found.gradients) == 4


def test_the_measure_that_ranks_can_be_chosen():
    for measure in ("signed", "absolute", "renormalized", "renormalized_absolute"):
        found = run(model(), batches(), measure=measure)
        scores = found.scores[measure]
        assert [scores[layer] for layer in found.ranking] == sorted(scores.values())
        assert statistics.mean(found.analyzer.middle_qk_gradients[0]) == pytest.approx(scores[0])


def test_without_an_answer_the_most_likely_token_counts():
    (inputs, _), *_ = batches(1)
    with torch.no_grad():
        likely = model()(**inputs)[:, -1].argmax(-1)
    ((_, other),) = batches(1)
    assert int(other) != int(likely)
    guessed, told, wrong = (run(model(), [given]).scores for given in (inputs, (inputs, likely), (inputs, other)))
    assert guessed == told != wrong


@pytest.mark.parametrize("form", ["tensor", "pair", "mapping", "sample"])
def test_forms_of_a_batch(form):
    (inputs, answer), *_ = batches(1)
    ids = inputs["ids"]
    given = {
        "tensor": ids,
        "pair": (ids, answer),
        "mapping": {"ids": ids},
        "sample": Sample(Inputs((ids,)), answer),
    }[form]
    assert set(run(model(), iter([given])).ranking) == set(range(LAYERS))


# The direct estimator.


def kl(dense, sparse, positions):
    dense, sparse = (x[:, -positions:].log_softmax(-1) for x in (dense, sparse))
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


@torch.no_grad()
def divergences(given, positions):
    """KL of every set of layers, by an oracle that takes nothing from the package."""
    oracle, middle, found = GatedModel(model(), N, renormalized=True), middle_mask(N, GEOMETRY), {}
    for size in range(LAYERS + 1):
        for layers in itertools.combinations(range(LAYERS), size):
            values = []
            for inputs, _ in given:
                # Nothing of the Middle section in some layers, and the rows normalised again.
                gates = dict.fromkeys(layers, one_gate(0.0, middle, HEADS))
                dense, sparse = (oracle.logits(inputs["ids"], x) for x in ({}, gates))
                values.append(kl(dense, sparse, positions))
            found[layers] = statistics.mean(values)
    return found


def test_divergences_and_the_greedy_choice_are_those_of_an_oracle():
    given, positions = batches(2), 4
    expected = divergences(given, positions)
    found = run(model(), given, estimator="direct", positions=positions, greedy=LAYERS, shortlist=LAYERS)
    for layer in range(LAYERS):
        assert found.scores["divergence"][layer] == pytest.approx(expected[layer,], rel=1e-5, abs=1e-12)
    chosen = ()
    for layer, value in found.greedy:
        left = [x for x in range(LAYERS) if x not in chosen]
        best = min(left, key=lambda x: expected[tuple(sorted((*chosen, x)))])
        assert layer == best
        chosen = tuple(sorted((*chosen, layer)))
        assert value == pytest.approx(expected[chosen], rel=1e-5, abs=1e-12)
    assert found.ranking == tuple(layer for layer, _ in found.greedy)
    assert value > 1e-6
    assert found.analyzer.get_triangle_layers(1) == [found.ranking[0]]


def test_a_shorter_list_tries_less(monkeypatch):
    runs = Runs(monkeypatch)
    found = run(model(), batches(1), estimator="direct", greedy=2, shortlist=1)
    # The first run, the base and every layer, and in the second round the base and one candidate.
    assert runs.count == 1 + (1 + LAYERS) + 2
    assert len(found.greedy) == 2
    assert sorted(found.ranking) == list(range(LAYERS))
    assert run(model(), batches(1), estimator="direct", greedy=0).greedy == ()


def test_a_round_tries_the_layers_that_added_least_when_last_tried(monkeypatch):
    table = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5, "ab": 1.0, "ac": 0.35, "ad": 0.6, "cd": 0.8, "ce": 0.7}
    tried = []

    def divergences(base, candidates):
        chosen = "".join("abcde"[layer] for layer in base)
        if chosen:
            tried.append((chosen, "".join("abcde"[layer] for layer in candidates)))
        names = {layer: "".join(sorted({*chosen, "abcde"[layer]})) for layer in candidates}
        return {layer: (table.get(name, table.get(name.replace("a", ""), 0.9)),) for layer, name in names.items()}

    measurement = DirectMeasurement(None, [], 1, None)
    monkeypatch.setattr(measurement, "divergences", divergences)
    found = measurement.run(range(5), 3, 2)
    # In the second round b added 0.9, so the third tries d and e.
    assert tried == [("a", "bc"), ("ac", "de")]
    assert found.greedy == ((0, 0.1), (2, 0.35), (4, 0.7))
    assert found.ranking() == (0, 2, 4, 1, 3)


# Going on.


# The 15th run of "direct" is in the greedy part, whose divergences are taken from a dense output computed anew.
@pytest.mark.parametrize(("estimator", "most"), [("gradient", 3), ("direct", 3), ("direct", 15)])
def test_an_interrupted_calibration_goes_on(monkeypatch, tmp_path, estimator, most):
    whole = run(model(), batches(), estimator=estimator, greedy=3)
    path = tmp_path / "journal"
    with monkeypatch.context() as patch:
        Runs(patch, most=most)
        with pytest.raises(KeyboardInterrupt):
            run(model(), batches(), estimator=estimator, greedy=3, resume=path)
    lines = path.read_text().splitlines()
    assert len(lines) >= 3
    # The last line was cut.
    path.write_text("\n".join(lines) + "\n" + lines[-1][:20])
    with monkeypatch.context() as patch:
        again = Runs(patch)
        resumed = run(model(), batches(), estimator=estimator, greedy=3, resume=path)
    with monkeypatch.context() as patch:
        nothing = Runs(patch)
        known = run(model(), batches(), estimator=estimator, greedy=3, resume=path)
    assert nothing.count == 0 < again.count
    assert resumed.scores == known.scores == whole.scores
    assert resumed.ranking == known.ranking == whole.ranking
    assert resumed.greedy == known.greedy == whole.greedy
    assert known.num_layers == LAYERS
    assert len(path.read_text().splitlines()) == len(set(path.read_text().splitlines()))


def test_other_batches_are_not_taken_for_known(monkeypatch, tmp_path):
    path = tmp_path / "journal"
    run(model(), batches(2), resume=path)
    runs = Runs(monkeypatch)
    (first, (inputs, answer)) = batches(2)
    found = run(model(), [first, (inputs, (answer + 1) % 128)], resume=path)
    assert runs.count == 1
    assert found.scores != run(model(), batches(2), resume=path).scores


def test_a_journal_of_something_else_is_refused(tmp_path):
    path = tmp_path / "journal"
    run(model(), batches(1), resume=path)
    for changes, name in (
        ({"config": CONFIG.replace(num_sink_tokens=3)}, "geometry"),
        ({"estimator": "direct"}, "estimator"),
    ):
        with pytest.raises(ValueError, match=f"resume file .*journal has {name}="):
            run(model(), batches(1), resume=path, **changes)
    for other, name in ((model(seed=1), "model"), (model().float(), "dtype")):
        with pytest.raises(ValueError, match=f"resume file .*journal has {name}="):
            run(other, batches(1), resume=path)
    (tmp_path / "text").write_text("once upon a time\n")
    with pytest.raises(ValueError, match=r"resume must be a file that a calibration wrote, .*text is none"):
        run(model(), batches(1), resume=tmp_path / "text")


# The profile, and the serving configuration.


@pytest.mark.parametrize("estimator", ["gradient", "direct"])
def test_a_profile_is_loaded_for_its_model_alone(tmp_path, estimator):
    found, path = run(model(), batches(), estimator=estimator), tmp_path / "profile.json"
    found.to_profile(path, 2)
    config = TriangleMixConfig.from_profile(path, num_layers=LAYERS, model=model())
    assert config == found.to_config(2) == CONFIG.replace(triangle_layer_indices=found.layers(2))
    one = TriangleMixConfig.from_profile(path, num_layers=LAYERS, num_triangle_layers=1, num_last_tokens=9)
    assert one == CONFIG.replace(triangle_layer_indices=found.ranking[:1], num_last_tokens=9)
    with pytest.raises(ValueError, match=r"cannot use profile .*: it is for other weights of the same architecture"):
        TriangleMixConfig.from_profile(path, num_layers=LAYERS, model=model(seed=1))
    with pytest.raises(ValueError, match=r"cannot use profile .*: it is for another model"):
        TriangleMixConfig.from_profile(path, num_layers=LAYERS, model=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="num_triangle_layers must be at most the 3 layers it ranks, got 4"):
        TriangleMixConfig.from_profile(path, num_layers=LAYERS, num_triangle_layers=4)
    content = json.loads(path.read_text())
    assert content["calibration"]["estimator"] == estimator
    assert content["calibration"]["batches"] == 3
    assert content["calibration"]["tokens"] == [N, N]
    for name, scores in found.scores.items():
        stored = {int(layer): value for layer, value in content["calibration"]["scores"][name].items()}
        assert stored == pytest.approx(scores, rel=1e-5)
    assert path.stat().st_size < 2000


def test_a_profile_without_fingerprint_or_ranking_cannot_be_checked(tmp_path):
    path = tmp_path / "profile.json"
    CONFIG.replace(triangle_layer_indices=[1]).to_profile(path, num_layers=LAYERS)
    with pytest.raises(ValueError, match="it has no fingerprint, so whether it is for this model cannot be told"):
        TriangleMixConfig.from_profile(path, num_layers=LAYERS, model=model())
    with pytest.raises(ValueError, match="ranking must be a list, got None"):
        TriangleMixConfig.from_profile(path, num_layers=LAYERS, num_triangle_layers=1)


def test_the_serving_configuration_is_honoured():
    asked = TriangleMixInferenceConfig(
        enable_trianglemix=True,
        num_triangle_layers=2,
        num_sink_tokens=2,
        sliding_window_size=6,
        num_last_tokens=5,
        use_gradient_analysis=True,
        analysis_warmup_steps=2,
    )
    found = run(model(), iter(batches(3)), config=asked)
    assert found.about["batches"] == 2
    assert found.config == CONFIG
    assert [len(values) for values in found.analyzer.middle_qk_gradients.values()] == [2] * LAYERS
    ready = found.apply(asked)
    assert ready.to_trianglemix_config().layers() == found.layers(2)
    assert ready.use_gradient_analysis
    with pytest.warns(UserWarning, match="asks for layers chosen by gradients, and none are chosen yet"):
        tmx_backend(asked)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tmx_backend(ready)
    with pytest.raises(ValueError, match="batches must be at least samples=2, got 1"):
        run(model(), batches(1), config=asked)
    with pytest.raises(ValueError, match="batches must be at least samples=2, they ended after 1"):
        run(model(), iter(batches(1)), config=asked)
    with pytest.raises(ValueError, match="config must have use_gradient_analysis=True to be calibrated, got False"):
        run(model(), batches(1), config=TriangleMixInferenceConfig())
    with pytest.raises(ValueError, match="estimator must be 'gradient' for use_gradient_analysis, got 'direct'"):
        run(model(), batches(2), config=asked, estimator="direct")
    with pytest.raises(ValueError, match=r"config must have the calibrated geometry 2/6/5, got 4/32/64"):
        found.apply(TriangleMixInferenceConfig(num_triangle_layers=1))
    with pytest.raises(ValueError, match="config must tell num_triangle_layers, got None"):
        found.apply(TriangleMixInferenceConfig())


# Bad input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "guess"}, "estimator must be one of gradient, direct, got 'guess'"),
        (
            {"measure": "loud"},
            "measure must be one of signed, absolute, renormalized, renormalized_absolute, got 'loud'",
        ),
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"greedy": -1}, "greedy must be a non-negative integer, got -1"),
        ({"shortlist": 0}, "shortlist must be a positive integer, got 0"),
        ({"positions": 0}, "positions must be a positive integer, got 0"),
        ({"num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"samples": 5}, "batches must be at least samples=5, got 3"),
        ({"config": 5}, "config must be a TriangleMixConfig or TriangleMixInferenceConfig, got 5"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(monkeypatch, changes, message):
    Runs(monkeypatch, most=0)
    with pytest.raises(ValueError) as refused:
        run(model(), batches(), **changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["text"], "batches[0] must be token ids, keyword arguments, or one of them with answers, got str"),
        ([(1, 2)], "batches[0] must be a pair of inputs and a tensor of answers where it is a tuple"),
        (
            [(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 1))],
            "batches[0] must have answers of shape (B,) and int64, got (1, 1) torch.float32",
        ),
        ([], "batches must hold at least one prompt, got none"),
    ],
)
def test_bad_batches_are_refused(monkeypatch, given, message):
    Runs(monkeypatch, most=0)
    with pytest.raises(ValueError) as refused:
        run(model(), given)
    assert str(refused.value) == message


def test_what_only_the_run_can_tell():
    with pytest.raises(ValueError, match="no prompt of the batch is long enough to have a Middle section at 2/6/5"):
        run(model(), batches(n=12))
    (inputs, answer), *_ = batches(1)
    with pytest.raises(ValueError, match=r"answers must be one token for each of 1 sequences, got shape \(2,\)"):
        run(model(), [(inputs, answer.repeat(2))])
    with pytest.raises(ValueError, match=r"answers must be tokens below 128, got \[128\]"):
        run(model(), [(inputs, answer * 0 + 128)])
    with pytest.raises(ValueError, match="num_layers must be at least 3, the layers that were found, got 2"):
        run(model(), batches(1), num_layers=2)
    assert run(model(), batches(1), num_layers=7).num_layers == 7
    with pytest.raises(ValueError, match="greedy must be at most the number of calibrated layers, 3, got 4"):
        run(model(), batches(1), estimator="direct", greedy=4)
    with pytest.raises(ValueError, match="n must be at most the number of calibrated layers, 3, got 4"):
        run(model(), batches(1)).layers(4)


def test_where_an_output_has_its_logits():
    logits = torch.randn(2, 6, 5)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    plain, padded = Inputs(), Inputs(kwargs={"attention_mask": mask})
    for output in (logits, {"logits": logits}, (logits, 1)):
        assert torch.equal(final_logits(output, plain, 2), logits[:, -2:])
    assert torch.equal(final_logits(logits, plain, 99), logits)
    assert torch.equal(final_logits(logits, padded, 2), torch.stack([logits[0, 2:4], logits[1, 4:6]]))
    with pytest.raises(ValueError, match="padding on the right needs the logits of all 6 tokens, the model gave 1"):
        final_logits(logits[:, -1:], padded, 2)
    for output in (logits[0], logits.long(), None, {}):
        with pytest.raises(ValueError, match=r"the model's output must be or have logits \(B, N, V\), got"):
            final_logits(output, plain, 1)


def test_a_digest_tells_values_and_not_objects():
    ids = torch.arange(6).reshape(1, 6)
    (first, second, third, fourth) = samples_of([ids, ids.clone(), ids + 1, {"input_ids": ids}])
    assert first.digest() == second.digest()
    assert len({first.digest(), third.digest(), fourth.digest()}) == 3
    assert Sample(Inputs((object(),))).digest() == Sample(Inputs((object(),))).digest()
    assert first.lengths() == {6}
