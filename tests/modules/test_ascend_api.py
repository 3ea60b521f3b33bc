"""AscendTriangleMixAttention and AscendNPUTriangleMixOptimizer against a float64 oracle, and what they compute."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import tmx_compile
from tests.support import attended, oracle, tolerance
from tmx_compile import (
    AscendNPUTriangleMixOptimizer,
    AscendTriangleMixAttention,
    TriangleMixConfig,
    TriangleMixInferenceConfig,
    TriangleMixMaskGenerator,
)
from tmx_compile.modules import block_sparse

INF = float("inf")
kernel = AscendNPUTriangleMixOptimizer.sparse_attention_kernel
optimize = AscendNPUTriangleMixOptimizer.optimize_mask_for_npu


def tensors(batch=1, rows=40, keys=None, heads=4, kv_heads=2, dim=8, v_dim=None, dtype=torch.float32, grad=False):
    """query, key, value in the layout of the original API: (batch, seq, heads, head_dim)."""
    keys = rows if keys is None else keys
    shapes = [(rows, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim or dim)]
    return [torch.randn(batch, *shape).to(dtype).requires_grad_(grad) for shape in shapes]


def written_out(query, key, value, scores_added, seen, scale):
    """Every score in float64; ``scores_added`` and ``seen`` broadcast to (B, H, Sq, Skv). A row without keys is 0."""
    group = query.shape[2] // key.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scale + scores_added.double()).masked_fill(~seen, -INF)
    alive = seen.expand(scores.shape).any(-1, keepdim=True)
    return (torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive @ v).transpose(1, 2)


def by_mask(query, key, value, mask, scale):
    """What the kernel promises: floats from -1e4 down mask, the others are added."""
    return written_out(query, key, value, mask.clamp(min=-1e4), mask > -9984.0, scale)


def additive(seen, dtype=torch.float32):
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -INF)


class Products(TorchDispatchMode):
    """Counts the multiplications of every matrix product."""

    def __init__(self):
        super().__init__()
        self.count, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            *batch, m, k = args[0].shape
            self.count += (batch[0] if batch else 1) * m * k * args[1].shape[-1]
            self.calls += 1
        return func(*args, **(kwargs or {}))


# The mask for NPU kernels.


@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, -1e6), (torch.float64, -1e6), (torch.float16, -65504.0), (torch.bfloat16, -999424.0)],
)
def test_infinity_becomes_a_large_finite_number(dtype, masked):
    made_by = TriangleMixMaskGenerator(TriangleMixConfig(2, 3, 4))
    mask = made_by.get_attention_mask(20, 0, dtype=dtype, use_triangle=True)
    before = mask.clone()
    ready = optimize(mask, block_size=7)
    assert (ready.shape, ready.dtype) == (mask.shape, dtype)
    assert (ready[mask == 0] == 0).all()
    assert (ready[mask == -INF] == masked).all()
    assert torch.equal(mask, before)  # the cached mask of the generator is not written to
    assert torch.equal(optimize(ready), ready)


def test_other_values_of_a_mask_stay_and_any_shape_is_kept():
    mask = torch.tensor([-INF, -3.5, 0.0, 2.0, torch.finfo(torch.float32).min])
    assert optimize(mask).tolist() == [-1e6, -3.5, 0.0, 2.0, -1e6]
    for shape in ((), (3,), (2, 1, 5, 7), (0, 4)):
        assert optimize(torch.full(shape, -INF)).shape == shape


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_mask_that_cannot_hold_infinity_is_refused(dtype):
    mask = torch.zeros(4, 4, dtype=dtype)
    with pytest.raises(ValueError, match=rf"mask.dtype must hold -inf, so one of torch.float16, .*, got {dtype}"):
        optimize(mask)
    query, key, value = tensors(rows=4)
    with pytest.raises(ValueError, match=re.escape(f"got {dtype}")):
        kernel(query, key, value, mask, 1.0)


# The block-sparse kernel.


@pytest.mark.parametrize("block", [1, 7, 16, 64, 1000])
@pytest.mark.parametrize("shape", [(), (1, 1), (3, 1), (3, 4), (1, 4)], ids=str)
def test_kernel_equals_the_written_out_mask(shape, block):
    torch.manual_seed(0)
    query, key, value = tensors(3, 45, 50)
    seen = torch.rand(*shape, 45, 50) < 0.06
    mask = additive(seen)
    out = kernel(query, key, value, mask, 0.3, block)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), by_mask(query, key, value, mask, 0.3), rtol=0, atol=2e-5)


def test_finite_scores_of_a_mask_are_added():
    query, key, value = tensors(2, 33)
    bias = torch.randn(2, 4, 33, 33) * 3
    out = kernel(query, key, value, bias, 0.3, 16)
    torch.testing.assert_close(out.double(), by_mask(query, key, value, bias, 0.3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("masked", [-INF, -1e4, -1e6, torch.finfo(torch.float32).min])
def test_every_large_negative_number_masks_alike(masked):
    query, key, value = tensors(rows=30)
    seen = attended(30, 30, None, 2, 3, 4)[0]
    mask = torch.zeros(30, 30).masked_fill(~seen, masked)
    expected = kernel(query, key, value, additive(seen), 0.3, 8)
    assert torch.equal(kernel(query, key, value, mask, 0.3, 8), expected)
    assert torch.equal(kernel(query, key, value, optimize(mask), 0.3, 8), expected)
    assert torch.equal(kernel(query, key, value, optimize(mask.half()), 0.3, 8), expected)


def test_rows_without_keys_are_zero_in_computed_and_in_skipped_blocks():
    query, key, value = tensors(rows=24)
    seen = torch.ones(24, 24, dtype=torch.bool)
    seen[3] = seen[8:16] = False
    for mask in (additive(seen), optimize(additive(seen))):
        out = kernel(query, key, value, mask, 0.3, 8)
        assert (out[:, ~seen.any(1)] == 0).all()
        assert (out[:, seen.any(1)] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_stays_within_its_rounding(dtype):
    torch.manual_seed(1)
    query, key, value = tensors(2, 70, dtype=dtype, dim=16)
    mask = optimize(additive(attended(70, 70, None, 2, 9, 5)[0], dtype))
    out = kernel(query, key, value, mask, 0.25, 32)
    assert out.dtype is dtype
    error = (out.double() - by_mask(query, key, value, mask, 0.25)).abs().max()
    assert error < tolerance(dtype)


@pytest.mark.parametrize("size", [70, 450])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_float16_scores_beyond_its_range_do_not_overflow(size, layer_idx):
    """Scores of 16 x size squared, above 65504; in float64 they make a softmax that picks one key, or shares evenly."""
    torch.manual_seed(2)
    query, key, value = tensors(1, 64, dim=16, dtype=torch.float16)
    query, key = (x.sign() * size for x in (query, key))
    seen = attended(64, 64, None, 2, 5, 64 * layer_idx)[0]
    expected = written_out(query, key, value, torch.zeros(()), seen, 1.0)
    out = kernel(query, key, value, optimize(additive(seen, torch.float16)), 1.0, 16)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)
    layer = AscendTriangleMixAttention(4, 16, 1.0, TriangleMixConfig(2, 5, 0, 1, min_seq_len=1), layer_idx)
    out = layer(query, key, value)
    assert out.isfinite().all()
    if size == 70:
        # The operator normalises by the log of the sum, whose float32 rounding near 8e4 is 0.4% of a weight.
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)


@st.composite
def problems(draw):
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rows = draw(st.integers(1, 40))
    keys = rows + draw(st.sampled_from([0, 0, 1, 13]))
    sizes = dict(batch=batch, rows=rows, keys=keys, heads=kv_heads * group, kv_heads=kv_heads)
    sizes |= dict(dim=draw(st.integers(1, 9)), v_dim=draw(st.sampled_from([None, 1, 5])))
    mask = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, kv_heads * group])), rows, keys)
    geometry = tuple(draw(st.integers(0, 45)) for _ in range(3))
    return sizes, mask, geometry, draw(st.integers(1, 50)), draw(st.integers(0, 2**30))


@settings(max_examples=120, deadline=None)
@given(problem=problems(), density=st.sampled_from([0.02, 0.3, 1.0]), budget=st.sampled_from([1, 5000, 1 << 24]))
def test_any_problem_equals_the_oracle(problem, density, budget):
    """Random masks and triangles, through the kernel and the module, whatever is computed at once."""
    sizes, shape, geometry, block, seed = problem
    torch.manual_seed(seed)
    query, key, value = tensors(**sizes)
    mask = additive(torch.rand(shape) < density)
    mask = mask + torch.randn(shape) * (seed % 2)
    scale = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse, "_BUDGET", budget)
        out = kernel(query, key, value, mask, scale, block)
        torch.testing.assert_close(out.double(), by_mask(query, key, value, mask, scale), rtol=0, atol=3e-5)
        config = TriangleMixConfig(*geometry, triangle_layer_indices=[1], min_seq_len=0)
        for layer_idx in (0, 1):
            layer = AscendTriangleMixAttention(sizes["heads"], sizes["dim"], scale, config, layer_idx)
            layer.block_size = block
            counts = geometry if layer_idx else (0, 0, sizes["keys"])
            seen = attended(sizes["rows"], sizes["keys"], None, *counts)[0] & (mask > -9984.0)
            expected = written_out(query, key, value, mask.clamp(min=-1e4), seen, scale)
            torch.testing.assert_close(layer(query, key, value, mask).double(), expected, rtol=0, atol=3e-5)
            expected = oracle(*(x.transpose(1, 2) for x in (query, key, value)), None, *counts, scale)[0]
            torch.testing.assert_close(layer(query, key, value).double(), expected.transpose(1, 2), rtol=0, atol=3e-5)


# What is computed.


def products(call, *arguments):
    with torch.no_grad(), Products() as counted:
        call(*arguments)
    return counted


def nonempty(seen, block):
    """Non-empty blocks of each mask plane, counted cell by cell."""
    seen = seen.reshape(-1, *seen.shape[-2:])
    rows, keys = (range(0, n, block) for n in seen.shape[1:])
    return sum(bool(plane[r : r + block, k : k + block].any()) for plane in seen for r in rows for k in keys)


@pytest.mark.parametrize(("n", "block"), [(256, 32), (250, 32), (300, 17), (64, 64)])
@pytest.mark.parametrize("shape", ["nn", "11nn", "b1nn", "bhnn"])
def test_emptied_blocks_cost_nothing(n, block, shape):
    """Every product there is multiplies a block that is left: block x block scores of head_dim, and as many back."""
    torch.manual_seed(3)
    batch, heads, dim, v_dim = 2, 4, 8, 5
    query, key, value = tensors(batch, n, heads=heads, dim=dim, v_dim=v_dim)
    seen = attended(n, n, None, 4, 20, 10)[0]
    seen = seen & (torch.rand({"nn": (), "11nn": (1, 1), "b1nn": (2, 1), "bhnn": (2, 4)}[shape] + (n, n)) < 0.5)
    shared = {"nn": 8, "11nn": 8, "b1nn": 4, "bhnn": 1}[shape]
    left = nonempty(seen, block) * shared
    counted = products(kernel, query, key, value, additive(seen), 0.3, block)
    assert counted.count == left * block * block * (dim + v_dim)
    whole = products(kernel, query, key, value, torch.zeros(n, n), 0.3, block)
    assert whole.count == 8 * (-(-n // block)) ** 2 * block * block * (dim + v_dim)
    assert counted.count < whole.count or n == block
    assert products(kernel, query, key, value, torch.full((n, n), -INF), 0.3, block).count == 0


def test_work_of_a_triangle_grows_with_the_length_and_calls_do_not():
    """Twice the tokens cost twice the blocks, in hardly more products: no loop over cells or blocks."""
    config = TriangleMixConfig(4, 64, 0, num_triangle_layers=1)
    made_by = TriangleMixMaskGenerator(config)
    found = []
    for n in (512, 1024, 2048):
        query, key, value = tensors(1, n, heads=1, kv_heads=1)
        mask = optimize(made_by.get_attention_mask(n, 0, use_triangle=True))
        found.append(products(kernel, query, key, value, mask, 0.3, 64))
    assert [b.count - a.count for a, b in itertools.pairwise(found)] == [
        found[1].count - found[0].count,
        2 * (found[1].count - found[0].count),
    ]
    assert [each.calls for each in found] == [6, 6, 6]  # one, two or three key blocks a row block


def test_the_module_skips_what_its_plan_or_the_mask_empties():
    n, block, dim = 512, 64, 8
    query, key, value = tensors(1, n, heads=1, kv_heads=1)
    layer = AscendTriangleMixAttention(1, dim, 0.3, TriangleMixConfig(4, 32, 8, 1, min_seq_len=256), 0)
    mask = torch.zeros(1, 1, n, n)
    mask[..., :128] = -INF
    seen = attended(n, n, None, 4, 32, 8)[0] & (mask[0, 0] == 0)
    counted = products(layer, query, key, value, mask)
    assert counted.count == nonempty(seen, block) * block * block * 2 * dim
    dense = AscendTriangleMixAttention(1, dim, 0.3)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    counted = products(dense, query, key, value, torch.zeros(n, n))
    assert counted.count == nonempty(causal, block) * block * block * 2 * dim


def test_the_kernel_gathers_no_more_than_its_budget(monkeypatch):
    """A row block that attends to all keys is walked in parts."""
    query, key, value = tensors(1, 512)
    monkeypatch.setattr(block_sparse, "_BUDGET", 1 << 14)
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.bmm.default:
                largest.append(out.numel())
            return out

    with Largest():
        out = kernel(query, key, value, torch.zeros(512, 512), 0.3, 32)
    assert max(largest) <= 1 << 14
    torch.testing.assert_close(out.double(), by_mask(query, key, value, torch.zeros(512, 512), 0.3), rtol=0, atol=2e-5)


# Gradients.


def test_gradients_of_the_kernel_are_those_of_the_written_out_form():
    torch.manual_seed(4)
    query, key, value = tensors(2, 21, dtype=torch.float64, grad=True)
    bias = torch.randn(2, 4, 21, 21, dtype=torch.float64)
    bias = bias.masked_fill(torch.rand(2, 4, 21, 21) < 0.8, -INF).requires_grad_()
    leaves = (query, key, value, bias)
    weight = torch.randn(2, 21, 4, 8, dtype=torch.float64)
    mine = torch.autograd.grad((kernel(*leaves, 0.3, 8) * weight).sum(), leaves)
    expected = torch.autograd.grad((by_mask(*leaves, 0.3) * weight).sum(), leaves)
    for a, b in zip(mine, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_gradients_of_the_module(layer_idx):
    query, key, value = tensors(1, 40, dtype=torch.float64, grad=True)
    layer = AscendTriangleMixAttention(4, 8, 0.3, TriangleMixConfig(2, 5, 4, 1, min_seq_len=8), layer_idx)
    counts = (0, 0, 40) if layer_idx else (2, 5, 4)
    weight = torch.randn(1, 40, 4, 8, dtype=torch.float64)
    mine = torch.autograd.grad((layer(query, key, value) * weight).sum(), (query, key, value))
    expected = oracle(*(x.transpose(1, 2) for x in (query, key, value)), None, *counts, 0.3)[0].transpose(1, 2)
    for a, b in zip(mine, torch.autograd.grad((expected * weight).sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# The module.


def test_both_classes_are_part_of_the_package():
    assert {"AscendTriangleMixAttention", "AscendNPUTriangleMixOptimizer"} <= set(tmx_compile.__all__)
    layer = AscendTriangleMixAttention(4, 8, 0.5, TriangleMixConfig(triangle_layer_indices=[1]), 1, 2)
    assert isinstance(layer, torch.nn.Module)
    assert (layer.num_heads, layer.head_dim, layer.scale, layer.layer_idx, layer.num_layers) == (4, 8, 0.5, 1, 2)
    assert list(layer.parameters()) == []
    assert "layer_idx=1" in repr(layer)
    assert copy.deepcopy(layer).trianglemix_config == layer.trianglemix_config


def test_the_plan_follows_the_layer_and_the_length():
    config = TriangleMixConfig(4, 32, 64, triangle_layer_indices=[1])
    sparse, dense = (AscendTriangleMixAttention(1, 8, 0.3, config, layer, 2) for layer in (1, 0))
    assert sparse.plan(2049) is config
    assert sparse.plan(2048) is None
    assert dense.plan(4096) is None
    assert AscendTriangleMixAttention(1, 8, 0.3).plan(4096) is None


@pytest.mark.parametrize("n", [2048, 2049])
def test_short_prompts_stay_dense(n):
    torch.manual_seed(5)
    query, key, value = tensors(1, n, heads=1, kv_heads=1, dim=4)
    config = TriangleMixConfig(4, 32, 64, triangle_layer_indices=[1])
    out = AscendTriangleMixAttention(1, 4, 0.5, config, 1, 2)(query, key, value)
    position = torch.arange(n)
    row, column = position[:, None], position
    seen = column <= row
    if n > 2048:
        seen = seen & ((column < 4) | (row - column <= 32) | (row >= n - 64))
    torch.testing.assert_close(
        out.double(), written_out(query, key, value, torch.zeros(()), seen, 0.5), rtol=0, atol=2e-5
    )


def test_earlier_keys_of_a_cache_come_first():
    query, key, value = tensors(2, 30, 50)
    layer = AscendTriangleMixAttention(4, 8, 0.3, TriangleMixConfig(2, 5, 4, 1, min_seq_len=8), 0)
    for module, counts in ((layer, (2, 5, 4)), (AscendTriangleMixAttention(4, 8, 0.3), (0, 0, 50))):
        expected = oracle(*(x.transpose(1, 2) for x in (query, key, value)), None, *counts, 0.3)[0].transpose(1, 2)
        torch.testing.assert_close(module(query, key, value).double(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_a_padding_mask_moves_sinks_and_last_rows(layer_idx):
    query, key, value = tensors(3, 40)
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, :11] = False
    valid[1, 25:] = False
    layer = AscendTriangleMixAttention(4, 8, 0.3, TriangleMixConfig(2, 5, 4, 1, min_seq_len=8), layer_idx)
    counts = (0, 0, 40) if layer_idx else (2, 5, 4)
    expected = oracle(*(x.transpose(1, 2) for x in (query, key, value)), valid, *counts, 0.3)[0].transpose(1, 2)
    out = layer(query, key, value, valid)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    assert (out[~valid] == 0).all()


def test_an_explicit_mask_narrows_the_plan_and_never_widens_it():
    query, key, value = tensors(2, 40)
    config = TriangleMixConfig(2, 5, 4, 1, min_seq_len=8)
    layer, dense = (AscendTriangleMixAttention(4, 8, 0.3, config, layer) for layer in (0, 1))
    triangle = attended(40, 40, None, 2, 5, 4)[0]
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    plain = layer(query, key, value)
    for mask in (
        torch.zeros(40, 40),
        additive(causal),
        additive(triangle)[None, None],
        torch.ones(1, 1, 40, 40).bool(),
        causal,
    ):
        torch.testing.assert_close(layer(query, key, value, mask), plain, rtol=0, atol=1e-5)
    assert not torch.allclose(dense(query, key, value), plain, atol=1e-2)
    torch.testing.assert_close(dense(query, key, value, additive(triangle)), plain, rtol=0, atol=1e-5)
    chosen = torch.rand(2, 4, 40, 40) < 0.5
    expected = written_out(query, key, value, torch.zeros(()), chosen & triangle, 0.3)
    for mask in (chosen, additive(chosen), optimize(additive(chosen))):
        torch.testing.assert_close(layer(query, key, value, mask).double(), expected, rtol=0, atol=2e-5)


def test_without_a_mask_no_score_matrix_is_formed():
    """8,192 tokens: N x N of one head would be 2**26 numbers."""
    query, key, value = tensors(1, 8192, heads=1, kv_heads=1, dim=4)
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            found = out if isinstance(out, (tuple, list)) else [out]
            largest[0] = max([largest[0], *(x.numel() for x in found if isinstance(x, torch.Tensor))])
            return out

    for layer_idx in (0, 1):
        layer = AscendTriangleMixAttention(1, 4, 0.5, TriangleMixConfig(num_triangle_layers=1), layer_idx)
        with Largest(), torch.no_grad():
            layer(query, key, value)
    assert largest[0] <= 1 << 22


def test_an_inference_configuration_is_taken_as_it_stands():
    settings = dict(enable_trianglemix=True, triangle_layer_indices=[1], npu_block_size=32)
    layer = AscendTriangleMixAttention(1, 8, 0.3, TriangleMixInferenceConfig(**settings), 1)
    assert layer.block_size == 32
    assert layer.plan(4096) == TriangleMixConfig(triangle_layer_indices=[1])
    off = AscendTriangleMixAttention(1, 8, 0.3, TriangleMixInferenceConfig(triangle_layer_indices=[1]), 1)
    assert off.plan(4096) is None


def test_a_configuration_without_a_layer_is_worth_a_warning():
    config = TriangleMixConfig(triangle_layer_indices=[1])
    with pytest.warns(UserWarning, match="without layer_idx no layer is a triangle layer"):
        assert AscendTriangleMixAttention(1, 8, 0.3, config).plan(4096) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AscendTriangleMixAttention(1, 8, 0.3)
        AscendTriangleMixAttention(1, 8, 0.3, TriangleMixConfig())


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_autocast_changes_nothing(layer_idx):
    query, key, value = tensors(1, 40)
    layer = AscendTriangleMixAttention(4, 8, 0.3, TriangleMixConfig(2, 5, 4, 1, min_seq_len=8), layer_idx)
    for mask in (None, torch.zeros(40, 40)):
        with torch.autocast("cpu", torch.bfloat16):
            rounded = layer(query, key, value, mask)
        assert torch.equal(rounded, layer(query, key, value, mask))


@pytest.mark.parametrize("layer_idx", [0, 1])
def test_without_a_mask_the_module_compiles_into_one_graph(layer_idx):
    query, key, value = tensors(1, 40)
    layer = AscendTriangleMixAttention(4, 8, 0.3, TriangleMixConfig(2, 5, 4, 1, min_seq_len=8), layer_idx)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), layer(query, key, value))
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[:, :7] = False
    assert torch.equal(compiled(query, key, value, valid), layer(query, key, value, valid))


# Refusals.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=0), "num_heads must be a positive integer, got 0"),
        (dict(head_dim=2.0), "head_dim must be a positive integer, got 2.0"),
        (dict(scale=None), "scale must be a finite number, got None"),
        (dict(scale=INF), "scale must be a finite number, got inf"),
        (dict(scale=True), "scale must be a finite number, got True"),
        (dict(trianglemix_config=7), "trianglemix_config must be a TriangleMixConfig, .* got 7"),
        (dict(layer_idx=-1), "layer_idx must be a non-negative integer, got -1"),
        (dict(layer_idx=4), "layer_idx must be less than num_layers=4, got 4"),
        (dict(num_layers=0), "num_layers must be a positive integer, got 0"),
        (dict(num_layers=2), "triangle_layer_indices must be less than num_layers=2, got 3"),
    ],
)
def test_what_makes_no_layer_is_refused(changes, message):
    config = TriangleMixConfig(triangle_layer_indices=[0, 3])
    arguments = dict(num_heads=4, head_dim=8, scale=0.3, trianglemix_config=config, layer_idx=0, num_layers=4)
    with pytest.raises(ValueError, match=message):
        AscendTriangleMixAttention(**(arguments | changes))


def operands(**changes):
    query, key, value = tensors()
    return {"query": query, "key": key, "value": value} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=None), "query must be a tensor, got None"),
        (dict(key=torch.zeros(40, 2, 8)), r"key must be \(batch, seq, heads, head_dim\), got shape \(40, 2, 8\)"),
        (dict(query=torch.zeros(1, 40, 4, 8).long()), "query must be a floating point tensor, got torch.int64"),
        (dict(value=torch.zeros(1, 40, 2, 8).half()), "value must have query's dtype torch.float32, got torch.float16"),
        (dict(key=torch.zeros(1, 40, 2, 8, device="meta")), "key must be on query's device cpu, got meta"),
        (dict(key=torch.zeros(2, 40, 2, 8)), r"must share the batch.*\(2, 40, 2, 8\)"),
        (dict(value=torch.zeros(1, 41, 2, 8)), r"must share the batch.*\(1, 41, 2, 8\)"),
        (dict(key=torch.zeros(1, 40, 2, 9)), r"must share the head_dim: .*\(1, 40, 2, 9\)"),
        (dict(key=torch.zeros(1, 40, 3, 8), value=torch.zeros(1, 40, 3, 8)), "divide query heads, got 3 and 4"),
        (dict(key=torch.zeros(1, 40, 0, 8), value=torch.zeros(1, 40, 0, 8)), "divide query heads, got 0 and 4"),
    ],
)
def test_operands_that_do_not_fit_are_refused_before_any_work(changes, message):
    given = operands(**changes)
    layer = AscendTriangleMixAttention(4, 8, 0.3)
    for call in (
        lambda: kernel(**given, mask=torch.zeros(40, 40), scale=0.3),
        lambda: layer(**given),
        lambda: layer(**given, attn_mask=torch.zeros(40, 40)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=2), "query must have num_heads=2 and head_dim=8, got 4 and 8"),
        (dict(head_dim=16), "query must have num_heads=4 and head_dim=16, got 4 and 8"),
    ],
)
def test_heads_of_another_layer_are_refused(changes, message):
    layer = AscendTriangleMixAttention(**(dict(num_heads=4, head_dim=8, scale=0.3) | changes))
    with pytest.raises(ValueError, match=message):
        layer(**operands())


def test_more_rows_than_keys_are_refused_by_the_module_alone():
    query, key, value = tensors(1, 9, 5)
    with pytest.raises(ValueError, match="query must not have more rows than there are keys, got 9, 5"):
        AscendTriangleMixAttention(4, 8, 0.3)(query, key, value)
    out = kernel(query, key, value, torch.zeros(9, 5), 0.3)
    torch.testing.assert_close(out.double(), by_mask(query, key, value, torch.zeros(9, 5), 0.3), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (3, "must be a tensor, got 3"),
        (torch.zeros(40, 41), r"must be \(rows, keys\) = \(40, 40\) or .* got shape \(40, 41\)"),
        (torch.zeros(1, 40, 40), r"got shape \(1, 40, 40\)"),
        (torch.zeros(2, 1, 40, 40), r"got shape \(2, 1, 40, 40\)"),
        (torch.zeros(1, 2, 40, 40), r"got shape \(1, 2, 40, 40\)"),
        (torch.zeros(40, 40, device="meta"), "must be on query's device cpu, got meta"),
        (torch.zeros(40, 40).int(), r"dtype must hold -inf, .* got torch.int32"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=f"^mask.*{message}"):
        kernel(**operands(), mask=mask, scale=0.3)
    with pytest.raises(ValueError, match=f"^attn_mask.*{message}"):
        AscendTriangleMixAttention(4, 8, 0.3)(**operands(), attn_mask=mask)


def test_a_boolean_mask_is_refused_where_its_meaning_is_open():
    with pytest.raises(ValueError, match=r"mask\.dtype must hold -inf"):
        kernel(**operands(), mask=torch.ones(40, 40, dtype=torch.bool), scale=0.3)
    layer = AscendTriangleMixAttention(4, 8, 0.3)
    query, key, value = tensors(6, 6)
    square = torch.ones(6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"shape \(6, 6\) may be \(batch, keys\) or \(rows, keys\)"):
        layer(query, key, value, square)
    torch.testing.assert_close(layer(query, key, value, square[None, None]), layer(query, key, value))
    with pytest.raises(ValueError, match=r"attn_mask must be .* got shape \(3, 6\)"):
        layer(query, key, value, torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="attn_mask must be on query's device cpu, got meta"):
        layer(**operands(), attn_mask=torch.ones(1, 40, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("block", [0, -1, 1.5, True, None])
def test_bad_block_sizes_are_refused(block):
    message = re.escape(f"block_size must be a positive integer, got {block!r}")
    with pytest.raises(ValueError, match=message):
        kernel(**operands(), mask=torch.zeros(40, 40), scale=0.3, block_size=block)
    with pytest.raises(ValueError, match=message):
        optimize(torch.zeros(4, 4), block)


def test_empty_inputs_give_empty_outputs():
    assert kernel(*tensors(0), torch.zeros(40, 40), 0.3).shape == (0, 40, 4, 8)
    assert kernel(*tensors(1, 0, 5), torch.zeros(0, 5), 0.3).shape == (1, 0, 4, 8)
    assert (kernel(*tensors(1, 5, 0), torch.zeros(5, 0), 0.3) == 0).all()
