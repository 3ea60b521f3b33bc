"""Streaming rows by a kernel that knows one sliding window: their keys in another order."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vllm_kernels import Kernels
from tmx_compile.integrations.vllm import pages
from tmx_compile.mask.geometry import Geometry


@given(
    st.tuples(st.integers(0, 40), st.integers(0, 70), st.integers(1, 9)),
    st.integers(1, 200),
    st.integers(0, 150),
)
def test_it_is_the_mask_for_whole_prompts_and_chunks(counts, rows, earlier):
    geometry, n = Geometry(*counts), rows + earlier
    generator = torch.Generator().manual_seed(n)
    query, key, value = (
        torch.randn(count, heads, 8, generator=generator, dtype=torch.float64)
        for count, heads in ((rows, 4), (n, 2), (n, 2))
    )
    out = torch.full_like(query, float("nan"))
    pages.stream(Kernels("vec"), query, key, value, geometry, 0.3, "vec", out)
    row, column = torch.arange(earlier, n)[:, None], torch.arange(n)
    mask = (column <= row) & ((column < geometry.sink) | (row - column <= geometry.window))
    heads = [x.transpose(0, 1) for x in (query, key, value)]
    key, value = (x.repeat_interleave(2, 0) for x in heads[1:])
    scores = (heads[0] @ key.transpose(1, 2) * 0.3).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(out, (scores.softmax(-1) @ value).transpose(0, 1), atol=1e-12, rtol=0)


def test_sequences_fill_their_pages_and_are_made_once_for_all_layers():
    for geometry, page in ((Geometry(8, 512, 128), 1024), (Geometry(4, 32, 64), 64), (Geometry(8, 256, 128), 512)):
        found = pages.sequences(6000, 6000, geometry)
        assert found is pages.sequences(6000, 6000, geometry)
        assert found.page == page
        # The first one is of the rows that see all keys before them, the last one of what is left.
        assert set(found.lengths[1:-1].tolist()) == {page}
        assert int(found.starts[1]) == geometry.sink + geometry.window


@pytest.mark.parametrize(("geometry", "takes"), [((8, 16, 8), True), ((8, 15, 8), False)])
def test_short_windows_are_left_to_another_lowering(geometry, takes):
    assert pages.pays(Geometry(*geometry)) == takes
