"""Which blocks are chosen: what is always kept, the share of the mass, and the estimates against their definition."""

import pytest
import torch

from tests.support.blocks import always_kept, visits
from tmx_compile.mask.selection import METHODS, Selection
from tmx_compile.operator.dynamic import select
from tmx_compile.operator.dynamic.choice import choose
from tmx_compile.operator.dynamic.estimate import Groups
from tmx_compile.operator.dynamic.grid import Grid
from tmx_compile.operator.dynamic.sampled import Sampled

PROBLEMS = {
    "whole blocks": (256, 256, None),
    "odd length": (331, 331, None),
    "shorter than a block": (20, 20, None),
    "more keys than rows": (90, 240, None),
    "one row": (1, 200, None),
    "left padding": (200, 200, ((0, 200), (70, 200), (199, 200))),
    "both sides": (200, 200, ((67, 140), (3, 150))),
    "no valid key": (100, 100, ((0, 100), (0, 0))),
    "padding, more keys than rows": (90, 240, ((0, 240), (150, 230))),
}


def problem(name, dim=16, heads=4, kv_heads=2):
    q_len, kv_len, valid = PROBLEMS[name]
    batch = 1 if valid is None else len(valid)
    query = torch.randn(batch, heads, q_len, dim)
    key = torch.randn(batch, kv_heads, kv_len, dim)
    key_mask = None
    if valid is not None:
        key_mask = torch.zeros(batch, kv_len, dtype=torch.bool)
        for b, (start, end) in enumerate(valid):
            key_mask[b, start:end] = torch.rand(end - start) < 0.9
            if end > start:
                key_mask[b, [start, end - 1]] = True
    return query, key, key_mask


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_always_kept_is_there_and_nothing_impossible(name, method):
    query, key, key_mask = problem(name)
    selection = Selection(method, 0.3, 32, 8, sink=5, last=40)
    lists = select(query, key, key_mask, selection, 0.5)
    possible, kept = always_kept(query.shape[2], key.shape[2], key_mask, selection, query.shape[0])
    cells = _cells(lists)
    assert (cells >= kept[:, None]).all()
    assert (cells <= possible[:, None]).all()
    assert lists.visited.tolist() == [int(cells.sum()), int(possible.sum()) * query.shape[1]]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_whole_mass_is_every_block(name):
    query, key, key_mask = problem(name)
    selection = Selection(share=1.0, block=32, stride=8)
    possible, _ = always_kept(query.shape[2], key.shape[2], key_mask, selection, query.shape[0])
    lists = select(query, key, key_mask, selection, 0.5)
    assert torch.equal(_cells(lists), possible[:, None].expand(-1, query.shape[1], -1, -1))


@pytest.mark.parametrize("method", ["pooled", "antidiagonal"])
@pytest.mark.parametrize("name", ["whole blocks", "odd length", "more keys than rows", "left padding"])
def test_masses_are_what_their_definition_says(name, method):
    query, key, key_mask = problem(name)
    block, stride, scale = 32, 8, 0.7
    grid = Grid(query.shape[2], key.shape[2], block)
    groups = Groups(query, key, key_mask, grid, Selection(method, 0.9, block, stride), scale)
    got = torch.cat([groups.masses(r, r + 1) for r in range(grid.rows)], 2)
    want = torch.stack([_masses(query, key, key_mask, b, h, block, stride, scale, method)
                        for b in range(query.shape[0]) for h in range(query.shape[1])])  # fmt: skip
    torch.testing.assert_close(got.double(), want.view(got.shape).double(), atol=1e-5, rtol=1e-4)


def _masses(query, key, key_mask, b, h, block, stride, scale, method):
    """Group by group, in float64."""
    q_len, kv_len = query.shape[2], key.shape[2]
    q, k = query[b, h].double(), key[b, h * key.shape[1] // query.shape[1]].double()
    valid = torch.ones(kv_len, dtype=torch.bool) if key_mask is None else key_mask[b]
    offset = kv_len - q_len
    columns, first = -(-kv_len // block), offset // block
    out = torch.zeros(columns - first, columns, dtype=torch.float64)
    for r in range(columns - first):
        groups = []
        for g in range((first + r) * block // stride, (first + r + 1) * block // stride):
            places = range(g * stride, (g + 1) * stride)
            rows = [p for p in places if offset <= p < kv_len]
            if not rows:
                continue
            scores = torch.full((columns * block // stride,), float("-inf"), dtype=torch.float64)
            for c in range(g + 1):
                keys = [p for p in range(c * stride, (c + 1) * stride) if p < kv_len and valid[p]]
                if not keys:
                    continue
                if method == "pooled":
                    mean = q[[p - offset for p in rows]].mean(0) @ k[keys].mean(0)
                else:
                    pairs = [(p, c * stride + stride - 1 - p % stride) for p in rows]
                    total = sum(q[p - offset] @ k[j] for p, j in pairs if j in keys)
                    mean = total * stride / (len(rows) * len(keys))
                scores[c] = scale * mean + torch.log(torch.tensor(float(len(keys))))
            groups.append(torch.softmax(scores, 0).nan_to_num(0.0))
        if groups:
            out[r] = torch.stack(groups).mean(0).view(columns, -1).sum(1)
    return out


@pytest.mark.parametrize("name", ["whole blocks", "odd length", "more keys than rows", "one row", "left padding"])
def test_sampled_masses_are_those_of_the_rows_that_pay_most(name):
    query, key, key_mask = problem(name)
    q_len, kv_len = query.shape[2], key.shape[2]
    block, stride, scale = 32, 8, 0.7
    grid = Grid(q_len, kv_len, block)
    sampled = Sampled(query, key, key_mask, grid, Selection("sampled", 0.9, block, stride), scale)
    got = torch.cat([sampled.masses(r, r + 1) for r in range(grid.rows)], 2)
    offset, first = kv_len - q_len, (kv_len - q_len) // block
    want = torch.zeros(*query.shape[:2], grid.rows, grid.columns, dtype=torch.float64)
    key = key.double().repeat_interleave(2, 1)
    for group in range(offset // stride, -(-kv_len // stride)):
        # The one row of the group that is looked at, by its definition.
        row = min(max(group * stride + (5 * group + stride // 2) % stride, offset), kv_len - 1)
        scores = (query[:, :, row - offset, None].double() * key[:, :, : row + 1]).sum(-1) * scale
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, : row + 1], float("-inf"))
        weights = torch.nn.functional.pad(scores.softmax(-1).nan_to_num(0.0), (0, grid.columns * block - row - 1))
        cells = want[:, :, row // block - first]
        torch.maximum(cells, weights.unflatten(2, (-1, block)).sum(3), out=cells)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_the_fewest_blocks_that_hold_the_share(share):
    masses = torch.rand(2, 3, 40, 40) ** 4
    possible = torch.rand(2, 1, 40, 40) < 0.9
    always = possible & (torch.rand(2, 1, 40, 40) < 0.1)
    chosen = choose(masses, possible, always, share)
    held = torch.where(possible, masses, 0.0)
    assert (chosen >= always).all()
    assert (chosen <= possible).all()
    total, kept = held.sum(-1), torch.where(chosen, held, 0.0).sum(-1)
    assert (kept >= total * share - 1e-4).all()
    # Without the lightest of those that were chosen for their mass, it is less than the share.
    extra = chosen & ~always
    lightest = torch.where(extra, held, float("inf")).amin(-1)
    assert (torch.where(extra.any(-1), kept - lightest - total * share, -1.0) < 1e-4).all()
    others = torch.where(possible & ~chosen, held, -1.0).amax(-1)
    assert (others <= lightest).all()


def test_blocks_that_matter_are_found():
    """Keys of one block that all queries look at, far back."""
    query, key = torch.randn(1, 2, 512, 16) * 0.1, torch.randn(1, 1, 512, 16) * 0.1
    query[..., 0] += 6.0
    key[:, :, 160:192, 0] += 6.0
    for method in METHODS:
        cells = _cells(select(query, key, None, Selection(method, 0.8, 32, 8, sink=4, last=0), 1.0))
        assert cells[:, :, 6:, 5].all()
        assert cells[:, :, 10].sum(-1).max() <= 4, method


def test_few_rows_at_a_time_choose_the_same(monkeypatch):
    query, key, key_mask = problem("left padding")
    selection = Selection(share=0.5, block=16, stride=8)
    whole = select(query, key, key_mask, selection, 0.5)
    monkeypatch.setattr("tmx_compile.operator.dynamic.choice.SCORE_BUDGET", 1)
    parts = select(query, key, key_mask, selection, 0.5)
    assert torch.equal(_cells(whole), _cells(parts))
    assert torch.equal(whole.visited, parts.visited)


def test_more_blocks_than_a_list_can_name():
    query, key = torch.empty(1, 1, 1, 8, device="meta"), torch.empty(1, 1, 2**22, 8, device="meta")
    with pytest.raises(ValueError, match="key must have at most 524272 tokens, got 4194304"):
        select(query, key, None, Selection(block=16, stride=8), 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "best"}, "method must be one of pooled, antidiagonal, sampled, got 'best'"),
        ({"share": 0.0}, "share must be above 0 and at most 1, got 0.0"),
        ({"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
        ({"block": 48}, "block must be one of 16, 32, 64, 128, got 48"),
        ({"stride": 24}, "stride must divide block=128, got 24"),
        ({"sink": -1}, "sink must not be negative, got -1"),
        ({"last": -2}, "last must not be negative, got -2"),
    ],
)
def test_selections_that_are_none(changes, words):
    with pytest.raises(ValueError, match=words):
        Selection(**changes)


def _cells(lists):
    columns = lists.blocks.shape[3]
    rows = lists.blocks.shape[2]
    return visits(lists, rows, columns, 1)
