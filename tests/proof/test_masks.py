"""Masks beyond causal and padding: windows, caches, documents, positions from data, the promise. Numbers and refusals.

Every positive case runs through the backend and is compared with the mask written out: the model's own mask, as plain
PyTorch computes it, and-ed with the triangle of the definition.
"""

import pytest
import torch

from tests.support.masked import (
    CONFIG,
    INF,
    WINDOW,
    B,
    N,
    causal,
    check,
    expected,
    keys,
    model_with,
    numbers,
    rows,
    tensors,
)
from tmx_compile import explain, tmx_backend
from tmx_compile.report import Reason

# A layer's own window ---------------------------------------------------------------------------------------------

WINDOWS = {
    "key > row - w": lambda q, k: causal(q, k) & (keys(k) > rows(q) - 20),
    "row - key < w": lambda q, k: causal(q, k) & (rows(q) - keys(k) < 20),
    "not (row - key >= w)": lambda q, k: ~((keys(k) > rows(q)) | (rows(q) - keys(k) >= 20)),
    "two windows": lambda q, k: causal(q, k) & (keys(k) > rows(q) - 20) & (rows(q) < keys(k) + 40),
    "triu of tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().triu(-19),
    "additive": lambda q, k: torch.where(causal(q, k) & (rows(q) - keys(k) < 20), 0.0, INF),
    "masked_fill twice": lambda q, k: (
        torch.zeros(q.shape[2], k.shape[2])
        .masked_fill(~causal(q, k), INF)
        .masked_fill(rows(q) - keys(k) >= 20, INF)[None, None]
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_windowed_layer_gets_the_intersection(name, dynamic, eager):
    (node,) = check(WINDOWS[name], tensors(), eager=eager, dynamic=dynamic)
    assert node.args[8] == 19


@pytest.mark.parametrize("lowering", ["reference", "blocked"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_windowed_layers_in_the_lowerings(lowering, padded, eager):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :40], valid[1, -3:] = 0, 0

    def mask_of(q, k, m):
        mask = causal(q, k) & (rows(q) - keys(k) < 20)
        return mask & m.bool()[:, None, None, :] if padded else mask

    check(mask_of, tensors(), valid, eager=eager, lowering=lowering)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_windowed_layer_compiled_with_flex(padded):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :40] = 0

    def mask_of(q, k, m):
        mask = causal(q, k) & (rows(q) - keys(k) < 20)
        return mask & m.bool()[:, None, None, :] if padded else mask

    args = tensors()
    got = torch.compile(model_with(mask_of), backend=tmx_backend(CONFIG, lowering="flex", strict=True))(*args, valid)
    torch.testing.assert_close(got.double(), expected(*args, mask_of(*args[:2], valid)), atol=2e-5, rtol=0)


def test_a_window_no_longer_than_the_triangles_saves_nothing(eager):
    def mask_of(q, k):
        return causal(q, k) & (rows(q) - keys(k) <= WINDOW)

    report = explain(model_with(mask_of), *tensors(), config=CONFIG)
    (site,) = report
    assert site.reason == Reason.WINDOWED.name
    assert site.detail == f"{WINDOW + 1} keys"


# Caches -------------------------------------------------------------------------------------------------------------


def test_a_static_cache_with_rows_from_its_start(eager):
    """Keys beyond the rows are never attended: they are cut off."""
    (node,) = check(lambda q, k: keys(k) <= rows(q), tensors(300), eager=eager, first=0)
    assert node.args[1].meta["example_value"].shape[2] == N


def test_a_static_cache_at_a_known_offset(eager):
    (node,) = check(lambda q, k: keys(k) <= rows(q, 30), tensors(300), eager=eager, first=30)
    assert node.args[1].meta["example_value"].shape[2] == N + 30


def test_a_static_cache_of_dynamic_length(eager):
    check(lambda q, k: keys(k) <= rows(q), tensors(300), eager=eager, first=0, dynamic=True)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("first", [0, 30, 180])
def test_a_static_cache_at_an_offset_that_the_run_tells(first, padded, eager):
    valid = torch.ones(B, 300, dtype=torch.long)
    valid[1, : first + 20] = 0

    def mask_of(q, k, start, m):
        mask = keys(k) <= rows(q) + start
        return mask & m.bool()[:, None, None, :] if padded else mask

    args = tensors(300)
    args[1][:, :, first + N :] = float("nan")  # what lies beyond the rows must not matter
    args = (args[0], args[1].nan_to_num(1e4), args[2])
    check(mask_of, args, torch.tensor(first), valid, eager=eager, first=first)


def test_a_chunk_after_a_cache(eager):
    check(lambda q, k: keys(k) <= rows(q, 60), tensors(N + 60), eager=eager)


def test_a_row_beyond_the_cache_fails_loudly(eager):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    model = torch.compile(model_with(lambda q, k, start: keys(k) <= rows(q) + start), backend=backend)
    with pytest.raises(ValueError, match=f"start at key 11, and {N} rows among {N + 10} keys start at 0 to 10"):
        model(*tensors(N + 10), torch.tensor(11))


# Documents ----------------------------------------------------------------------------------------------------------


DOCUMENTS = {
    "equal numbers": lambda q, k, d: causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]),
    "difference": lambda q, k, d: causal(q, k) & ((d[:, None, None, :] - d[:, None, :, None]) == 0),
    "not different": lambda q, k, d: ~((keys(k) > rows(q)) | (d[:, None, None, :] != d[:, None, :, None])),
    "additive": lambda q, k, d: torch.where(causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]), 0.0, INF),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_packed_documents(name, dynamic, eager):
    document = numbers()
    check(DOCUMENTS[name], tensors(), document, eager=eager, document=document, dynamic=dynamic)


def test_packed_documents_with_padding(eager):
    document, valid = numbers(), torch.ones(B, N, dtype=torch.bool)
    valid[0, 60:70], valid[1, -9:] = False, False

    def mask_of(q, k, d, m):
        return causal(q, k) & (d[:, None, :, None] == d[:, None, None, :]) & m[:, None, None, :]

    check(mask_of, tensors(), document, valid, eager=eager, document=document)


def test_documents_of_other_keys_are_refused(eager):
    """Rows and keys read different numbers: not one document condition."""

    def mask_of(q, k, d):
        return causal(q, k) & (d[:, None, :, None] == d[:, None, None, :].flip(-1))

    (site,) = explain(model_with(mask_of), *tensors(), numbers(), config=CONFIG)
    assert site.reason == Reason.MASK_UNKNOWN.name


# Keys named by numbers ----------------------------------------------------------------------------------------------

BY_LENGTH = {
    "key < length": lambda q, k, n: causal(q, k) & (keys(k) < n[:, None, None, None]),
    "key >= start": lambda q, k, n: causal(q, k) & (keys(k) >= n[:, None, None, None] - 80),
    "between": lambda q, k, n: (
        causal(q, k) & (keys(k) < n[:, None, None, None]) & (keys(k) + 80 >= n[:, None, None, None])
    ),
    "either": lambda q, k, n: causal(q, k) & ((keys(k) < 30) | (keys(k) >= n[:, None, None, None] - 50)),
    "not one key": lambda q, k, n: causal(q, k) & (keys(k) != 17),
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_valid_keys_by_number(name, eager):
    check(BY_LENGTH[name], tensors(), torch.tensor([100, 90]), eager=eager)


# Additive masks in the ways models write them -----------------------------------------------------------------------


def big(number):
    return lambda q, k, m: torch.where(causal(q, k) & m.bool()[:, None, None, :], 0.0, number)


ADDITIVE = {
    "-1e4": big(-1e4),
    "-1e9": big(-1e9),
    "finfo.min": big(torch.finfo(torch.float32).min),
    "sum of two": lambda q, k, m: (
        torch.where(causal(q, k), 0.0, -1e9) + torch.where(m.bool(), 0.0, -1e9)[:, None, None, :]
    ),
    "one minus": lambda q, k, m: (1.0 - (causal(q, k) & m.bool()[:, None, None, :]).float()) * -10000.0,
    "rsub": lambda q, k, m: torch.rsub((causal(q, k) & m.bool()[:, None, None, :]).to(torch.float32), 1.0) * -1e9,
    "inverted": lambda q, k, m: (~(causal(q, k) & m.bool()[:, None, None, :])).to(torch.float32) * torch.finfo().min,
    "nested where": lambda q, k, m: torch.where(
        causal(q, k), torch.where(m.bool()[:, None, None, :], 0.0, INF), torch.tensor(INF)
    ),
    "min of a full": lambda q, k, m: (
        torch.full((q.shape[2], k.shape[2]), torch.finfo().min)
        .triu(1)[None, None]
        .masked_fill(m[:, None, None, :] == 0, torch.finfo().min)
    ),
}


@pytest.mark.parametrize("name", ADDITIVE)
def test_additive_masks(name, eager):
    valid = torch.ones(B, N, dtype=torch.long)
    valid[1, :33] = 0
    check(ADDITIVE[name], tensors(), valid, eager=eager)


def test_not_low_enough_is_a_bias(eager):
    (site,) = explain(model_with(big(-1000.0)), *tensors(), torch.ones(B, N), config=CONFIG)
    assert (site.reason, site.detail) == (Reason.FLOAT_BIAS.name, "adds -1000 to scores")
