"""AscendTriangleMixAttention against a float64 oracle, and what both classes of the original API refuse."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch

import tmx_compile
from tests.support.oracle import attended, oracle
from tests.support.original import (
    INF,
    Largest,
    additive,
    by_mask,
    kernel,
    optimize,
    tensors,
    written_out,
)
from tmx_compile import AscendTriangleMixAttention, TriangleMixConfig, TriangleMixInferenceConfig
from tmx_compile.operator import ALL_ROWS


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
    counts = (0, 0, ALL_ROWS) if layer_idx else (2, 5, 4)
    expected = oracle(*(x.transpose(1, 2) for x in (query, key, value)), valid, *counts, 0.3)[0].transpose(1, 2)
    out = layer(query, key, value, valid)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    assert (out[0, :11] == 0).all()


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
    for layer_idx in (0, 1):
        layer = AscendTriangleMixAttention(1, 4, 0.5, TriangleMixConfig(num_triangle_layers=1), layer_idx)
        with Largest() as largest, torch.no_grad():
            layer(query, key, value)
        assert 0 < largest.numel <= 1 << 22


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
