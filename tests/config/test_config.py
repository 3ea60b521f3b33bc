"""Configuration: defaults, validation, layer choice, fingerprint, profiles, factories, environment."""

from __future__ import annotations

import ast
import dataclasses
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tmx_compile import config as config_module
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.legacy import environment as environment_module
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.mask import geometry as geometry_module
from tmx_compile.mask import selection as selection_module

COUNTS = ("num_sink_tokens", "sliding_window_size", "num_last_tokens", "num_triangle_layers", "min_seq_len")


class Indexable:
    """What a NumPy integer is to the package: an object with ``__index__``."""

    def __init__(self, value: int, dtype: str = "int64") -> None:
        self.value, self.dtype = value, dtype

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Indexable({self.value})"


# Defaults and order of the parameters.


def test_defaults_and_order() -> None:
    assert list(dataclasses.asdict(TriangleMixConfig()).items()) == [
        ("num_sink_tokens", 4),
        ("sliding_window_size", 32),
        ("num_last_tokens", 64),
        ("num_triangle_layers", None),
        ("triangle_layer_indices", None),
        ("min_seq_len", 2048),
        ("dynamic_layer_indices", None),
        ("dynamic_share", 0.95),
        ("dynamic_method", "sampled"),
        ("dynamic_block", 128),
        ("dynamic_group", 32),
    ]
    assert list(dataclasses.asdict(TriangleMixInferenceConfig()).items()) == [
        ("enable_trianglemix", False),
        ("num_triangle_layers", None),
        ("triangle_layer_indices", ()),
        ("num_sink_tokens", 4),
        ("sliding_window_size", 32),
        ("num_last_tokens", 64),
        ("use_npu_optimization", True),
        ("npu_block_size", 64),
        ("use_gradient_analysis", False),
        ("analysis_warmup_steps", 100),
    ]


def test_frozen_hashable_and_picklable() -> None:
    config = TriangleMixConfig(triangle_layer_indices=[3, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_sink_tokens = 5
    assert hash(config) == hash(TriangleMixConfig(triangle_layer_indices=(1, 3)))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.geometry.counts == (4, 32, 64)


# Validation.


@pytest.mark.parametrize("value", [-3, 1.0, True, "4", [4], Indexable(1, "torch.bool")])
@pytest.mark.parametrize("name", COUNTS)
def test_bad_counts_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a non-negative integer, got {value!r}")):
        TriangleMixConfig(**{name: value})


@pytest.mark.parametrize("name", COUNTS)
def test_counts_fit_a_kernel_integer_and_are_normalised(name: str) -> None:
    assert getattr(TriangleMixConfig(**{name: 2**31 - 1}), name) == 2**31 - 1
    with pytest.raises(ValueError, match=re.escape(f"{name} must be less than 2**31, got 2147483648")):
        TriangleMixConfig(**{name: 2**31})
    assert type(getattr(TriangleMixConfig(**{name: Indexable(7)}), name)) is int


def test_numpy_integers_are_counts() -> None:
    config = TriangleMixConfig(numpy.int32(7), triangle_layer_indices=numpy.array([5, 2]))
    assert config == TriangleMixConfig(7, triangle_layer_indices=[2, 5])
    assert {type(each) for each in (config.num_sink_tokens, *config.layers())} == {int}
    for value in (numpy.bool_(True), numpy.float32(1), numpy.array([1])):
        with pytest.raises(ValueError, match="num_sink_tokens must be"):
            TriangleMixConfig(value)
    with pytest.raises(ValueError, match="triangle_layer_indices must be a sequence"):
        TriangleMixConfig(triangle_layer_indices=numpy.array(3))


@pytest.mark.parametrize("given", [[3, 1, 2], (1, 2, 3), {1, 2, 3}, range(1, 4), iter([2, 1, 3])])
def test_layer_indices_become_a_sorted_tuple(given: object) -> None:
    assert TriangleMixConfig(triangle_layer_indices=given).triangle_layer_indices == (1, 2, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0, -2], "triangle_layer_indices[1] must be a non-negative integer, got -2"),
        ([1.0], "triangle_layer_indices[0] must be a non-negative integer, got 1.0"),
        ([True], "triangle_layer_indices[0] must be a non-negative integer, got True"),
        ([4, 7, 4, 7, 1], "triangle_layer_indices must not repeat a layer, got 4, 7 more than once"),
        ("12", "triangle_layer_indices must be a sequence of layer indices, got '12'"),
        (12, "triangle_layer_indices must be a sequence of layer indices, got 12"),
        ({1: 2}, "triangle_layer_indices must be a sequence of layer indices, got {1: 2}"),
    ],
)
@pytest.mark.parametrize("cls", [TriangleMixConfig, TriangleMixInferenceConfig])
def test_bad_layer_indices_are_refused(cls: type, given: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(triangle_layer_indices=given)


def test_as_count_minimum() -> None:
    assert as_count("n", 1, minimum=1) == 1
    with pytest.raises(ValueError, match="n must be a positive integer, got 0"):
        as_count("n", 0, minimum=1)


# Which layers.


@pytest.mark.parametrize(
    ("count", "indices", "layers", "first_n"),
    [
        (None, None, (), False),
        (0, None, (), False),
        (3, None, (0, 1, 2), True),
        (3, [7, 5], (5, 7), False),
        (3, [], (), False),
        (None, [2], (2,), False),
    ],
)
def test_effective_layers(count: int | None, indices: list[int] | None, layers: tuple, first_n: bool) -> None:
    config = TriangleMixConfig(num_triangle_layers=count, triangle_layer_indices=indices)
    assert config.layers() == layers
    assert config.uses_first_n is first_n
    assert tuple(layer for layer in range(-2, 12) if config.is_triangle_layer(layer)) == layers


def test_check_layers() -> None:
    TriangleMixConfig(num_triangle_layers=4).check_layers(4)
    TriangleMixConfig(triangle_layer_indices=[3]).check_layers(4)
    with pytest.raises(ValueError, match=r"num_triangle_layers must be at most num_layers=4, got 5"):
        TriangleMixConfig(num_triangle_layers=5).check_layers(4)
    with pytest.raises(ValueError, match=r"triangle_layer_indices must be less than num_layers=4, got 4, 6"):
        TriangleMixConfig(triangle_layer_indices=[0, 4, 6]).check_layers(4)
    with pytest.raises(ValueError, match=r"num_layers must be a positive integer, got 0"):
        TriangleMixConfig().check_layers(0)


def test_explicit_constructors() -> None:
    deepest = TriangleMixConfig.deepest(3, num_layers=10, num_sink_tokens=8, min_seq_len=0)
    assert deepest == TriangleMixConfig(8, triangle_layer_indices=[7, 8, 9], min_seq_len=0)
    assert TriangleMixConfig.deepest(0, num_layers=10).layers() == ()
    assert TriangleMixConfig.deepest(10, num_layers=10).layers() == tuple(range(10))
    start = TriangleMixConfig.from_layer(7, num_layers=10, sliding_window_size=1, num_last_tokens=2)
    assert start == TriangleMixConfig(4, 1, 2, triangle_layer_indices=[7, 8, 9])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TriangleMixConfig.deepest(11, num_layers=10), "n must be at most num_layers=10, got 11"),
        (lambda: TriangleMixConfig.deepest(-1, num_layers=10), "n must be a non-negative integer, got -1"),
        (lambda: TriangleMixConfig.deepest(1, num_layers=0), "num_layers must be a positive integer, got 0"),
        (
            lambda: TriangleMixConfig.from_layer(10, num_layers=10),
            "start must be less than num_layers=10, got 10",
        ),
        (
            lambda: TriangleMixConfig.from_layer(1.0, num_layers=10),
            "start must be a non-negative integer, got 1.0",
        ),
        (lambda: TriangleMixConfig.deepest(1, num_layers=9, sinks=4), "unknown parameter sinks"),
        (lambda: TriangleMixConfig.from_layer(1, num_layers=9, last=4, w=3), "unknown parameter last, w"),
        (
            lambda: TriangleMixConfig.deepest(1, num_layers=9, triangle_layer_indices=[1]),
            "unknown parameter triangle_layer_indices",
        ),
        (lambda: TriangleMixConfig.deepest(1, num_layers=9, num_last_tokens=-4), "num_last_tokens must be"),
        (lambda: TriangleMixConfig().replace(sinks=1, window=2), "unknown parameter sinks, window"),
        (lambda: TriangleMixConfig().replace(num_sink_tokens=-1), "num_sink_tokens must be a non-negative"),
    ],
)
def test_constructors_refuse(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_replace() -> None:
    config = TriangleMixConfig(triangle_layer_indices=[1])
    changed = config.replace(num_sink_tokens=9, triangle_layer_indices=[3, 2])
    assert changed == TriangleMixConfig(9, triangle_layer_indices=(2, 3))
    assert config.num_sink_tokens == 4


def test_fingerprint_changes_with_every_field() -> None:
    config = TriangleMixConfig(num_triangle_layers=3, triangle_layer_indices=[5])
    changes = {
        "num_sink_tokens": 5,
        "sliding_window_size": 33,
        "num_last_tokens": 65,
        "num_triangle_layers": 4,
        "triangle_layer_indices": [6],
        "min_seq_len": 2049,
        "dynamic_layer_indices": [7],
        "dynamic_share": 0.5,
        "dynamic_method": "antidiagonal",
        "dynamic_block": 64,
        "dynamic_group": 64,
    }
    assert set(changes) == {field.name for field in dataclasses.fields(config)}
    prints = {config.replace(**{name: value}).fingerprint() for name, value in changes.items()}
    assert len({config.fingerprint(), *prints}) == 1 + len(changes)
    assert TriangleMixConfig().fingerprint() != TriangleMixConfig(triangle_layer_indices=[]).fingerprint()


def test_fingerprint_is_the_same_in_every_process() -> None:
    program = (
        "from tmx_compile.config import TriangleMixConfig\n"
        "print(TriangleMixConfig(8, triangle_layer_indices={9, 4, 17}).fingerprint())"
    )
    root = str(Path(config_module.__file__).parents[2])
    expected = TriangleMixConfig(8, triangle_layer_indices=[17, 9, 4]).fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", expected)
    for seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected


def test_config_needs_the_standard_library_only() -> None:
    """Until it is handed a model to check: that is in a function of its own."""
    imported: list[str] = []
    modules = environment_module, geometry_module, selection_module
    for path in (*Path(config_module.__file__).parent.glob("*.py"), *(Path(module.__file__) for module in modules)):
        if path.name in ("fingerprint.py", "prices.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lazy = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check_model"]
        typing = [node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"]
        left_out = {id(inner) for node in (*lazy, *typing) for inner in ast.walk(node)}
        nodes = [node for node in ast.walk(tree) if id(node) not in left_out]
        imported += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    others = {
        name
        for name in imported
        if not name.startswith(("tmx_compile.config", "tmx_compile.mask.geometry", "tmx_compile.mask.selection"))
    }
    assert {name.split(".")[0] for name in others} <= sys.stdlib_module_names
    assert "json" in others
