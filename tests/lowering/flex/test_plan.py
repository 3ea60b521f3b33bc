"""The block plans of the CUDA emission of ``flex``, against brute force, and how little they take."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.calls import Case
from tests.support.oracle import attended
from tests.support.problems import cases
from tmx_compile.lowering import rows
from tmx_compile.lowering.flex import cuda as flex_cuda
from tmx_compile.lowering.flex.plan import Tiles, last_plan, streaming_plan
from tmx_compile.mask.geometry import Geometry

tiles = st.builds(Tiles, st.sampled_from([4, 8, 16]), st.sampled_from([2, 4, 8]), st.just(4), st.just(3))


def read(plan, sequence, block):
    """The partial and the full key blocks of a block of rows."""
    line = min(sequence, plan.counts.shape[0] - 1)
    found = []
    for counts, indices in ((plan.counts, plan.indices), (plan.full_counts, plan.full_indices)):
        if counts is None:
            found.append([])
            continue
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.is_contiguous()
        assert indices.is_contiguous()
        count = int(counts[line, 0, block])
        assert count <= indices.shape[-1]
        found.append(indices[line, 0, block, :count].tolist())
    return found


def hold(partial, full, pairs, keys, spare):
    """Every attended pair lies in exactly one listed block, full blocks are attended whole, and few are idle."""
    listed = partial + full
    assert len(listed) == len(set(listed)), "a block listed twice would count its keys twice"
    assert all(0 <= block * keys < pairs.shape[1] for block in listed)
    touched = {int(key) // keys for key in pairs.any(0).nonzero()}
    assert touched <= set(listed)
    for block in full:
        part = pairs[:, block * keys : (block + 1) * keys]
        assert part.shape[1] == keys
        assert part.all()
    assert len(set(listed) - touched) <= spare


# Sinks, window and rows each touch as many blocks as so many tokens can.
WIDEST = Case(20, 41, 6, 6, 0, valid=((3, 41),))


@given(cases(), tiles)
@example(WIDEST, Tiles(4, 4, 4, 3))
@settings(max_examples=100, deadline=None)
def test_the_streaming_plan_against_brute_force(case, tiles):
    query, _, _, key_mask = case.tensors()
    geometry = case.mask.within_reach().bounded(case.kv_len)
    where = rows.extent(key_mask, case.kv_len)
    padded = key_mask is not None
    plan = streaming_plan(query, case.q_len, case.kv_len, where, padded, geometry, tiles)
    mask = attended(case.q_len, case.kv_len, key_mask, geometry.sink, geometry.window, 0, case.reach)
    for b in range(mask.shape[0]):
        for block in range(-(-case.q_len // tiles.rows)):
            pairs = mask[b, block * tiles.rows : (block + 1) * tiles.rows]
            # Padded keys in the middle may empty a listed block; a reach that ends in a sink's block may, once.
            spare = case.kv_len if case.holes else int(case.reach is not None)
            hold(*read(plan, b, block), pairs, tiles.keys, spare)


@given(cases(), tiles, st.sampled_from([1, 2, 8]), st.integers(1, 2))
@settings(max_examples=100, deadline=None)
def test_the_plan_of_the_last_rows_against_brute_force(case, tiles, copies, blocks):
    """Together the copies cover every attended pair, none of it twice."""
    query, key, _, key_mask = case.tensors()
    last = min(max(case.last, 1), case.q_len)
    where = rows.extent(key_mask, case.kv_len)
    padded = key_mask is not None
    first, final = flex_cuda.span(query, key, where, last, padded=padded)
    plan = last_plan(query, case.kv_len, where, padded, first, final, case.reach, copies, blocks, tiles)
    assert plan.counts.shape[2] == copies * blocks
    end = [case.kv_len] * case.batch if where.end is case.kv_len else where.end.flatten().tolist()
    mask = attended(case.q_len, case.kv_len, key_mask, 0, 0, last, case.reach)
    for b in range(mask.shape[0]):
        positions = torch.arange(case.q_len) + case.kv_len - case.q_len
        # Without rows of its own, as where the sequence ends before the first row, a sequence has empty lists.
        pairs = mask[b, (positions >= end[b] - last) & (positions < end[b])]
        for block in range(blocks):
            parts = [read(plan, b, copy * blocks + block) for copy in range(copies)]
            longest = max(len(partial) + len(full) for partial, full in parts)
            merged = [[listed for part in parts for listed in part[kind]] for kind in (0, 1)]
            hold(*merged, pairs, tiles.keys, case.kv_len if case.holes or case.reach is not None else 0)
            assert longest <= -(-sum(map(len, merged)) // copies), "the parts are to be even"


@pytest.mark.parametrize(
    ("geometry", "full"), [((4, 32, 64), False), ((8, 512, 128), True), ((64, 1024, 128), True)], ids=str
)
def test_plans_are_small(geometry, full):
    """At 131,072 tokens: the streaming plan, and the plan of the last rows over all keys."""
    n, where = 131072, rows.Extent(0, 131072)
    like = torch.empty(1, 32, 1, 128)
    _, window, last = geometry
    stream = streaming_plan(
        like, n, n, where, False, Geometry(*geometry), flex_cuda.stream_tiles(torch.bfloat16, 128, window)
    )
    count = 4 * last
    tiles = flex_cuda.last_tiles(torch.bfloat16, 128, count)
    first = torch.full((1, 1, 1, 1), n - last)
    final = last_plan(like, n, where, False, first, first * 0 + n - 1, None, 16, count // tiles.rows, tiles)
    assert (stream.full_counts is not None) == full
    if full:
        # In the middle of the prompt, masks are computed for the edges of the window and the sinks only.
        assert stream.counts[0, 0, 512] <= 6
        assert stream.full_counts[0, 0, 512] == (window + 1 - tiles.rows) // tiles.keys
    assert (final.counts + final.full_counts).max() == n // tiles.keys // 16
    # Bytes a token, where a token of one head has 256.
    for plan in (stream, final):
        held = [x for x in vars(plan).values() if isinstance(x, torch.Tensor)]
        assert sum(x.untyped_storage().nbytes() for x in held) <= 4 * n
