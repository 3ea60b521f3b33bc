"""``tmx evaluate`` and ``tmx advise``: a model and a text on disk in, a profile out; and what they refuse."""

import json

import pytest
import torch

from tests.support.models import LAYERS, stored_model
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis import Choice, Evaluation, evaluate
from tmx_compile.bench import record
from tmx_compile.cli import main
from tmx_compile.commands import quality as quality_command
from tmx_compile.mask.geometry import Geometry


def evaluate_arguments(folder, path, *flags, **changes):
    given = {
        "model": folder,
        "text": folder / "text.txt",
        "out": path,
        "counts": "1,2",
        "geometry": "2/6/5,1/9/4",
        "tokens": 50,
        "samples": 3,
        "final": 6,
        "following": 10,
        "device": "cpu",
    } | changes
    return ["evaluate", *flags, *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


@pytest.fixture(scope="module")
def evaluated(folder):
    """A profile, and an evaluation of it that was made by the commands."""
    profile, out = folder / "mine.json", folder / "evaluation.json"
    made = {"model": folder, "text": folder / "text.txt", "layers": 2, "tokens": 50, "samples": 2}
    options = [str(x) for name, value in made.items() for x in (f"--{name}", value)]
    main(["calibrate", *options, "--geometry", "2/6/5", "--device", "cpu", "--out", str(profile)])
    # A ranking that differs from the deepest layers.
    content = json.loads(profile.read_text(encoding="utf-8"))
    profile.write_text(json.dumps(content | {"ranking": [0, 2, 1]}), encoding="utf-8")
    main(evaluate_arguments(folder, out, "--streaming", profile=profile, resume=folder / "journal"))
    return out


def bench_file(path, **changes):
    """Layer times as `tmx bench --out` writes them."""
    settings = {"device": "cpu", "heads": 4, "kv_heads": 2, "head_dim": 16}
    one = {"n": 4096, "dtype": "float32", "lowering": "blocked", "dense_ms": 20.0}
    records = [one | {"geometry": [2, 6, 5], "ms": 2.0}, one | {"geometry": [1, 9, 4], "ms": 3.0}]
    content = {"settings": settings | changes, "hardware": record.hardware(), "records": records}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_an_evaluation_is_that_of_the_function(folder, evaluated, capsys):
    found = Evaluation.load(evaluated)
    names = [
        f"{label}/{geometry}/{n}" for label in ("deepest", "mine") for geometry in ("2-6-5", "1-9-4") for n in (1, 2)
    ]
    assert list(found.records) == [x for name in names for x in (name, f"{name}/streaming")]
    assert found.records["mine/1-9-4/2"].choice == Choice(Geometry(1, 9, 4), (0, 2))
    assert found.records["deepest/2-6-5/1/streaming"].choice == Choice(Geometry(2, 6, 5), (2,), True)
    words = [int(word[1:]) for word in (folder / "text.txt").read_text(encoding="utf-8").split()]
    # 420 words hold seven pieces of 60; the first, the third and the fifth.
    prompts = [torch.tensor(words[piece * 60 : piece * 60 + 60]) for piece in (0, 2, 4)]
    want = evaluate(
        stored_model(),
        prompts,
        {name: x.choice for name, x in found.records.items()},
        final=6,
        following=10,
        progress=False,
    )
    assert found.records == want.records
    assert found.dense == want.dense
    # All of it is known by now.
    main(
        evaluate_arguments(
            folder, folder / "again.json", "--streaming", profile=folder / "mine.json", resume=folder / "journal"
        )
    )
    assert Evaluation.load(folder / "again.json").records == want.records
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "mine/1-9-4/2/streaming" in shown.err
    cost = want.records["mine/1-9-4/2"].ppl_final
    assert f"{cost.mean:+.2%} [{cost.lower:+.2%}, {cost.upper:+.2%}]" in shown.err


def test_advice_is_a_profile_and_code(evaluated, tmp_path, capsys):
    out = tmp_path / "profile.json"
    times = bench_file(tmp_path / "layer.json")
    given = ["--budget", "10", "--tokens", "4096", "--min-seq-len", "900", "--bound", "mean"]
    main(["advise", str(evaluated), *given, "--times", str(times), "--save", str(out)])
    shown = capsys.readouterr()
    model = stored_model()
    config = TriangleMixConfig.from_profile(out, num_layers=LAYERS, model=model)
    assert (config.geometry.counts, len(config.layers())) == ((2, 6, 5), 2)
    names = {"model": model}
    exec(shown.out, names)
    assert names["cfg"] == config
    assert "saves about 36 ms of 60 ms of attention" in shown.err
    assert "blocked on" in shown.err
    assert "within 10 by the mean" in shown.err
    assert config.min_seq_len == 900
    assert json.loads(out.read_text(encoding="utf-8"))["advice"]["saved_ms"] == 36.0


def test_nothing_fits_is_an_exit_code(evaluated, tmp_path, capsys):
    times, out = bench_file(tmp_path / "layer.json"), tmp_path / "profile.json"
    given = ["--budget", "0", "--metric", "kl_following", "--tokens", "4096", "--times", str(times), "--save", str(out)]
    with pytest.raises(SystemExit) as stopped:
        main(["advise", str(evaluated), *given])
    shown = capsys.readouterr()
    assert stopped.value.code == 1
    assert shown.out == ""
    assert "nothing fits: no choice has kl_following within 0" in shown.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": "1,x"}, "argument --counts: must be a whole number of at least 1, got 'x'"),
        ({"counts": "4"}, "counts must be at most the 3 layers that the model has, got 4"),
        ({"geometry": "2/6/5,3"}, "argument --geometry: must be sinks/window/last rows as in 8/64/128, got '3'"),
        ({"samples": 1}, "samples must be at least 2, or intervals say nothing, got 1"),
        ({"samples": 8}, "text must hold 8 pieces of 60 tokens, 480 in all, got 420 tokens"),
        ({"tokens": 6}, "tokens must be more than final=6, got 6"),
        ({"following": 0}, "argument --following: must be a whole number of at least 1, got '0'"),
        ({"text": "empty.txt"}, "text must not be empty, "),
        ({"profile": "missing.json"}, "profile must be a file, got "),
        ({"profile": "config.json"}, "cannot use profile "),
        ({"out": "/no/such/folder/x.json"}, "out must be a file in an existing folder, got '/no/such/folder/x.json'"),
        ({"resume": "/no/such/folder/x"}, "resume must be a file in an existing folder, got '/no/such/folder/x'"),
        ({"model": "missing"}, "cannot be loaded: "),
    ],
)
def test_bad_input_of_evaluate_is_refused_before_any_work(monkeypatch, capsys, folder, tmp_path, changes, message):
    monkeypatch.setattr(quality_command, "evaluate", None)
    changes = {k: folder / v if k in ("text", "model", "profile") else v for k, v in changes.items()}
    with pytest.raises(SystemExit) as stopped:
        main(evaluate_arguments(folder, tmp_path / "x.json", **changes))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_profile_of_another_model_is_refused(capsys, folder, evaluated, tmp_path):
    content = json.loads((folder / "mine.json").read_text(encoding="utf-8"))
    content["model"]["fingerprint"]["weights"] = "0" * 16
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(evaluate_arguments(folder, tmp_path / "x.json", profile=tmp_path / "other.json"))
    assert stopped.value.code == 2
    assert "it is for other weights of the same architecture" in capsys.readouterr().err


def test_two_profiles_of_one_name_are_refused(capsys, folder, tmp_path):
    with pytest.raises(SystemExit):
        main([*evaluate_arguments(folder, tmp_path / "x.json"), "--profile", "a/mine.json", "b/mine.json"])
    assert "profile must be files of different names, got 'mine' more than once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "-1"}, "argument --budget: must be a number of at least 0, got '-1'"),
        ({"metric": "loss"}, "argument --metric: invalid choice: 'loss'"),
        ({"tokens": "2048"}, "tokens must be over min_seq_len=2048, up to which prompts stay dense, got 2048"),
        ({"tokens": "5000"}, "times must hold 4 query and 2 key heads of 16, 2/6/5, 5000 tokens, float32; they hold"),
        ({"dtype": "bfloat16"}, "times must hold 4 query and 2 key heads of 16, 2/6/5, 4096 tokens, bfloat16; they"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"device": "cpu"}, "device must not be given with times, which have their own, got 'cpu'"),
        ({"times": "text.txt"}, "times must be a file of `tmx bench --out`, "),
        ({"times": "missing"}, "No such file or directory"),
        ({"save": "/no/such/folder/x"}, "save must be a file in an existing folder, got '/no/such/folder/x'"),
        ({"evaluation": "text.txt"}, "cannot use evaluation "),
        ({"evaluation": "mine.json"}, "format must be 'tmx-evaluation-1', got 'tmx-profile-1'"),
    ],
)
def test_bad_input_of_advise_is_refused(capsys, folder, evaluated, tmp_path, changes, message):
    times = bench_file(tmp_path / "layer.json")
    given = {"evaluation": evaluated, "budget": "10", "tokens": "4096", "times": times} | changes
    given |= {k: folder / v for k, v in given.items() if k in ("evaluation", "times") and isinstance(v, str)}
    options = [str(x) for name, value in given.items() if name != "evaluation" for x in (f"--{name}", value)]
    with pytest.raises(SystemExit) as stopped:
        main(["advise", str(given["evaluation"]), *options])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
