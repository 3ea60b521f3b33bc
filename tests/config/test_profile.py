"""Profiles: what they hold, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.profile import PROFILE_FORMAT


def test_profile_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    config = TriangleMixConfig(8, 512, 128, triangle_layer_indices=[20, 22], min_seq_len=4096)
    config.to_profile(path, num_layers=24)
    assert TriangleMixConfig.from_profile(path, num_layers=24) == config
    assert TriangleMixConfig.from_profile(str(path), num_layers=24, num_sink_tokens=1) == config.replace(
        num_sink_tokens=1
    )
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["format"] == PROFILE_FORMAT == "tmx-profile-1"
    assert written["model"] == {"num_layers": 24}
    assert written["geometry"] == {
        "num_sink_tokens": 8,
        "sliding_window_size": 512,
        "num_last_tokens": 128,
    }
    assert written["triangle_layer_indices"] == [20, 22]


def test_profile_spells_out_the_layers(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    TriangleMixConfig(num_triangle_layers=2).to_profile(path, num_layers=4)
    assert TriangleMixConfig.from_profile(path, num_layers=4) == TriangleMixConfig(triangle_layer_indices=[0, 1])
    with pytest.raises(ValueError, match=r"num_triangle_layers must be at most num_layers=4, got 5"):
        TriangleMixConfig(num_triangle_layers=5).to_profile(path, num_layers=4)


GEOMETRY = {"num_sink_tokens": 4, "sliding_window_size": 32, "num_last_tokens": 64}
PROFILE = {
    "format": PROFILE_FORMAT,
    "model": {"num_layers": 24, "name": "any"},
    "geometry": GEOMETRY,
    "triangle_layer_indices": [20],
    "scores": [0.5],
}


def test_profile_may_hold_more_than_it_must(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE), encoding="utf-8")
    assert TriangleMixConfig.from_profile(path, num_layers=24) == TriangleMixConfig(triangle_layer_indices=[20])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a JSON file"),
        ("", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ([], "format must be 'tmx-profile-1', got 'list'"),
        ({**PROFILE, "format": "tmx-profile-2"}, "format must be 'tmx-profile-1', got 'tmx-profile-2'"),
        ({**PROFILE, "model": None}, "lacks a model or a geometry section"),
        ({**PROFILE, "model": {}}, "model.num_layers must be a positive integer, got None"),
        ({**PROFILE, "model": {"num_layers": 30}}, "for a model of 30 layers, this one has num_layers=24"),
        ({**PROFILE, "geometry": {"num_sink_tokens": 4}}, "geometry must hold num_sink_tokens, sliding"),
        ({**PROFILE, "geometry": {**GEOMETRY, "window": 4}}, "and no more, got num_sink_tokens"),
        (
            {**PROFILE, "geometry": {**GEOMETRY, "num_last_tokens": -1}},
            "num_last_tokens must be a non-negative",
        ),
        ({**PROFILE, "min_seq_len": 0.5}, "min_seq_len must be a non-negative integer, got 0.5"),
        ({**PROFILE, "triangle_layer_indices": None}, "triangle_layer_indices must be a list, got None"),
        ({**PROFILE, "triangle_layer_indices": [24]}, "must be less than num_layers=24, got 24"),
        ({**PROFILE, "triangle_layer_indices": [1, 1]}, "must not repeat a layer, got 1"),
    ],
)
def test_bad_profiles_are_refused(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(reason)}"):
        TriangleMixConfig.from_profile(path, num_layers=24)


def test_profile_refuses_bad_overrides_and_binary_files(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE), encoding="utf-8")
    with pytest.raises(ValueError, match="unknown parameter sinks"):
        TriangleMixConfig.from_profile(path, num_layers=24, sinks=3)
    with pytest.raises(ValueError, match="unknown parameter triangle_layer_indices"):
        TriangleMixConfig.from_profile(path, num_layers=24, triangle_layer_indices=[1])
    with pytest.raises(ValueError, match=r"^num_sink_tokens must be a non-negative integer, got -1"):
        TriangleMixConfig.from_profile(path, num_layers=24, num_sink_tokens=-1)
    path.write_bytes(b"\xff\xfe\xff\x80")
    with pytest.raises(ValueError, match="not a JSON file"):
        TriangleMixConfig.from_profile(path, num_layers=24)
    with pytest.raises(FileNotFoundError):
        TriangleMixConfig.from_profile(tmp_path / "none.json", num_layers=24)
