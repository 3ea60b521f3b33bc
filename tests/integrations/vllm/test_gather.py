"""Chunks over gathered pages against the oracle of the whole prompt, on pages in a random order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import oracle
from tmx_compile.integrations.vllm.gather import Scratch, from_packed, places, seen, together
from tmx_compile.integrations.vllm.rows import Streaming, split
from tmx_compile.lowering.chunk import Part
from tmx_compile.lowering.scoring import Scoring
from tmx_compile.mask.geometry import Geometry

SIZE = 4
# Triton's interpreter runs the kernel where there is no GPU.
KERNELS = "cuda" if torch.cuda.is_available() else "cpu"


class Pages:
    """A paged cache (blocks, Hkv, SIZE, D) of one request, its blocks in a random order."""

    def __init__(self, key, value):
        tokens, heads, dim = key.shape
        blocks = -(-tokens // SIZE) + 3
        self.table = torch.randperm(blocks)[: -(-tokens // SIZE)].to(torch.int32)
        self.both = torch.full((2, blocks, heads, SIZE, dim), float("nan"), dtype=key.dtype)
        for token in range(tokens):
            for half, x in zip(self.both, (key, value), strict=True):
                half[self.table[token // SIZE], :, token % SIZE] = x[token]

    def read(self, blocks, slots):
        return tuple(half[blocks, :, slots] for half in self.both)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 30), st.integers(0, 9), st.integers(0, 20), st.integers(0, 20), st.integers())
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole(prompt, chunk, sink, window, last, seed):
    torch.manual_seed(seed % 2**32)
    geometry, scratch = Geometry(sink, window, last), Scratch()
    q = torch.randn(prompt, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, prompt, 2, 8, dtype=torch.float64)
    pages = Pages(k, v)
    out = torch.full_like(q, float("nan"))
    part = Part(geometry, Scoring(0.3), "operator")
    for begin in range(0, prompt, chunk):
        rows = slice(begin, min(begin + chunk, prompt))
        found = split([0, rows.stop - begin], [rows.stop], [prompt], geometry, limit=0)
        for streaming in () if found is None else found.streaming:
            own = slice(begin, begin + streaming.rows)
            earlier = places(streaming, pages.table, SIZE, geometry)
            keys, values = seen(pages.read, earlier, k[own], v[own], scratch)
            heads_first = (x.transpose(0, 1)[None] for x in (q[own], keys, values))
            out[own] = part.attend(*heads_first, None, 0)[0].transpose(0, 1)
    want, _ = oracle(*(x.transpose(0, 1)[None] for x in (q, k, v)), None, sink, window, last, 0.3)
    stream = max(prompt - last, 0)
    torch.testing.assert_close(out[:stream], want[0].transpose(0, 1)[:stream], atol=1e-12, rtol=0)
    assert out[stream:].isnan().all()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 90),
    st.integers(0, 9),
    st.integers(0, 20),
    st.integers(1, 40),
    st.sampled_from([8, 12]),
    st.booleans(),
)
def test_the_kernel_puts_together_what_the_pages_and_the_chunk_hold(position, sink, window, rows, dim, heads_first):
    """Pages have heads or tokens first in memory; a chunk's rows are parts of longer ones."""
    scratch, geometry = Scratch(), Geometry(sink, window, 0)
    _, k, v = torch.randn(rows, 2 + 2 + 2, dim, device=KERNELS).split(2, 1)
    blocks = -(-position // SIZE) + 3
    cache = torch.randn(blocks, 2, SIZE, 2 * dim, device=KERNELS)
    if not heads_first:
        cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
    table = torch.randperm(blocks).to(KERNELS, torch.int32)
    earlier = places(Streaming(0, 0, rows, position), table, SIZE, geometry)
    if earlier is None:
        return
    keys, values = together(cache, dim, earlier, k, v, scratch)
    want = seen(lambda *at: from_packed(cache, 2, dim, *at), earlier, k, v, Scratch())
    torch.testing.assert_close((keys, values), want, atol=0, rtol=0)


def test_pages_of_another_layout_are_refused():
    with pytest.raises(RuntimeError, match=r"must be \(blocks, 2, size, 20\), got \(3, 2, 4, 16\)"):
        together(torch.zeros(3, 2, SIZE, 16), 10, None, torch.zeros(1, 2, 10), None, None)
    with pytest.raises(RuntimeError, match=r"must be \(blocks, 2, size, 16\), got \(3, 4, 2, 16\)"):
        from_packed(torch.zeros(3, SIZE, 2, 16), 2, 8, torch.zeros(1).long(), torch.zeros(1).long())


def test_nothing_is_copied_for_the_first_chunk():
    k, v = torch.randn(2, 5, 2, 8)
    found = split([0, 5], [5], [50], Geometry(2, 3, 4), limit=0)
    earlier = places(found.streaming[0], torch.zeros(1, dtype=torch.int32), SIZE, Geometry(2, 3, 4))
    assert earlier is None
    keys, values = seen(None, earlier, k, v, Scratch())
    assert keys is k
    assert values is v


def test_the_memory_is_kept():
    scratch = Scratch()
    like = torch.zeros(1, 2, 8)
    first = scratch.take(10, like)[0].data_ptr()
    assert scratch.take(7, like)[0].data_ptr() == first
    keys, values = scratch.take(10, like)
    assert keys.shape == values.shape == (10, 2, 8)
    assert values.data_ptr() == first + 10 * 2 * 8 * 4
    assert scratch.take(3, like.double())[0].dtype == torch.float64
