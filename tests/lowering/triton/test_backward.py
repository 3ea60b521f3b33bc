"""The backward kernels, in Triton's interpreter where there is no GPU, against float64 with the mask written out."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.support.calls import Case
from tests.support.gradients import reference, worst_errors
from tests.support.problems import CASES, cases
from tmx_compile.lowering.triton import backward_launch, launch, tuning
from tmx_compile.lowering.triton.lowering import extents
from tmx_compile.lowering.triton.tuning import Tuning

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ERROR = {f32: 1e-4, f16: 4e-3, bf16: 3e-2}
# The block shapes of float32 with less padding of each tile: the interpreter's time is that of its tiles.
SHAPES = tuning.BackwardTuning(Tuning(32, 16, 4, 1), Tuning(32, 32, 4, 1), Tuning(32, 16, 4, 1))


def extent_of(key_mask, case):
    return None if key_mask is None else extents(key_mask, case.kv_len, case.last)


def errors(case, shapes=None, with_lse=True, grad_out=None):
    """The worst error of each gradient."""
    *qkv, key_mask = tensors = case.tensors(device=DEVICE)
    extent = extent_of(key_mask, case)
    out, lse = launch.attend(*qkv, key_mask, extent, case.mask, case.scale, with_lse=True)
    grad_out = torch.randn_like(out) if grad_out is None else grad_out.expand(out.shape)
    grad_lse = torch.randn_like(lse) if with_lse else None
    got = backward_launch.gradients(
        grad_out, grad_lse, *qkv, key_mask, extent, out, lse, case.mask, case.scale, shapes=shapes
    )
    for gradient, x in zip(got, qkv, strict=True):
        assert gradient.shape == x.shape
        assert gradient.dtype == x.dtype
        assert gradient.transpose(1, 2).is_contiguous()
    return worst_errors(got, reference(case, tensors, grad_out, grad_lse))


@pytest.mark.parametrize(
    "name",
    [
        "one token",
        "two tokens",
        "no sinks",
        "no last rows",
        "own key only",
        "sinks beyond the end",
        "window beyond the end",
        "last rows beyond the end",
        "everything beyond the end",
        "huge counts",
        "multi-query",
        "head dim 8",
        "head dim 80",
        "odd head dim",
        "value dim differs",
        "more keys than rows",
        "one row, many keys",
        "shorter than sinks and last",
        "no valid key",
        "holes, own key only",
        "padding and more keys than rows",
        "a reach inside the last rows",
        "more keys than rows and a reach",
        "right padding, window beyond the end",
        "right padding, last rows beyond the end",
        "right padding, all rows are last rows",
        "rows behind the keys",
    ],
)
def test_gradients(name):
    assert max(errors(CASES[name], SHAPES)) < ERROR[f32]


@given(cases(lengths=st.integers(1, 90)))
@settings(max_examples=8, deadline=None)
def test_random_problems(case):
    assert max(errors(replace(case, dtype=f32), SHAPES)) < ERROR[f32]


TABLE = {
    "window": tuning.BACKWARD,
    "large heads": tuning.BACKWARD_LARGE_HEADS,
    "float32": tuning.BACKWARD_FLOAT32,
    "float32, large heads": tuning.BACKWARD_FLOAT32_LARGE_HEADS,
}


@pytest.mark.parametrize("name", TABLE)
def test_every_shape_of_the_table(name):
    """Two tiles of keys at least, blocks of rows that need no mask, and last rows beyond them."""
    shapes = TABLE[name]
    dtype, keys = f32 if "float32" in name else f16, shapes.keys.keys
    n = 2 * keys + 20
    assert max(errors(Case(n, n, 20, keys + 30, 20, dtype=dtype), shapes, with_lse=False)) < ERROR[dtype]
    padded = Case(n, n, 4, keys, 30, batch=2, valid=((10, n - 5), (0, n)), holes=True, dtype=bf16, reach=n - 20)
    assert max(errors(padded, shapes)) < ERROR[bf16]


def test_the_table():
    assert tuning.choose_backward(2, 128) is tuning.BACKWARD
    assert tuning.choose_backward(2, 256) is tuning.BACKWARD_LARGE_HEADS
    assert tuning.choose_backward(4, 128) is tuning.BACKWARD_FLOAT32
    assert tuning.choose_backward(4, 256) is tuning.BACKWARD_FLOAT32_LARGE_HEADS


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (6, 2), (7, 1), (40, 1)], ids=str)
def test_groups_of_any_size(heads, kv_heads):
    """Groups that fill no block evenly, and one that takes several stacks of heads for a key head."""
    n = 90 if heads < 40 else 20
    assert max(errors(Case(n, n, 5, n // 4, n // 3, heads=heads, kv_heads=kv_heads), SHAPES)) < ERROR[f32]


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    """Parts of the last rows' keys and of the sinks' rows, ranges without any work among them."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    monkeypatch.setattr(tuning, "sink_splits", lambda *_: splits)
    launch.forget()
    backward_launch.forget()
    assert max(errors(CASES["everything beyond the end"], SHAPES)) < ERROR[f32]
    padded = Case(70, 70, 40, 10, 30, batch=2, valid=((60, 70), (30, 45)))
    assert max(errors(padded, SHAPES)) < ERROR[f32]
    launch.forget()
    backward_launch.forget()


def test_the_memory_of_partial_sums_is_bounded():
    for tiles in (1, 8, 64, 10_000):
        splits = tuning.sink_splits(tiles, 4 * 131072, 132)
        assert splits >= 1
        assert splits == 1 or tiles * splits <= 2 * 132
    assert tuning.sink_splits(1, 300, 132) == 1


def test_operands_of_any_strides():
    case = replace(CASES["strided"], q_len=60, kv_len=60)
    assert max(errors(case, SHAPES)) < ERROR[f32]
    # What summing a result leaves, and a gradient whose dims lie apart.
    assert max(errors(case, SHAPES, grad_out=torch.ones((), device=DEVICE))) < ERROR[f32]
    apart = torch.randn(1, 16, 60, 4, device=DEVICE).permute(0, 3, 2, 1)
    assert max(errors(case, SHAPES, grad_out=apart)) < ERROR[f32]


def test_padded_keys_may_hold_anything():
    """A key that nobody may attend reaches no gradient, whatever stands there; its own are 0."""
    case = Case(100, 100, 4, 20, 8, batch=2, valid=((30, 100), (0, 60)), holes=True)
    q, k, v, key_mask = case.tensors(device=DEVICE)
    extent = extent_of(key_mask, case)
    poison = ~key_mask[:, None, :, None]
    grad_out = torch.randn_like(q)

    def run(k, v):
        out, lse = launch.attend(q, k, v, key_mask, extent, case.mask, 0.25, with_lse=True)
        arguments = (q, k, v, key_mask, extent, out, lse, case.mask, 0.25)
        return backward_launch.gradients(grad_out, None, *arguments, shapes=SHAPES)

    want = run(k, v)
    got = run(k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("inf")))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    for gradient in got[1:]:
        assert gradient.masked_select(poison).abs().max() == 0


@pytest.mark.parametrize("valid", [None, ((3, 20), (0, 18))], ids=["plain", "padded"])
def test_opcheck(valid):
    case = Case(18, 20, 2, 5, 4, batch=2, valid=valid, reach=None if valid else 9)
    *qkv, key_mask = case.tensors(requires_grad=True, device=DEVICE)
    arguments = (*qkv, key_mask, extent_of(key_mask, case), *case.arguments)
    results = torch.library.opcheck(torch.ops.tmx.triangle_attention_triton_training, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("foreseen", [True, False])
def test_the_operators_are_differentiable(foreseen):
    """With the log-sum-exp that the forward kept, and with one that the backward computes again."""
    case = Case(50, 60, 4, 20, 8, heads=4, kv_heads=2)
    *qkv, _ = tensors = case.tensors(requires_grad=True, device=DEVICE)
    arguments = (*qkv, None, None, *case.arguments)
    if foreseen:
        out, lse = torch.ops.tmx.triangle_attention_triton_training(*arguments)
        weights = torch.randn_like(out), torch.randn_like(lse)
        got = torch.autograd.grad((out, lse), qkv, weights)
        # The log-sum-exp alone.
        _, lse = torch.ops.tmx.triangle_attention_triton_training(*arguments)
        alone = torch.autograd.grad(lse, qkv, weights[1], allow_unused=True)
        want = reference(case, tensors, torch.zeros_like(out), weights[1])
        assert max(worst_errors(alone, want)) < ERROR[f32]
    else:
        out = torch.ops.tmx.triangle_attention_triton(*arguments)
        weights = torch.randn_like(out), None
        got = torch.autograd.grad(out, qkv, weights[0])
    assert max(worst_errors(got, reference(case, tensors, *weights))) < ERROR[f32]


@pytest.mark.parametrize("kept", [True, False, None], ids=["kept", "computed again", "no choice"])
@pytest.mark.parametrize("name", ["triangle_attention_triton_training", "triangle_attention_triton"])
def test_uncompiled_checkpoints(name, kept):
    """The same gradients, bit by bit, whether the operator is kept or computed again."""
    case = Case(40, 40, 2, 8, 4, heads=4, kv_heads=2, dim=16)
    *qkv, key_mask = case.tensors(requires_grad=True, device=DEVICE)
    operator = getattr(torch.ops.tmx, name)

    def layer(*qkv):
        out = operator(*qkv, key_mask, extent_of(key_mask, case), *case.arguments)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)

    how = {}
    if kept is not None:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, [operator.default] if kept else [])
    weight = torch.randn_like(layer(*qkv))
    want = torch.autograd.grad(layer(*qkv), qkv, weight)
    got = torch.autograd.grad(checkpoint(layer, *qkv, use_reentrant=False, **how), qkv, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
