"""AscendNPUTriangleMixOptimizer against a float64 oracle, and what it and the module compute."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import attended, oracle, tolerance
from tests.support.original import (
    INF,
    Largest,
    additive,
    by_mask,
    kernel,
    nonempty,
    optimize,
    products,
    tensors,
    written_out,
)
from tmx_compile import AscendTriangleMixAttention, TriangleMixConfig, TriangleMixMaskGenerator
from tmx_compile.legacy import block_sparse

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
        patch.setattr(block_sparse, "BUDGET", budget)
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
    monkeypatch.setattr(block_sparse, "BUDGET", 1 << 14)
    with Largest(only=torch.ops.aten.bmm.default) as largest:
        out = kernel(query, key, value, torch.zeros(512, 512), 0.3, 32)
    assert 0 < largest.numel <= 1 << 14
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
