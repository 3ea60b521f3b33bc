"""The classes of the original API: mask generator, attention masks per layer, gradient analyzer.

Run alone with ``python tests/trianglemix_attention_test.py [test name]``.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
from pathlib import Path

try:
    import pytest
    import torch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from tmx_compile.analysis import TriangleMixAnalyzer
    from tmx_compile.config import TriangleMixConfig
    from tmx_compile.legacy.masks import TriangleMixAttention, TriangleMixMaskGenerator
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    # Run with another Python than the one that was set up: go on with that one.
    venv = Path(__file__).resolve().parent.parent / ".venv"
    if Path(sys.prefix).resolve() != venv.resolve() and (venv / "bin/python").exists():
        os.execv(venv / "bin/python", [str(venv / "bin/python"), *sys.argv])
    sys.exit(f"{missing}; run `make test`, or `python tools/setup_env.py --extra dev`, once: that installs it")

SECTIONS = ("streaming", "last", "middle", "triangle", "dense")
GEOMETRIES = [
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (2, 3, 4),
    (4, 1, 2),
    (3, 0, 5),
    (7, 2, 1),
    (1, 6, 3),
    (40, 0, 0),
    (0, 40, 0),
    (0, 0, 40),
    (40, 40, 40),
    (2**31 - 1, 2**31 - 1, 2**31 - 1),
]


def published(section: str, n: int, si: int, sl: int, last: int) -> torch.Tensor:
    """The published formulas, cell by cell, with rows and columns counted from 1 as they are published."""
    mask = torch.zeros(n, n)
    for i in range(1, n + 1):
        for j in range(1, n + 1):
            causal = i >= j
            streaming = causal and (j <= si or i - j <= sl)
            late = causal and n - i < last and j > si and i - j > sl
            middle = causal and n - i >= last and j > si and i - j > sl
            mask[i - 1, j - 1] = {
                "streaming": streaming,
                "last": late,
                "middle": middle,
                "triangle": streaming + late,
                "dense": streaming + late + middle,
            }[section]
    return mask


def generator(si: int = 2, sl: int = 3, last: int = 4, **rest: object) -> TriangleMixMaskGenerator:
    return TriangleMixMaskGenerator(TriangleMixConfig(si, sl, last, **rest))


def build(section: str, made_by: TriangleMixMaskGenerator, n: int, **rest: object) -> torch.Tensor:
    return getattr(made_by, f"_create_{section}_mask")(n, **rest)


# Masks against the published formulas.


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("section", SECTIONS)
def test_sections_equal_the_published_formulas(section: str, geometry: tuple[int, int, int]) -> None:
    for n in (1, 2, 3, 7, 13):
        torch.testing.assert_close(
            build(section, generator(*geometry), n), published(section, n, *geometry), rtol=0, atol=0
        )


counts = st.integers(0, 22)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 18), geometry=st.tuples(counts, counts, counts))
def test_any_geometry_equals_the_published_formulas(n: int, geometry: tuple[int, int, int]) -> None:
    made_by = generator(*geometry)
    for section in SECTIONS:
        assert torch.equal(build(section, made_by, n), published(section, n, *geometry)), section


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), geometry=st.tuples(counts, counts, counts))
def test_sections_are_disjoint_and_sum_to_the_causal_triangle(n: int, geometry: tuple[int, int, int]) -> None:
    made_by = generator(*geometry)
    streaming, late, middle = (build(section, made_by, n, dtype=torch.int64) for section in SECTIONS[:3])
    total = streaming + late + middle
    assert total.max() == 1
    assert torch.equal(total, torch.ones(n, n, dtype=torch.int64).tril())
    assert torch.equal(streaming + late, build("triangle", made_by, n, dtype=torch.int64))


def test_counts_of_sinks_window_and_last_rows() -> None:
    triangle = build("triangle", generator(2, 3, 4), 20, dtype=torch.int64)
    # Row 10 lies in the Middle rows: 2 sinks, and a window of 3 + 1 keys with its own.
    assert triangle[10].nonzero().flatten().tolist() == [0, 1, 7, 8, 9, 10]
    whole = [row for row in range(20) if triangle[row, : row + 1].all()]
    assert whole == [0, 1, 2, 3, 4, 5, 16, 17, 18, 19]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool])
def test_sections_come_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    for section in SECTIONS:
        mask = build(section, generator(), 9, device=torch.device("cpu"), dtype=dtype)
        assert mask.dtype is dtype
        assert mask.shape == (9, 9)
        assert torch.equal(mask.float(), published(section, 9, 2, 3, 4))


# The additive mask and its cache.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("use_triangle", [False, True])
def test_attention_mask_is_zero_where_attended_and_minus_inf_elsewhere(dtype: torch.dtype, use_triangle: bool) -> None:
    mask = generator().get_attention_mask(17, 0, "cpu", dtype, use_triangle=use_triangle)
    attended = published("triangle" if use_triangle else "dense", 17, 2, 3, 4).bool()
    assert mask.dtype is dtype
    assert (mask[attended] == 0).all()
    assert (mask[~attended] == float("-inf")).all()


def test_dense_is_the_default_and_the_flag_alone_decides() -> None:
    made_by = generator(triangle_layer_indices=[1])
    assert torch.equal(made_by.get_attention_mask(12, 1) == 0, torch.ones(12, 12).tril().bool())
    # Layer 0 is no triangle layer; the caller asked for the triangle mask all the same.
    assert not torch.equal(made_by.get_attention_mask(12, 0, use_triangle=True), made_by.get_attention_mask(12, 0))


def test_softmax_under_the_mask_has_no_nan() -> None:
    mask = generator(0, 0, 0).get_attention_mask(8, 0, use_triangle=True)
    assert torch.equal(torch.softmax(torch.randn(8, 8) + mask, -1), torch.eye(8))


def test_cache_returns_the_same_tensor_until_cleared() -> None:
    made_by = generator()
    first = made_by.get_attention_mask(16, 0, "cpu", torch.float32, use_triangle=True)
    assert made_by.get_attention_mask(16, 5, torch.device("cpu"), use_triangle=True) is first
    made_by.clear_cache()
    second = made_by.get_attention_mask(16, 0, use_triangle=True)
    assert second is not first
    assert torch.equal(first, second)


def test_cache_tells_apart_everything_that_shapes_a_mask() -> None:
    made_by = generator()
    base = made_by.get_attention_mask(16, 0)
    others = [
        made_by.get_attention_mask(15, 0),
        made_by.get_attention_mask(16, 0, "meta"),
        made_by.get_attention_mask(16, 0, dtype=torch.float64),
        made_by.get_attention_mask(16, 0, use_triangle=True),
    ]
    described = {(tuple(m.shape), m.device.type, m.dtype, id(m)) for m in [base, *others]}
    assert len(described) == 5
    before = made_by.get_attention_mask(16, 0, use_triangle=True)
    made_by.config = made_by.config.replace(num_sink_tokens=9)
    assert not torch.equal(made_by.get_attention_mask(16, 0, use_triangle=True), before)


def test_cache_is_bounded_and_drops_the_least_recently_used() -> None:
    made_by = generator()
    kept, dropped = made_by.get_attention_mask(5, 0), made_by.get_attention_mask(6, 0)
    for n in range(7, 10):
        made_by.get_attention_mask(n, 0)
        assert made_by.get_attention_mask(5, 0) is kept
    assert len(made_by._cache) == 4
    assert made_by.get_attention_mask(6, 0) is not dropped


def test_cached_mask_of_inference_mode_serves_training() -> None:
    made_by = generator()
    with torch.inference_mode():
        mask = made_by.get_attention_mask(6, 0)
    assert not mask.is_inference()
    scores = torch.randn(6, 6, requires_grad=True)
    (torch.softmax(scores, -1) * mask.exp()).sum().backward()
    assert scores.grad is not None


def test_fake_masks_are_not_cached() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made_by = generator()
    with FakeTensorMode():
        made_by.get_attention_mask(6, 0)
    assert type(made_by.get_attention_mask(6, 0)) is torch.Tensor


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_leave_the_masks_behind(duplicate: object) -> None:
    made_by = generator()
    mask = made_by.get_attention_mask(16, 0)
    twin = duplicate(made_by)
    assert twin.config == made_by.config
    assert len(twin._cache) == 0
    assert torch.equal(twin.get_attention_mask(16, 0), mask)
    assert made_by.get_attention_mask(16, 0) is mask


# Masks per layer.


def test_attention_gives_masks_to_triangle_layers_of_long_prompts_only() -> None:
    config = TriangleMixConfig(triangle_layer_indices=[2, 3])
    attention = TriangleMixAttention(config, 4)
    assert (attention.config, attention.num_layers) == (config, 4)
    assert attention.mask_generator.config is config
    assert [attention.should_use_triangle(layer) for layer in range(4)] == [False, False, True, True]
    assert attention.get_attn_mask(2048, 3, "cpu") is None
    assert attention.get_attn_mask(2049, 1, "cpu") is None
    mask = attention.get_attn_mask(2049, 3, "meta")
    assert mask is not None
    assert mask.shape == (2049, 2049)
    assert mask.dtype is torch.float32


def test_attention_reads_the_threshold_of_the_configuration() -> None:
    attention = TriangleMixAttention(TriangleMixConfig(2, 3, 4, 1, min_seq_len=10), 2)
    assert attention.get_attn_mask(10, 0, "cpu") is None
    mask = attention.get_attn_mask(11, 0, "cpu", torch.float16)
    assert mask is not None
    assert mask.dtype is torch.float16
    assert torch.equal(mask == 0, published("triangle", 11, 2, 3, 4).bool())


def test_without_layers_nothing_is_triangle() -> None:
    assert not any(generator().should_use_triangle(layer) for layer in range(8))
    first = generator(num_triangle_layers=2)
    assert [first.should_use_triangle(layer) for layer in range(4)] == [True, True, False, False]


# Refusals.


@pytest.mark.parametrize("seq_len", [0, -1, 2.0, True, "8", None])
def test_bad_seq_len_is_refused(seq_len: object) -> None:
    message = re.escape(f"seq_len must be a positive integer, got {seq_len!r}")
    made_by = generator(num_triangle_layers=1)
    for section in SECTIONS:
        with pytest.raises(ValueError, match=message):
            build(section, made_by, seq_len)
    with pytest.raises(ValueError, match=message):
        made_by.get_attention_mask(seq_len, 0)
    with pytest.raises(ValueError, match=message):
        TriangleMixAttention(made_by.config, 2).get_attn_mask(seq_len, 0, "cpu")


@pytest.mark.parametrize("layer_idx", [-1, 1.5, False, None])
def test_bad_layer_is_refused(layer_idx: object) -> None:
    message = re.escape(f"layer_idx must be a non-negative integer, got {layer_idx!r}")
    attention = TriangleMixAttention(TriangleMixConfig(num_triangle_layers=1), 2)
    calls = [
        lambda: attention.mask_generator.get_attention_mask(8, layer_idx),
        lambda: attention.mask_generator.should_use_triangle(layer_idx),
        lambda: attention.should_use_triangle(layer_idx),
        lambda: attention.get_attn_mask(8, layer_idx, "cpu"),
        lambda: TriangleMixAnalyzer(2).record_middle_qk_gradient(layer_idx, 1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_layer_beyond_the_model_is_refused() -> None:
    attention = TriangleMixAttention(TriangleMixConfig(), 4)
    for call in (
        lambda: attention.should_use_triangle(4),
        lambda: attention.get_attn_mask(8, 4, "cpu"),
        lambda: TriangleMixAnalyzer(4).record_middle_qk_gradient(4, 1.0),
    ):
        with pytest.raises(ValueError, match=r"layer_idx must be less than num_layers=4, got 4"):
            call()
    with pytest.raises(ValueError, match=r"triangle_layer_indices must be less than num_layers=4, got 4, 9"):
        TriangleMixAttention(TriangleMixConfig(triangle_layer_indices=[1, 4, 9]), 4)
    with pytest.raises(ValueError, match=r"num_layers must be a positive integer, got 0"):
        TriangleMixAttention(TriangleMixConfig(), 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_dtype_without_minus_inf_is_refused(dtype: torch.dtype) -> None:
    attention = TriangleMixAttention(TriangleMixConfig(num_triangle_layers=1), 2)
    message = re.escape(f"got {dtype}")
    # The second call would return None for so short a prompt: the arguments are looked at first.
    with pytest.raises(ValueError, match=message):
        attention.mask_generator.get_attention_mask(8, 0, "cpu", dtype)
    with pytest.raises(ValueError, match=message):
        attention.get_attn_mask(8, 0, "cpu", dtype)


def test_what_is_no_device_dtype_or_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device must be .*'nowhere'"):
        generator().get_attention_mask(8, 0, "nowhere")
    with pytest.raises(ValueError, match=r"device must be .*'nowhere'"):
        generator()._create_dense_mask(8, "nowhere")
    with pytest.raises(ValueError, match=r"dtype must be a torch.dtype, got 'float'"):
        generator()._create_dense_mask(8, "cpu", "float")
    with pytest.raises(ValueError, match=r"config must be a TriangleMixConfig, got 7"):
        TriangleMixMaskGenerator(7)


# The analyzer.


def test_analyzer_picks_the_lowest_means_in_ascending_order() -> None:
    analyzer = TriangleMixAnalyzer(5)
    assert (analyzer.num_layers, analyzer.middle_qk_gradients) == (5, {})
    for layer, gradients in {0: [5.0], 1: [0.1, 0.5], 2: [9.0, 0.0], 4: [0.2, 0.2]}.items():
        for gradient in gradients:
            analyzer.record_middle_qk_gradient(layer, gradient)
    assert analyzer.middle_qk_gradients == {0: [5.0], 1: [0.1, 0.5], 2: [9.0, 0.0], 4: [0.2, 0.2]}
    assert [analyzer.get_triangle_layers(n) for n in range(5)] == [[], [4], [1, 4], [1, 2, 4], [0, 1, 2, 4]]


def test_analyzer_never_picks_a_layer_without_records() -> None:
    analyzer = TriangleMixAnalyzer(8)
    analyzer.record_middle_qk_gradient(3, 100.0)
    assert analyzer.get_triangle_layers(1) == [3]
    with pytest.raises(ValueError, match=r"recorded layers, 1 of 8, got 2"):
        analyzer.get_triangle_layers(2)
    analyzer.reset()
    assert analyzer.middle_qk_gradients == {}
    with pytest.raises(ValueError, match=r"recorded layers, 0 of 8, got 1"):
        analyzer.get_triangle_layers(1)


def test_analyzer_breaks_ties_from_the_deep_end() -> None:
    analyzer = TriangleMixAnalyzer(4)
    for layer in (3, 0, 2, 1):
        # Thrice 0.1 sums to something else than 0.3; the means tie all the same.
        for _ in range(1 + 2 * (layer % 2)):
            analyzer.record_middle_qk_gradient(layer, 0.1)
    assert analyzer.get_triangle_layers(2) == [2, 3]
    assert analyzer.get_triangle_layers(3) == [1, 2, 3]


def test_analyzer_reduces_tensors_to_the_mean_magnitude() -> None:
    analyzer = TriangleMixAnalyzer(1)
    wide = torch.full((40, 50), 60000.0, dtype=torch.float16)  # its sum overflows float16
    for gradient in (torch.tensor([[-1.0, 3.0]], requires_grad=True), torch.tensor(-2), wide, -2, 0.5):
        analyzer.record_middle_qk_gradient(0, gradient)
    assert analyzer.middle_qk_gradients == {0: [2.0, 2.0, float(wide[0, 0]), 2.0, 0.5]}


@pytest.mark.parametrize(
    ("gradient", "reason"),
    [
        (float("nan"), "must be finite, got nan"),
        (float("-inf"), "must be finite, got inf"),
        (10**400, "must be finite, got inf"),
        (torch.tensor([1.0, float("nan")]), "must be finite, got nan"),
        (torch.tensor([1.0, float("inf")]), "must be finite, got inf"),
        (torch.empty(0, 3), "non-empty numeric tensor, got shape (0, 3)"),
        (torch.tensor([True]), "dtype torch.bool"),
        ("0.5", "must be a number or a tensor, got '0.5'"),
        (True, "must be a number or a tensor, got True"),
        (None, "must be a number or a tensor, got None"),
    ],
)
def test_analyzer_refuses_what_is_no_finite_gradient(gradient: object, reason: str) -> None:
    analyzer = TriangleMixAnalyzer(4)
    with pytest.raises(ValueError, match=f"gradient of layer 2 .*{re.escape(reason)}"):
        analyzer.record_middle_qk_gradient(2, gradient)
    assert analyzer.middle_qk_gradients == {}


def test_analyzer_refuses_bad_counts() -> None:
    with pytest.raises(ValueError, match=r"num_layers must be a positive integer, got 0"):
        TriangleMixAnalyzer(0)
    with pytest.raises(ValueError, match=r"num_triangle_layers must be a non-negative integer, got -1"):
        TriangleMixAnalyzer(3).get_triangle_layers(-1)


if __name__ == "__main__":
    chosen = ["-k", " or ".join(sys.argv[1:])] if sys.argv[1:] else []
    # Hypothesis is imported above, which is too late for pytest to rewrite its asserts.
    status = pytest.main([__file__, *chosen, "-W", "ignore::pytest.PytestAssertRewriteWarning"])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        sys.exit(f"no test in this file has {' or '.join(sys.argv[1:])} in its name")
    sys.exit(status)
