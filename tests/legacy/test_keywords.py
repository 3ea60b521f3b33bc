"""The classes of the original API, every method called by the documented names of its parameters."""

import inspect

import pytest
import torch

import tmx_compile
from tmx_compile import TriangleMixConfig, TriangleMixInferenceConfig

CONFIG = TriangleMixConfig(
    num_sink_tokens=1, sliding_window_size=2, num_last_tokens=3, num_triangle_layers=None, triangle_layer_indices=[1]
)
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
MASK = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
TENSORS = {name: torch.randn(1, 8, 2, 4) for name in ("query", "key", "value")}

# Class -> (the constructor's arguments, method -> its arguments). Static methods are called on the class.
CALLS = {
    "TriangleMixMaskGenerator": (
        {"config": CONFIG},
        {
            "_create_streaming_mask": {"seq_len": 8, **CPU},
            "_create_last_mask": {"seq_len": 8, **CPU},
            "_create_middle_mask": {"seq_len": 8, **CPU},
            "_create_triangle_mask": {"seq_len": 8, **CPU},
            "_create_dense_mask": {"seq_len": 8, **CPU},
            "get_attention_mask": {"seq_len": 8, "layer_idx": 1, **CPU, "use_triangle": True},
            "should_use_triangle": {"layer_idx": 1},
            "clear_cache": {},
        },
    ),
    "TriangleMixAttention": (
        {"config": CONFIG, "num_layers": 2},
        {
            "get_attn_mask": {"seq_len": 8, "layer_idx": 1, **CPU},
            "should_use_triangle": {"layer_idx": 1},
        },
    ),
    "TriangleMixAnalyzer": (
        {"num_layers": 2},
        {
            "record_middle_qk_gradient": {"layer_idx": 1, "gradient": torch.ones(2)},
            "get_triangle_layers": {"num_triangle_layers": 1},
            "reset": {},
        },
    ),
    "AscendTriangleMixAttention": (
        {"num_heads": 2, "head_dim": 4, "scale": 0.5, "trianglemix_config": CONFIG, "layer_idx": 1, "num_layers": 2},
        {"forward": {**TENSORS, "attn_mask": MASK}},
    ),
    "AscendNPUTriangleMixOptimizer": (
        {},
        {
            "optimize_mask_for_npu": {"mask": MASK, "block_size": 4},
            "sparse_attention_kernel": {**TENSORS, "mask": MASK, "scale": 0.5, "block_size": 4},
        },
    ),
    "TriangleMixInferenceConfig": (
        {
            "enable_trianglemix": True,
            "num_triangle_layers": None,
            "triangle_layer_indices": [1],
            "num_sink_tokens": 4,
            "sliding_window_size": 32,
            "num_last_tokens": 64,
            "use_npu_optimization": True,
            "npu_block_size": 64,
            "use_gradient_analysis": False,
            "analysis_warmup_steps": 100,
        },
        {
            "to_trianglemix_config": {},
            "for_ascend_npu": {"num_triangle_layers": 12, "enable_gradient_analysis": False},
            "for_qwen3": {"model_size": "14B", "num_triangle_layers": None},
        },
    ),
    "TriangleMixConfig": (
        {
            "num_sink_tokens": 4,
            "sliding_window_size": 32,
            "num_last_tokens": 64,
            "num_triangle_layers": None,
            "triangle_layer_indices": [1],
            "min_seq_len": 2048,
            "dynamic_layer_indices": [0],
            "dynamic_share": 0.5,
            "dynamic_method": "antidiagonal",
            "dynamic_block": 64,
            "dynamic_group": 64,
        },
        {},
    ),
}
DOCUMENTED = [(name, method) for name, (_, methods) in CALLS.items() for method in methods]


def made(name):
    arguments, _ = CALLS[name]
    return getattr(tmx_compile, name)(**arguments)


@pytest.mark.parametrize("name", CALLS)
def test_every_class_is_made_by_keyword(name):
    arguments, _ = CALLS[name]
    parameters = inspect.signature(getattr(tmx_compile, name)).parameters
    assert list(parameters) == list(arguments)
    one = made(name)
    for parameter, value in arguments.items():
        expected = tuple(value) if parameter in ("triangle_layer_indices", "dynamic_layer_indices") else value
        assert getattr(one, parameter) == expected


@pytest.mark.parametrize(("name", "method"), DOCUMENTED)
def test_every_method_is_called_by_keyword(name, method):
    arguments = CALLS[name][1][method]
    one = made(name)
    if name == "TriangleMixAnalyzer":
        one.record_middle_qk_gradient(layer_idx=1, gradient=0.5)
    called = getattr(one, method)
    assert list(inspect.signature(called).parameters) == list(arguments)
    called(**arguments)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("Ascend")])
def test_static_methods_need_no_object(name):
    for method, arguments in CALLS[name][1].items():
        if isinstance(inspect.getattr_static(getattr(tmx_compile, name), method), staticmethod):
            getattr(getattr(tmx_compile, name), method)(**arguments)


def test_the_analyzer_takes_the_documented_keyword_and_attributes():
    analyzer = tmx_compile.TriangleMixAnalyzer(num_layers=3)
    for layer, value in enumerate((3.0, 1.0, 2.0)):
        analyzer.record_middle_qk_gradient(layer_idx=layer, gradient=value)
    assert analyzer.get_triangle_layers(num_triangle_layers=2) == [1, 2]
    assert (analyzer.num_layers, set(analyzer.middle_qk_gradients)) == (3, {0, 1, 2})


def test_an_inference_configuration_from_the_environment_by_keyword():
    made = TriangleMixInferenceConfig.from_env(environ={"VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS": "1"})
    assert made.use_gradient_analysis
