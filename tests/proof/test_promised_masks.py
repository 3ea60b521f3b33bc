"""Masks and positions that are handed in: the promise makes them known, and a broken promise fails loudly."""

import pytest
import torch

from tests.support.masked import CONFIG, B, N, check, expected, keys, model_with, tensors
from tmx_compile import explain, tmx_backend
from tmx_compile.report import Reason


def handed(q, k, mask):
    return mask


def whole_mask(kv_len=N, first=0, dtype=torch.bool):
    valid = torch.ones(B, kv_len, dtype=torch.bool)
    valid[1, :33] = False
    mask = (torch.arange(kv_len)[None, :] <= torch.arange(first, first + N)[:, None]) & valid[:, None, None, :]
    if dtype is torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
def test_a_mask_that_is_handed_in_needs_the_promise(dtype, eager):
    args, mask = tensors(), whole_mask(dtype=dtype)
    (site,) = explain(model_with(handed), *args, mask, config=CONFIG)
    assert site.reason == (Reason.MASK_UNKNOWN if dtype is torch.bool else Reason.FLOAT_BIAS).name
    torch._dynamo.reset()
    check(handed, args, mask, eager=eager, assume_causal=True)


@pytest.mark.parametrize("first", [0, 25])
def test_a_promised_mask_over_a_static_cache(first, eager):
    check(handed, tensors(300), whole_mask(300, first), eager=eager, first=first, assume_causal=True)


BROKEN = {
    "a later key": lambda mask: mask.index_put(
        (torch.tensor(0), torch.tensor(0), torch.tensor(3), torch.tensor(9)), torch.tensor(True)
    ),
    "an earlier key is missing": lambda mask: mask.index_put(
        (torch.tensor(0), torch.tensor(0), torch.tensor(30), torch.tensor(9)), torch.tensor(False)
    ),
    "a window": lambda mask: mask & ~whole_mask().roll(50, 2),
    "everything": torch.ones_like,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_fails_loudly(name, eager):
    model = torch.compile(model_with(handed), backend=tmx_backend(CONFIG, lowering="operator", assume_causal=True))
    args = tensors()
    model(*args, whole_mask())
    with pytest.raises(ValueError, match="assume_causal was promised, but a mask is not causal"):
        model(*args, BROKEN[name](whole_mask()))


def test_a_promised_bias_fails_loudly(eager):
    model = torch.compile(model_with(handed), backend=tmx_backend(CONFIG, lowering="operator", assume_causal=True))
    with pytest.raises(ValueError, match="other than 0 and minus infinity"):
        model(*tensors(), whole_mask(dtype=torch.float32) - 0.5)


def by_positions(q, k, positions):
    return keys(k) <= positions[:, None]


def from_buffer(q, k, positions):
    return torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()[positions]


@pytest.mark.parametrize("behind", [-3, 2])
def test_a_constant_beside_the_promised_positions_counts(behind, eager):
    """Rows at their position plus a number: as where a prefix stands before the tokens that are counted."""

    def shifted(q, k, positions):
        return keys(k) <= positions[:, None] + behind

    args, positions = tensors(300), torch.arange(20, 20 + N)
    check(shifted, args, positions, eager=eager, first=20 + behind, assume_causal=True)


@pytest.mark.parametrize("mask_of", [by_positions, from_buffer])
def test_row_positions_that_are_handed_in_need_the_promise(mask_of, eager):
    args, positions = tensors(300), torch.arange(20, 20 + N)
    (site,) = explain(model_with(mask_of), *args, positions, config=CONFIG)
    assert site.reason in (Reason.POSITIONS_UNKNOWN.name, Reason.MASK_UNKNOWN.name)
    torch._dynamo.reset()
    backend = tmx_backend(CONFIG, lowering="operator", strict=True, assume_causal=True)
    model = torch.compile(model_with(mask_of), backend=backend)
    want = expected(*args, mask_of(*args[:2], positions), 20)
    torch.testing.assert_close(model(*args, positions).double(), want, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="the positions of the rows are not consecutive"):
        model(*args, positions.flip(0))
