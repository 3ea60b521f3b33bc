"""The oracle's mask for whole tensors is the definition, cell by cell."""

import pytest
import torch

from tests.support.oracle import attended, parts
from tmx_compile.operator import ALL_ROWS

LENGTH = 23
GEOMETRIES = [(0, 0, 0), (3, 5, 4), (40, 0, 1), (0, ALL_ROWS, 2), (0, 0, ALL_ROWS), (2, 1, 60)]


def attended_cell(p, j, valid, own, sink, window, last, reach=None):
    """Whether the row at position ``p`` attends to key ``j``, as the definition says it."""
    keys = [key for key, shown in enumerate(valid.tolist()) if shown]
    start, end = keys[0], keys[-1] + 1
    if j not in keys or not own[p] or j > p or (reach is not None and p - j > reach):
        return False
    if j < start + sink or p - j <= window:
        return True
    return p >= end - last and (p < end or last >= ALL_ROWS)


def key_masks():
    key = torch.arange(LENGTH)
    packed = ((torch.rand(2, LENGTH) < 0.15).long().cumsum(1) - 1).clamp(min=0)
    return {
        "no mask": None,
        "padding": torch.stack([key >= 6, key < 15, (key >= 4) & (key < 19)]),
        "holes": torch.rand(3, LENGTH) < 0.7,
        "no key": torch.zeros(2, LENGTH, dtype=torch.bool),
        "documents": packed,
        "documents with holes": torch.where(torch.rand(2, LENGTH) < 0.2, -packed, packed),
    }


@pytest.mark.parametrize("reach", [None, 0, 6])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", key_masks())
def test_whole_tensors_equal_single_cells(name, geometry, reach):
    key_mask = key_masks()[name]
    for q_len in (LENGTH, 9, 1):
        got = attended(q_len, LENGTH, key_mask, *geometry, reach)
        assert got.shape == (1 if key_mask is None else key_mask.shape[0], q_len, LENGTH)
        for b, mask in enumerate(got.tolist()):
            found = parts(LENGTH, None if key_mask is None else key_mask[b])
            for i, row in enumerate(mask):
                p = LENGTH - q_len + i
                want = [any(attended_cell(p, j, *part, *geometry, reach) for part in found) for j in range(LENGTH)]
                assert row == want


def test_a_row_of_the_formula_by_hand():
    """One sink, a window of two keys before the row's own, two last rows, six keys of which the first is padding."""
    valid = torch.tensor([[False, True, True, True, True, True]])
    mask = attended(6, 6, valid, 1, 1, 2)[0].int().tolist()
    assert mask == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1],
    ]
