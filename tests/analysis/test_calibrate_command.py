"""``tmx calibrate``: a model and a text on disk in, a profile out; and what it refuses before any work."""

import json

import pytest
import torch

from tests.support.models import LAYERS, stored_model
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis.judge import language_model
from tmx_compile.cli import main
from tmx_compile.commands import calibrate as command


def arguments(folder, profile, **changes):
    given = {
        "model": folder,
        "text": folder / "text.txt",
        "out": profile,
        "layers": 2,
        "tokens": 60,
        "samples": 3,
        "geometry": "2/6/5",
        "device": "cpu",
    } | changes
    return ["calibrate", *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


@pytest.mark.parametrize("estimator", ["gradient", "direct"])
def test_it_writes_a_profile_for_the_model(folder, tmp_path, capsys, estimator):
    out, journal = tmp_path / "profile.json", tmp_path / "journal"
    main(arguments(folder, out, estimator=estimator, resume=journal))
    model = stored_model()
    config = TriangleMixConfig.from_profile(out, num_layers=LAYERS, model=model)
    content = json.loads(out.read_text(encoding="utf-8"))
    assert config.geometry.counts == (2, 6, 5)
    assert list(config.layers()) == sorted(content["ranking"][:2])
    about = content["calibration"]
    assert (about["estimator"], about["batches"], about["tokens"], about["dtype"]) == (
        estimator,
        3,
        [60, 60],
        "float32",
    )
    assert len(journal.read_text(encoding="utf-8").splitlines()) > 3
    shown = capsys.readouterr().err
    assert "layers" in shown
    assert str(list(config.layers())) in shown


def test_prompts_are_spread_and_answered_by_the_text(folder):
    model, tokenizer = language_model.load(str(folder), dtype=torch.float32, device="cpu")
    text = (folder / "text.txt").read_text(encoding="utf-8")
    words = torch.tensor([int(word[1:]) for word in text.split()])
    found = language_model.prompts(model, tokenizer, [text], tokens=60, samples=3, keep=1)
    # 420 words hold six pieces of 61.
    for sample, piece in zip(found, (0, 2, 4), strict=True):
        start = piece * 61
        assert torch.equal(sample.inputs.kwargs["input_ids"][0], words[start : start + 60])
        assert int(sample.answer) == int(words[start + 60])
        assert (sample.inputs.kwargs["use_cache"], sample.inputs.kwargs["logits_to_keep"]) == (False, 1)
    assert language_model.call_arguments(torch.nn.Linear(1, 1), 1) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "empty.txt"}, "text must not be empty, "),
        ({"text": "binary.txt"}, "text must be UTF-8, "),
        ({"text": "missing.txt"}, "No such file or directory"),
        ({"samples": 7}, "text must hold 7 pieces of 61 tokens, 427 in all, got 420 tokens"),
        ({"layers": 4}, "layers must be at most the model's 3, got 4"),
        ({"layers": 0}, "argument --layers: must be a whole number of at least 1, got '0'"),
        ({"geometry": "2/6"}, "argument --geometry: must be sinks/window/last rows as in 8/64/128, got '2/6'"),
        ({"estimator": "guess"}, "argument --estimator: invalid choice: 'guess'"),
        ({"out": "/no/such/folder/x.json"}, "out must be a file in an existing folder, got '/no/such/folder/x.json'"),
        ({"resume": "/no/such/folder/x"}, "resume must be a file in an existing folder, got '/no/such/folder/x'"),
        ({"model": "missing"}, "cannot be loaded: "),
    ],
)
def test_bad_input_is_refused_before_any_work(monkeypatch, capsys, folder, tmp_path, changes, message):
    monkeypatch.setattr(command, "calibrate", None)
    changes = {k: folder / v if k in ("text", "model") else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stopped:
        main(arguments(folder, tmp_path / "x.json", **changes))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
