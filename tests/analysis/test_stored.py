"""The stored calibration of SmolLM2: where it comes from, and that its profile is the one that was measured."""

import json
from pathlib import Path

from tmx_compile import TriangleMixConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_stored_calibration_says_how_it_was_made():
    result = json.loads((RESULTS / "calibration.json").read_text(encoding="utf-8"))
    assert not result["quick"]
    assert result["hardware"]["cpu"]
    assert {"python", "torch", "transformers", "tmx_compile"} <= result["versions"].keys()
    records = {record["part"]: record for record in result["records"]}
    for name in records:
        assert result["runs"][name]["command"].startswith(
            ("python -m benchmarks.run calibration", "python -m studies.run calibration")
        )
    assert records["gradient"]["batches"] == 16
    # What the guide says.
    guide = " ".join((RESULTS.parents[1] / "docs" / "guide.md").read_text(encoding="utf-8").split())
    ratio = records["gradient"]["added_mib"] / records["forward-backward"]["added_mib"]
    minutes, used = (records["gradient"][name] / 60 for name in ("s", "cpu_s"))
    assert result["hardware"]["threads"] == 1
    said = f"{minutes:.0f} minutes on one busy core ({used:.1f} minutes of processor time), with {ratio:.2f} times"
    assert said in guide


def test_the_stored_profile_is_the_measured_ranking():
    result = json.loads((RESULTS / "calibration.json").read_text(encoding="utf-8"))
    (found,) = [record for record in result["records"] if record["part"] == "gradient"]
    path = RESULTS / "profiles" / "smollm2-135m-8-64-128-gradient.json"
    profile = json.loads(path.read_text(encoding="utf-8"))
    assert profile["ranking"] == found["ranking"]
    scores = profile["calibration"]["scores"]["absolute"]
    assert sorted(scores, key=lambda layer: (scores[layer], -int(layer))) == [str(x) for x in found["ranking"]]
    config = TriangleMixConfig.from_profile(path, num_layers=30, num_triangle_layers=9)
    assert config.geometry.counts == (8, 64, 128)
    assert config.layers() == tuple(sorted(found["ranking"][:9]))
