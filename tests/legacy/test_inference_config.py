"""The serving form of a configuration: its factories, and what it reads from the environment."""

from __future__ import annotations

import re

import pytest

from tmx_compile.config import TriangleMixConfig
from tmx_compile.legacy.inference import TriangleMixInferenceConfig

COUNTS = ("num_sink_tokens", "sliding_window_size", "num_last_tokens", "num_triangle_layers", "min_seq_len")


def test_to_trianglemix_config() -> None:
    assert TriangleMixInferenceConfig(num_triangle_layers=3).to_trianglemix_config() is None
    on = TriangleMixInferenceConfig(True, 3, [], 1, 2, 5)
    assert on.to_trianglemix_config() == TriangleMixConfig(1, 2, 5, num_triangle_layers=3)
    listed = TriangleMixInferenceConfig(True, 3, [9, 8])
    assert listed.to_trianglemix_config() == TriangleMixConfig(num_triangle_layers=3, triangle_layer_indices=(8, 9))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("enable_trianglemix", 1, "must be a bool, got 1"),
        ("use_npu_optimization", "yes", "must be a bool, got 'yes'"),
        ("use_gradient_analysis", None, "must be a bool, got None"),
        ("npu_block_size", 0, "must be a positive integer, got 0"),
        ("npu_block_size", 64.0, "must be a positive integer, got 64.0"),
        ("analysis_warmup_steps", -1, "must be a non-negative integer, got -1"),
        ("num_triangle_layers", -1, "must be a non-negative integer, got -1"),
        ("num_sink_tokens", True, "must be a non-negative integer, got True"),
        ("sliding_window_size", 1.5, "must be a non-negative integer, got 1.5"),
        ("num_last_tokens", None, "must be a non-negative integer, got None"),
    ],
)
def test_inference_config_refuses(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} {message}")):
        TriangleMixInferenceConfig(**{name: value})


def test_for_ascend_npu() -> None:
    made = TriangleMixInferenceConfig.for_ascend_npu()
    assert made == TriangleMixInferenceConfig(enable_trianglemix=True, num_triangle_layers=12)
    made = TriangleMixInferenceConfig.for_ascend_npu(5, enable_gradient_analysis=True)
    assert (made.num_triangle_layers, made.use_gradient_analysis, made.use_npu_optimization) == (
        5,
        True,
        True,
    )
    with pytest.raises(ValueError, match="enable_gradient_analysis must be a bool, got 1"):
        TriangleMixInferenceConfig.for_ascend_npu(5, 1)


@pytest.mark.parametrize(
    ("size", "layers"),
    [
        ("0.6B", 8),
        ("1.7B", 8),
        ("4B", 11),
        ("8B", 11),
        ("14B", 12),
        ("14b", 12),
        ("32B", 16),
        ("30B-A3B", 14),
        ("235B-A22B", 20),
    ],
)
def test_for_qwen3(size: str, layers: int) -> None:
    made = TriangleMixInferenceConfig.for_qwen3(size)
    assert made == TriangleMixInferenceConfig(enable_trianglemix=True, num_triangle_layers=layers)
    assert TriangleMixInferenceConfig.for_qwen3(size, 3).num_triangle_layers == 3


def test_for_qwen3_refuses() -> None:
    assert TriangleMixInferenceConfig.for_qwen3() == TriangleMixInferenceConfig.for_qwen3("14B")
    known = "0.6B, 1.7B, 4B, 8B, 14B, 32B, 30B-A3B, 235B-A22B"
    for size in ("7B", 14, None):
        with pytest.raises(ValueError, match=re.escape(f"model_size must be one of {known}, got {size!r}")):
            TriangleMixInferenceConfig.for_qwen3(size)
    with pytest.raises(ValueError, match="num_triangle_layers must be at most num_layers=40, got 41"):
        TriangleMixInferenceConfig.for_qwen3("14B", 41)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "", "VLLM_TRIANGLEMIX_LAYERS": " "}, {}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "Yes", "OTHER": "x"}, {"enable_trianglemix": True}),
        ({"VLLM_TRIANGLEMIX_ENABLED": " on "}, {"enable_trianglemix": True}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "1"}, {"enable_trianglemix": True}),
        ({"VLLM_TRIANGLEMIX_ENABLED": "TRUE"}, {"enable_trianglemix": True}),
        ({"VLLM_NPU_OPTIMIZATION": "0"}, {"use_npu_optimization": False}),
        ({"VLLM_NPU_OPTIMIZATION": "False"}, {"use_npu_optimization": False}),
        ({"VLLM_NPU_OPTIMIZATION": "NO"}, {"use_npu_optimization": False}),
        ({"VLLM_NPU_OPTIMIZATION": "off"}, {"use_npu_optimization": False}),
        ({"VLLM_NPU_BLOCK_SIZE": "128"}, {"npu_block_size": 128}),
        ({"VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS": "yes"}, {"use_gradient_analysis": True}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "12"}, {"num_triangle_layers": 12}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "12,"}, {"triangle_layer_indices": [12]}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "22, 20,21"}, {"triangle_layer_indices": [20, 21, 22]}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "16-18"}, {"triangle_layer_indices": [16, 17, 18]}),
        ({"VLLM_TRIANGLEMIX_LAYERS": "0, 4 - 5,9-9"}, {"triangle_layer_indices": [0, 4, 5, 9]}),
    ],
)
def test_from_env(environ: dict[str, str], expected: dict[str, object]) -> None:
    assert TriangleMixInferenceConfig.from_env(environ) == TriangleMixInferenceConfig(**expected)


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("VLLM_TRIANGLEMIX_ENABLED", "2", "expected 0, 1, true"),
        ("VLLM_NPU_OPTIMIZATION", "maybe", "expected 0, 1, true"),
        ("VLLM_NPU_BLOCK_SIZE", "0", "npu_block_size must be a positive integer, got 0"),
        ("VLLM_NPU_BLOCK_SIZE", "-64", "npu_block_size must be a positive integer, got -64"),
        ("VLLM_NPU_BLOCK_SIZE", "64.0", "expected an integer"),
        ("VLLM_NPU_BLOCK_SIZE", "1_0", "expected an integer"),
        ("VLLM_NPU_BLOCK_SIZE", "9" * 5000, "expected an integer"),
        ("VLLM_TRIANGLEMIX_LAYERS", "-3", "num_triangle_layers must be a non-negative integer, got -3"),
        ("VLLM_TRIANGLEMIX_LAYERS", "all", "cannot read 'all'"),
        ("VLLM_TRIANGLEMIX_LAYERS", ",", "cannot read ''"),
        ("VLLM_TRIANGLEMIX_LAYERS", "1,,2", "cannot read ''"),
        ("VLLM_TRIANGLEMIX_LAYERS", "1,-2", "cannot read '-2'"),
        ("VLLM_TRIANGLEMIX_LAYERS", "5-3", "range 5-3 is not an ascending range"),
        ("VLLM_TRIANGLEMIX_LAYERS", "1-2000000000", "range 1-2000000000 is not"),
        ("VLLM_TRIANGLEMIX_LAYERS", "3,1-4", "triangle_layer_indices must not repeat a layer, got 3"),
        ("VLLM_TRIANGLEMIX_LAYERS", "9999999999,", "triangle_layer_indices[0] must be less than 2**31"),
    ],
)
def test_from_env_refuses(variable: str, value: str, reason: str) -> None:
    message = f"{re.escape(variable)}={re.escape(repr(value))}: .*{re.escape(reason)}"
    with pytest.raises(ValueError, match=message):
        TriangleMixInferenceConfig.from_env({variable: value})


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_TRIANGLEMIX_ENABLED", "VLLM_NPU_OPTIMIZATION", "VLLM_NPU_BLOCK_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_TRIANGLEMIX_LAYERS", "5")
    assert TriangleMixInferenceConfig.from_env().num_triangle_layers == 5
    # Nothing but from_env looks there.
    assert TriangleMixInferenceConfig().num_triangle_layers is None
