"""Block-sparse attention against an oracle that is handed the same lists."""

import pytest
import torch

from tests.support.blocks import CASES, listed_oracle, random_lists
from tests.support.oracle import tolerance
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import attend, block_sparse_attention, select


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [16, 64])
def test_over_any_lists(name, block):
    case = CASES[name]
    *qkv, key_mask = case.tensors()
    lists = random_lists(case.batch, case.heads, case.q_len, case.kv_len, block)
    out = attend(*qkv, key_mask, lists, block, case.scale)
    want = listed_oracle(*qkv, key_mask, lists, block, case.scale)
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), want, atol=tolerance(case.dtype), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_selection_and_attention(name):
    case = CASES[name]
    *qkv, key_mask = case.tensors()
    selection = Selection("pooled", 0.5, 16, 8, sink=3, last=20)
    out, visited = block_sparse_attention(*qkv, key_mask, selection=selection)
    lists = select(*qkv[:2], key_mask, selection, case.scale)
    want = listed_oracle(*qkv, key_mask, lists, 16, case.scale)
    torch.testing.assert_close(out.double(), want, atol=tolerance(case.dtype), rtol=0)
    assert torch.equal(visited, lists.visited)
    assert out.transpose(1, 2).is_contiguous()


def test_few_heads_at_a_time_are_the_same(monkeypatch):
    case = CASES["odd length"]
    *qkv, key_mask = case.tensors()
    lists = random_lists(1, 6, 211, 211, 16)
    whole = attend(*qkv, key_mask, lists, 16, case.scale)
    monkeypatch.setattr("tmx_compile.operator.dynamic.listed.GATHER_BUDGET", 1)
    torch.testing.assert_close(attend(*qkv, key_mask, lists, 16, case.scale), whole)


def test_the_operator_passes_opcheck():
    *qkv, key_mask = CASES["padding on both sides"].tensors()
    arguments = (*qkv, key_mask, *Selection(block=32, stride=8).arguments, 0.25)
    torch.library.opcheck(torch.ops.tmx.block_sparse_attention.default, arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v, m: (q, k, v, m.long()), "key_mask must be bool"),
        (lambda q, k, v, m: (q[0], k, v, m), "query must be"),
        (lambda q, k, v, m: (q, k[:, :, :50], v[:, :, :50], m[:, :50]), "query must not have more tokens than key"),
        (lambda q, k, v, m: (q, k.double(), v, m), "key must have query's dtype"),
    ],
)
def test_bad_tensors(change, words):
    *qkv, key_mask = CASES["left padding"].tensors()
    with pytest.raises(ValueError, match=words):
        block_sparse_attention(*change(*qkv, key_mask), selection=Selection())


def test_nothing_of_rows_times_keys():
    """Twice the tokens: twice the memory at one number of blocks, and not four times."""
    peaks = []
    for tokens in (2048, 4096):
        q = torch.randn(1, 2, tokens, 16)
        lists = random_lists(1, 2, tokens, tokens, 64, density=0.1)
        with torch.profiler.profile(profile_memory=True) as profile:
            attend(q, q, q, None, lists, 64, 0.25)
        peaks.append(max(event.self_cpu_memory_usage for event in profile.events()))
    assert peaks[1] < 3 * peaks[0]
