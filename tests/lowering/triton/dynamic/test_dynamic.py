"""The kernels that choose blocks and attend to them, in Triton's interpreter where there is no GPU."""

from dataclasses import replace

import pytest
import torch

from tests.support.blocks import CASES, always_kept, listed_oracle, random_lists, visits
from tests.support.oracle import tolerance
from tmx_compile.lowering.triton.dynamic.launch import Tuning, attend, select
from tmx_compile.lowering.triton.dynamic.op import TRITON_BLOCK_SPARSE
from tmx_compile.mask.selection import METHODS, Selection
from tmx_compile.operator import dynamic

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL_CASES = {name: case for name, case in CASES.items() if case.dtype != torch.float64}
SOME = ("odd length", "more keys than rows", "padding on both sides")


def on_cpu(lists):
    return dynamic.Lists(*(x.cpu() for x in lists))


@pytest.mark.parametrize(("name", "block"), [(name, 32) for name in KERNEL_CASES] + [(name, 128) for name in SOME])
def test_over_any_lists(name, block):
    case = KERNEL_CASES[name]
    if DEVICE == "cuda" and case.dtype == torch.float32:
        case = replace(case, dtype=torch.float16)
    *qkv, key_mask = case.tensors()
    lists = random_lists(case.batch, case.heads, case.q_len, case.kv_len, block)
    moved = [None if x is None else x.to(DEVICE) for x in (*qkv, key_mask)]
    there = dynamic.Lists(*(x.to(DEVICE) for x in lists))
    out = attend(*moved, there, block, case.scale)
    want = listed_oracle(*qkv, key_mask, lists, block, case.scale)
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.cpu().double(), want, atol=max(tolerance(case.dtype), 1e-4), rtol=0)
    if DEVICE == "cuda":
        assert torch.equal(out, attend(*moved, there, block, case.scale))


@pytest.mark.parametrize("name", KERNEL_CASES if DEVICE == "cuda" else ("multi-query", "left padding"))
def test_the_whole_operator_over_its_own_lists(name):
    case = KERNEL_CASES[name]
    *qkv, key_mask = case.tensors()
    moved = [None if x is None else x.to(DEVICE) for x in (*qkv, key_mask)]
    selection = Selection("pooled", 0.5, 32, 16, sink=3, last=20)
    lists = select(*moved[:2], moved[3], selection, case.scale)
    out, visited = TRITON_BLOCK_SPARSE(*moved, *selection.arguments, case.scale)
    want = listed_oracle(*qkv, key_mask, on_cpu(lists), 32, case.scale)
    torch.testing.assert_close(out.cpu().double(), want, atol=max(tolerance(case.dtype), 1e-4), rtol=0)
    assert torch.equal(visited, lists.visited)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("share", [0.5, 1.0] if DEVICE == "cuda" else [0.5])
def test_chooses_as_the_operator_does(name, method, share):
    case = replace(KERNEL_CASES[name], dtype=torch.float32)
    query, key, _, key_mask = (None if x is None else x.to(DEVICE) for x in case.tensors())
    selection = Selection(method, share, 32, 8, sink=3, last=20)
    got = on_cpu(select(query, key, key_mask, selection, 1.0))
    query, key, key_mask = (None if x is None else x.cpu() for x in (query, key, key_mask))
    want = dynamic.select(query, key, key_mask, selection, 1.0)
    # Rounding may turn a tie around.
    differ = (_cells(got) != _cells(want)).float().mean()
    assert differ < 0.01
    _, kept = always_kept(query.shape[2], key.shape[2], key_mask, selection, case.batch)
    assert (_cells(got) >= kept[:, None]).all()
    assert got.visited[0] == got.counts.sum()
    assert got.visited[1] == want.visited[1]


@pytest.mark.parametrize("form", [select, dynamic.select])
def test_a_block_weighs_as_much_as_the_sampled_row_that_pays_it_most(form):
    query, key = torch.zeros(1, 1, 256, 16, device=DEVICE), torch.zeros(1, 1, 256, 16, device=DEVICE)
    key[0, 0, (70, 100, 192), (0, 1, 2)] = 1.0
    # In the block of rows 6 one sampled row looks at block 2 alone; three share themselves between 3 and their own.
    query[0, 0, 192:200, 0] = 40.0
    query[0, 0, 200:224, 1:3] = 20.0 + torch.tensor([0.6, 0.4], device=DEVICE).log()
    lists = form(query, key, None, Selection("sampled", 0.55, 32, 8, sink=0, last=0), 1.0)
    cells = _cells(on_cpu(lists))
    # By the sum over the rows it would be 3, 5 and 6.
    assert cells[0, 0, 6].nonzero().flatten().tolist() == [2, 5, 6]


@pytest.mark.parametrize(("heads", "kv_heads", "stride"), [(6, 2, 16), (32, 1, 32), (7, 1, 16)])
def test_heads_that_share_keys_make_one_tile(heads, kv_heads, stride):
    torch.manual_seed(heads)
    query, key = torch.randn(1, heads, 90, 16, device=DEVICE), torch.randn(1, kv_heads, 150, 16, device=DEVICE)
    selection = Selection("sampled", 0.5, 32, stride, sink=3, last=20)
    for scale in (1.0, -1.0):
        got = on_cpu(select(query, key, None, selection, scale))
        want = dynamic.select(query.cpu(), key.cpu(), None, selection, scale)
        assert (_cells(got) != _cells(want)).float().mean() < 0.005
        assert got.visited[1] == want.visited[1]


@pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
@pytest.mark.parametrize("stride", [16, 32])
@pytest.mark.parametrize("n", [5000, 20000])
def test_chooses_as_the_operator_does_in_bfloat16(n, stride):
    torch.manual_seed(n)
    query, key = (torch.randn(1, n, h, 128, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for h in (8, 2))
    selection = Selection("sampled", 0.5, 128, stride, sink=8, last=128)
    got = select(query, key, None, selection, 0.15)
    want = dynamic.select(query, key, None, selection, 0.15)
    assert (_cells(on_cpu(got)) != _cells(on_cpu(want))).float().mean() < 0.01
    assert torch.equal(got.counts, select(query, key, None, selection, 0.15).counts)


def test_few_rows_at_a_time_choose_the_same(monkeypatch):
    case = KERNEL_CASES["odd length"]
    query, key, _, _ = (None if x is None else x.to(DEVICE) for x in case.tensors())
    selection = Selection("pooled", 0.5, 32, 8)
    whole = select(query, key, None, selection, 1.0)
    monkeypatch.setattr("tmx_compile.lowering.triton.dynamic.launch.WORKSPACE", 1)
    parts = select(query, key, None, selection, 1.0)
    assert torch.equal(whole.counts, parts.counts)
    assert torch.equal(_cells(on_cpu(whole)), _cells(on_cpu(parts)))


@pytest.mark.parametrize("shapes", [Tuning(32, 8, 2), Tuning(64, 4, 3, 128)])
def test_other_shapes_of_the_launch(shapes):
    case = replace(KERNEL_CASES["odd length"], dtype=torch.float16, dim=64)
    *qkv, key_mask = case.tensors()
    lists = random_lists(1, case.heads, case.q_len, case.kv_len, 128)
    there = dynamic.Lists(*(x.to(DEVICE) for x in lists))
    out = attend(*(x.to(DEVICE) for x in qkv), key_mask, there, 128, case.scale, shapes=shapes)
    want = listed_oracle(*qkv, key_mask, lists, 128, case.scale)
    torch.testing.assert_close(out.cpu().double(), want, atol=max(tolerance(case.dtype), 1e-4), rtol=0)


def _cells(lists):
    return visits(lists, lists.blocks.shape[2], lists.blocks.shape[3], 1)
