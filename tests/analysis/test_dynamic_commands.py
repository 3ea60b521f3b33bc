"""Dynamic layers by ``tmx calibrate``, ``evaluate`` and ``advise``: shares in, a profile with both kinds out."""

import json

import pytest

from tests.support.models import LAYERS, stored_model
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis import Evaluation
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.cli import main

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 16}


def options(**given):
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def calibrated(folder):
    profile = folder / "shares.json"
    given = {"model": folder, "text": folder / "text.txt", "out": profile, "layers": 1, "tokens": 130, "samples": 2}
    shares = {"estimator": "direct", "dynamic_shares": "0.4,0.9", "dynamic_block": 16, "greedy": 1}
    main(["calibrate", *options(**given, **shares, geometry="2/6/5", device="cpu", resume=folder / "shares")])
    return profile


def test_from_shares_to_a_profile(folder, calibrated, tmp_path, capsys, monkeypatch):
    found = json.loads(calibrated.read_text())["calibration"]["dynamic"]
    assert (found["method"], found["block"], found["group"]) == ("sampled", 16, 16)
    assert [x["share"] for x in found["shares"]] == [0.4, 0.9]
    assert all(set(x["density"]) == {"0", "1", "2"} for x in found["shares"])

    plan, out = tmp_path / "plan.json", tmp_path / "evaluation.json"
    both = TriangleMixConfig(
        *(2, 6, 5), triangle_layer_indices=[2], dynamic_layer_indices=[0, 1], dynamic_share=[0.9, 0.5], dynamic_block=16
    )
    both.to_profile(plan, num_layers=LAYERS)
    content = json.loads(plan.read_text())
    content["model"]["fingerprint"] = json.loads(calibrated.read_text())["model"]["fingerprint"]
    plan.write_text(json.dumps(content))
    given = {"model": folder, "text": folder / "text.txt", "out": out, "counts": "1,3", "geometry": "2/6/5"}
    sizes = {"tokens": 130, "samples": 2, "final": 4, "following": 9, "device": "cpu"}
    main(["evaluate", *options(**given, **sizes, profile=calibrated, plan=plan)])
    evaluation = Evaluation.load(out)
    mix = evaluation.records["shares/2-6-5/mix/3"]
    assert len(mix.choice.layers) + len(mix.choice.dynamic.layers) == 3
    assert len(mix.densities) == len(mix.choice.dynamic.layers)
    assert evaluation.records["plan/plan"].choice.config() == both
    assert "1 + 2 dynamic" in capsys.readouterr().err

    # Small blocks have no price of their own.
    times = {
        "tokens": 4096,
        "block": 16,
        "kernel": "triton",
        "select": {"sampled 16": 0.0},
        "density": [0.0, 1.0],
        "attend": [0.0, 1.0],
    }
    monkeypatch.setattr(DynamicTimes, "measured", lambda: DynamicTimes("NVIDIA H100", "bfloat16", (times,)))
    measured, saved = tmp_path / "times.json", tmp_path / "best.json"
    record = {"n": 4096, "dtype": "float32", "lowering": "triton", "dense_ms": 9.0, "ms": 8.9, "geometry": [2, 6, 5]}
    machine, settings = {"gpu": "NVIDIA test", "cpu": "?"}, {"device": "cuda", **SHAPE}
    measured.write_text(json.dumps({"settings": settings, "hardware": machine, "records": [record]}))
    asked = options(budget=1000, metric="kl_final", tokens=4096, bound="mean", times=measured, save=saved)
    main(["advise", str(out), *asked])
    shown = capsys.readouterr()
    assert "dynamic layers take the part of dense attention that they took on NVIDIA H100" in shown.err
    config = TriangleMixConfig.from_profile(saved, num_layers=LAYERS, model=stored_model())
    best = evaluation.records[json.loads(saved.read_text())["advice"]["choice"]]
    assert config == best.choice.config()
    assert config.dynamic_layers()
    names = {"model": stored_model()}
    exec(shown.out, names)
    assert names["cfg"] == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "gradient"}, "dynamic-shares need the estimator direct, got gradient"),
        ({"dynamic_shares": "0.5,x"}, "argument --dynamic-shares: must be a number of at least 0, got 'x'"),
        ({"dynamic_shares": "0.5,1.5"}, "shares[1] must be above 0 and at most 1, got 1.5"),
        ({"dynamic_method": "best"}, "argument --dynamic-method: invalid choice: 'best'"),
        ({"dynamic_block": 7}, "argument --dynamic-block: invalid choice: 7"),
        ({"dynamic_block": 32, "dynamic_group": 64}, "dynamic_group must be one of 16, 32 in blocks of 32, got 64"),
    ],
)
def test_bad_input_of_calibrate_is_refused(folder, tmp_path, capsys, changes, message):
    given = {"model": folder, "text": folder / "text.txt", "out": tmp_path / "x.json", "layers": 1, "tokens": 130}
    shares = {"samples": 2, "estimator": "direct", "dynamic_shares": "0.5", "device": "cpu"}
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", *options(**(given | shares | changes))])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_plan_that_is_no_profile_is_refused(folder, calibrated, tmp_path, capsys):
    given = {"model": folder, "text": folder / "text.txt", "out": tmp_path / "x.json", "counts": "1", "tokens": 130}
    for plan, message in (("missing.json", "plan must be a file, got "), ("config.json", "cannot use profile ")):
        with pytest.raises(SystemExit):
            main(["evaluate", *options(**given, samples=2, device="cpu", plan=folder / plan)])
        assert message in " ".join(capsys.readouterr().err.split())
