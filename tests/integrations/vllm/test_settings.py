"""What switches TriangleMix on in vLLM: variables and additional_config, with every bad value named."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks.common import RESULTS
from tmx_compile import TriangleMixConfig
from tmx_compile.integrations.vllm.settings import KEY, Settings, handed_over, read

GEOMETRY = {"num_sink_tokens": 8, "sliding_window_size": 512, "num_last_tokens": 128}


def resolved(environ=None, mapping=None, num_layers=30):
    asked = read(environ or {}, {} if mapping is None else {KEY: mapping})
    assert asked is not None
    return asked.resolve(num_layers)


@pytest.mark.parametrize(
    ("environ", "additional"),
    [
        ({}, {}),
        ({}, None),
        ({}, {"other": 1}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "12"}, {}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "0", "VLLM_TRIANGLEMIX_LAYERS": "12"}, {}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "1"}, {KEY: {"enable_trianglemix": False}}),
    ],
)
def test_off(environ, additional):
    assert read(environ, additional) is None


def test_the_originals_variables():
    settings, warnings = resolved({"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_LAYERS": "16-18,20"})
    assert settings == Settings(TriangleMixConfig(triangle_layer_indices=[16, 17, 18, 20]), 30)
    assert warnings == []
    settings, warnings = resolved({"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_LAYERS": "3"})
    assert settings.config.layers() == (0, 1, 2)
    assert "num_triangle_layers=3 makes the first 3 layers sparse" in warnings[0]
    assert "28% perplexity" in warnings[0]


def test_additional_config_goes_first():
    environ = {"VLLM_TRIANGLEMIX_LAYERS": "12", "VLLM_NPU_BLOCK_SIZE": "128"}
    mapping = GEOMETRY | {"triangle_layer_indices": [28, 29], "min_seq_len": 100, "strict": True, "lowering": "blocked"}
    settings, warnings = resolved(environ, mapping | {"stats_log_interval": 2.5})
    assert settings.config.layers() == (28, 29)
    assert settings.config.geometry.counts == (8, 512, 128)
    assert settings.config.min_seq_len == 100
    assert (settings.strict, settings.lowering, settings.stats_log_interval) == (True, "blocked", 2.5)
    assert warnings == []


def test_no_layer_is_off_with_a_warning():
    settings, warnings = resolved(mapping={})
    assert settings is None
    assert "selects no triangle layer" in warnings[0]


def profile(path, num_layers=30):
    TriangleMixConfig(8, 64, 128, triangle_layer_indices=[9, 7]).to_profile(path, num_layers=num_layers)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"ranking": [9, 7, 3]}))
    return str(path)


def test_a_profile_names_the_layers(tmp_path):
    path = profile(tmp_path / "profile.json")
    settings, warnings = resolved(mapping={"profile": path})
    assert (settings.config.layers(), settings.config.geometry.counts) == ((7, 9), (8, 64, 128))
    assert warnings == []
    environ = {"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS": "1"}
    settings, warnings = resolved(environ | {"VLLM_TRIANGLEMIX_PROFILE": path, "VLLM_TRIANGLEMIX_LAYERS": "3"})
    assert settings.config.layers() == (3, 7, 9)
    assert warnings == []
    settings, _ = resolved(mapping={"profile": path, "sliding_window_size": 512, "min_seq_len": 5})
    assert settings.config.geometry.counts == (8, 512, 128)
    assert settings.config.min_seq_len == 5


def test_analysis_without_a_profile_warns():
    _, warnings = resolved({"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS": "1"})
    assert "there is no profile" in warnings[0]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (3, "trianglemix in additional_config must be a mapping, got 3"),
        ({"window": 3}, "trianglemix.window in additional_config: unknown key, value 3"),
        ({"num_sink_tokens": -1}, "trianglemix.num_sink_tokens in additional_config: .*non-negative integer, got -1"),
        ({"num_triangle_layers": "4"}, "trianglemix.num_triangle_layers in additional_config: .*got '4'"),
        ({"enable_trianglemix": 1}, "trianglemix.enable_trianglemix in additional_config: .*must be a bool, got 1"),
        ({"strict": "yes"}, "trianglemix.strict in additional_config: strict must be a bool, got 'yes'"),
        ({"lowering": "flex"}, "lowering must be one of auto, triton, blocked, operator, vllm, got 'flex'"),
        ({"stats_log_interval": -1}, "stats_log_interval must be a number of seconds from 0 on, got -1"),
        ({"stats_log_interval": True}, "stats_log_interval must be a number of seconds from 0 on, got True"),
        ({"profile": 7}, "profile must be the path of a file, got 7"),
        ({"min_seq_len": 1.5}, "trianglemix.min_seq_len in additional_config: .*got 1.5"),
        ({"_num_layers": 5}, "trianglemix._num_layers in additional_config: unknown key"),
        (
            {"profile": "x.json", "triangle_layer_indices": [1]},
            "profile='x.json' and triangle_layer_indices=.*1.* both",
        ),
    ],
)
def test_bad_keys_are_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        read({}, {KEY: mapping})


def test_bad_variables_are_named():
    with pytest.raises(ValueError, match=re.escape("VLLM_TRIANGLEMIX_LAYERS='all'")):
        read({"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_LAYERS": "all"}, {})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"triangle_layer_indices": [30]}, "triangle_layer_indices must be less than num_layers=30, got 30"),
        ({"num_triangle_layers": 31}, "num_triangle_layers must be at most num_layers=30, got 31"),
        ({"profile": "/no/such/file"}, "profile='/no/such/file' cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_is_named(mapping, message):
    with pytest.raises(ValueError, match=message):
        resolved(mapping=mapping)


def test_a_profile_of_another_model_is_refused(tmp_path):
    path = profile(tmp_path / "profile.json", num_layers=28)
    with pytest.raises(ValueError, match="it is for a model of 28 layers"):
        resolved(mapping={"profile": path})


def test_settings_travel_as_plain_data():
    config = TriangleMixConfig(8, 64, 128, triangle_layer_indices=[3, 4], min_seq_len=7)
    settings = Settings(config, 5, "blocked", True, 1.0)
    assert handed_over({KEY: json.loads(json.dumps(settings.to_dict()))}) == settings
    assert handed_over({KEY: {"num_triangle_layers": 3}}) is None
    assert handed_over({}) is None
    assert handed_over(None) is None


def test_up_to_which_length_prompts_stay_dense():
    config = TriangleMixConfig(8, 512, 128, triangle_layer_indices=[3], min_seq_len=100)
    # Where the mask keeps half of the pairs: as the backend of torch.compile has it.
    assert Settings(config, 5).limit("cpu") == Settings(config, 5).limit("cuda") == 2215
    assert Settings(config, 5, "blocked").limit("cpu") == 100
    assert Settings(config, 5, "triton").limit("cuda") == 100


def test_auto_lost_no_measured_case_that_it_takes_on_a_cpu():
    records = json.loads((RESULTS / "vllm_cpu.json").read_text(encoding="utf-8"))["records"]
    taken, left = [], []
    for each in records:
        config = TriangleMixConfig(*each["geometry"], triangle_layer_indices=[3], min_seq_len=1)
        (taken if each["n"] > Settings(config, 5).limit("cpu") else left).append(each)
    assert len(taken) > 10
    assert [each for each in taken if each["speedup"] < 1] == []
    assert left
