"""Block-sparse attention with its lists written out: an oracle in float64, random lists, and problems."""

import torch

from tests.support.calls import Case
from tests.support.oracle import parts
from tmx_compile.operator.dynamic import Lists

CASES = {
    "whole blocks": Case(128, 128, 0, 0, 0, heads=4, kv_heads=2),
    "odd length": Case(211, 211, 0, 0, 0, heads=6, kv_heads=2),
    "one token": Case(1, 1, 0, 0, 0),
    "multi-query": Case(100, 100, 0, 0, 0, heads=5, kv_heads=1, batch=2),
    "more keys than rows": Case(90, 240, 0, 0, 0),
    "value dim differs": Case(100, 100, 0, 0, 0, dim=24, v_dim=16),
    "odd head dim": Case(100, 100, 0, 0, 0, dim=33),
    "bfloat16": Case(200, 200, 0, 0, 0, dim=64, dtype=torch.bfloat16),
    "float64": Case(100, 100, 0, 0, 0, dtype=torch.float64),
    "strided": Case(150, 150, 0, 0, 0, heads=4, kv_heads=2, strided=True),
    "left padding": Case(200, 200, 0, 0, 0, batch=3, valid=((0, 200), (60, 200), (199, 200))),
    "padding on both sides": Case(200, 200, 0, 0, 0, batch=2, valid=((67, 140), (3, 150)), holes=True),
    "no valid key": Case(100, 100, 0, 0, 0, batch=2, valid=((0, 100), (0, 0))),
    "padding and more keys than rows": Case(90, 240, 0, 0, 0, batch=2, valid=((0, 240), (150, 240))),
}


def visits(lists, q_len, kv_len, block):
    """(B, H, Sq, Skv) bool: which pairs are in a visited block, one list at a time."""
    batch, heads, rows, _ = lists.blocks.shape
    offset = kv_len - q_len
    cells = torch.zeros(batch, heads, rows, -(-kv_len // block), dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                named = lists.blocks[b, h, r, : lists.counts[b, h, r]].long()
                assert named.unique().shape == named.shape, "a block is named twice"
                cells[b, h, r, named] = True
    row = torch.arange(offset, kv_len) // block - offset // block
    column = torch.arange(kv_len) // block
    return cells[:, :, row][:, :, :, column]


def listed_oracle(q, k, v, key_mask, lists, block, scale):
    """Causal attention in float64 over the visited pairs of valid keys."""
    q_len, kv_len = q.shape[2], k.shape[2]
    position = torch.arange(kv_len - q_len, kv_len)[:, None]
    mask = visits(lists, q_len, kv_len, block) & (torch.arange(kv_len) <= position)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = (q.double() @ k.mT * scale).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ v


def random_lists(batch, heads, q_len, kv_len, block, density=0.5):
    """Any blocks of those up to the diagonal, in ascending order, and sometimes none."""
    columns, first = -(-kv_len // block), (kv_len - q_len) // block
    chosen = torch.rand(batch, heads, columns - first, columns) < density
    chosen &= torch.arange(columns) <= torch.arange(first, columns)[:, None]
    order = torch.where(chosen, torch.arange(columns), columns + torch.arange(columns)).argsort(-1)
    counts = chosen.sum(-1, dtype=torch.int32)
    return Lists(order.to(torch.int16), counts, torch.zeros(2, dtype=torch.int64))


def always_kept(q_len, kv_len, key_mask, selection, batch):
    """(B, R, C) bool, the possible cells and those that are kept whatever the estimate says, cell by cell."""
    block, offset = selection.block, kv_len - q_len
    columns, first = -(-kv_len // block), offset // block
    possible = torch.zeros(batch, columns - first, columns, dtype=torch.bool)
    kept = torch.zeros_like(possible)
    for b in range(batch):
        for valid, _ in parts(kv_len, None if key_mask is None else key_mask[b]):
            start, end = valid.nonzero()[0].item(), valid.nonzero()[-1].item() + 1
            sinks = {p // block for p in range(start, min(start + selection.sink, end))}
            finals = {p // block for p in range(max(start, end - selection.last), end)}
            for r in range(columns - first):
                row = first + r
                for c in range(start // block, min(row, (end - 1) // block) + 1):
                    possible[b, r, c] = True
                    kept[b, r, c] = c >= row - 1 or c in sinks or row in finals
    return possible, kept
