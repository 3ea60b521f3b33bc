"""The studies of dynamic layers: lists from exact scores, and skipping inside the running softmax."""

import pytest
import torch
import torch.nn.functional as F

from studies.softmax_skip import attend_plain
from studies.stacked_mixes import density
from studies.stacked_peaks import peak_lists
from tests.support.blocks import visits
from tmx_compile.mask.selection import Selection


def test_a_single_row_that_looks_back_keeps_its_block():
    torch.manual_seed(0)
    query, key = torch.zeros(1, 2, 256, 16), torch.zeros(1, 1, 256, 16)
    # All rows look everywhere alike, but one that looks one key up.
    key[:, :, 70, 3], query[:, 1, 200, 3] = 40.0, 1.0
    lists = peak_lists(query, key, Selection("pooled", 0.5, 32, 16, sink=1, last=0), 1.0)
    cells = visits(lists, 8, 8, 1)[0]
    assert cells[1, 6, 2]
    assert cells[1, 6].tolist() == [True, False, True, False, False, True, True, False]
    assert lists.visited.tolist() == [int(lists.counts.sum()), 2 * 36]
    whole = peak_lists(query, key, Selection("pooled", 1.0, 32, 16), 1.0)
    assert whole.visited.tolist() == [72, 72]


def test_density_of_a_mix_is_that_of_the_layers_that_are_no_triangle_layers():
    assert density([0.5, 0.25], 2) == 1 - (0.5 + 0.75) / 4
    assert density([], 3) == density([], 6) == 1.0


@pytest.mark.parametrize("near_first", [False, True])
def test_skipping_leaves_out_what_cannot_matter(near_first):
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 200, 16), torch.randn(1, 1, 200, 16), torch.randn(1, 1, 200, 16)
    key[:, :, 0], query[..., 0], key[:, :, 1:, 0] = 0.0, 6.0, 0.0
    key[:, :, 0, 0] = 6.0
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    settings = {"near_first": near_first, "rows": 64, "keys": 32}
    out, skipped, of = attend_plain(query, key, value, 1e9, 0.25, **settings)
    assert (skipped, of) == (0, 2 * (0 + 2 + 4 + 6))
    torch.testing.assert_close(out, dense)
    out, skipped, _ = attend_plain(query, key, value, 2.0, 0.25, **settings)
    # The sink's own tile stays.
    assert 0 < skipped <= of - 2 * 3
    assert 0 < (out - dense).abs().max() < 0.1
