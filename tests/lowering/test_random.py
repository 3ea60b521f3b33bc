"""Lowerings on random problems. Their code is plain PyTorch, so it runs on tensors as it runs on graph proxies."""

import pytest
import torch
from hypothesis import given, settings

from tests.support.oracle import attended, oracle
from tests.support.problems import cases
from tmx_compile.lowering import rows
from tmx_compile.lowering.blocked import blocked_attention
from tmx_compile.lowering.flex.lowering import key_blocks
from tmx_compile.lowering.reference import reference_attention
from tmx_compile.lowering.scoring import Scoring
from tmx_compile.mask.geometry import Geometry


@pytest.mark.parametrize("attention", [blocked_attention, reference_attention])
@given(cases())
@settings(max_examples=60, deadline=None)
def test_numbers(attention, case):
    tensors = case.tensors()
    want, _ = oracle(*tensors, *case.arguments)
    got = attention(*tensors, case.mask, Scoring(case.scale))
    torch.testing.assert_close(got, want, atol=1e-11, rtol=0)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_the_flex_block_plan_covers_every_streaming_pair_once(case):
    """Every pair that a streaming row attends to lies in exactly one listed block; FlexAttention masks the rest."""
    query, _, _, key_mask = case.tensors()
    geometry = case.mask.bounded(case.kv_len)
    where = rows.extent(key_mask, case.kv_len)
    count, index = key_blocks(query, case.q_len, case.kv_len, where, key_mask is not None, geometry)
    assert count.dtype == index.dtype == torch.int32
    mask = attended(case.q_len, case.kv_len, key_mask, geometry.sink, geometry.window, 0)
    for b in range(mask.shape[0]):
        plan = b if count.shape[0] > 1 else 0
        for block in range(-(-case.q_len // 64)):
            listed = index[plan, 0, block, : count[plan, 0, block]].tolist()
            assert len(listed) == len(set(listed)), "a block listed twice would count its keys twice"
            assert all(0 <= k * 64 < case.kv_len for k in listed)
            touched = mask[b, block * 64 : block * 64 + 64].any(0).nonzero().flatten() // 64
            assert set(touched.tolist()) <= set(listed)


def test_the_flex_block_plan_is_linear_in_storage():
    """Full width is only a view: 131,072 tokens have 2,050 blocks a side, 16.8 MB as an array of int32."""
    like = torch.empty(1, 1, 1, 1)
    n = 131072
    count, index = key_blocks(like, n, n, rows.Extent(0, n), False, Geometry(8, 512, 0))
    assert index.shape[-1] * 64 >= n
    assert index.untyped_storage().nbytes() + count.untyped_storage().nbytes() < 200_000
