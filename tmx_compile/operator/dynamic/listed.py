"""Causal attention over lists of blocks, in plain PyTorch: for tests, for CPUs, for devices without a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.operator.dynamic.choice import Lists
from tmx_compile.operator.dynamic.grid import Grid, groups_of
from tmx_compile.operator.kernel import accumulation_dtype

GATHER_BUDGET = 1 << 22
"""Elements of keys that are gathered at once, unless one head's block of rows visits more."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, lists: Lists, block: int, scale: float
) -> Tensor:
    """Attention (B, H, Sq, Dv) of rows over the keys of their lists, no later than their own and valid.

    A row that attends to nothing is 0. Heads are taken a few at a time, so that what is gathered stays bounded.
    """
    grid = Grid(query.shape[2], key.shape[2], block)
    batch, heads, _, dim = query.shape
    group = heads // key.shape[1]
    dtype = accumulation_dtype(query.dtype)
    out = query.new_zeros(batch, grid.q_len, heads, value.shape[3]).transpose(1, 2)
    keys, values = (groups_of(grid.padded_keys(x), block) for x in (key, value))
    valid = groups_of(grid.existing_keys(key_mask, key.device).expand(batch, -1), block, 1)
    inside = torch.arange(block, device=key.device)
    for row in range(grid.rows):
        low = max(0, (grid.first + row) * block - grid.offset)
        high = min(grid.q_len, (grid.first + row + 1) * block - grid.offset)
        position = torch.arange(low, high, device=key.device) + grid.offset
        most = max(1, int(lists.counts[:, :, row].max()))
        together = max(1, GATHER_BUDGET // (most * block * dim))
        for b in range(batch):
            for head in range(0, heads, together):
                chosen = slice(head, min(heads, head + together))
                places = lists.blocks[b, chosen, row, :most].long()
                of_head = torch.arange(chosen.start, chosen.stop, device=key.device)[:, None] // group
                used = torch.arange(most, device=key.device) < lists.counts[b, chosen, row, None]
                place = (places[..., None] * block + inside).flatten(1)
                allowed = (valid[b][places] & used[..., None]).flatten(1)[:, None] & (
                    place[:, None] <= position[:, None]
                )
                some_keys, some_values = (x[b][of_head, places].flatten(1, 2).to(dtype) for x in (keys, values))
                scores = query[b, chosen, low:high].to(dtype) @ some_keys.mT * scale
                scores = scores.masked_fill(~allowed, float("-inf"))
                weights = torch.softmax(scores, -1).masked_fill(~allowed.any(-1, keepdim=True), 0.0)
                out[b, chosen, low:high] = (weights @ some_values).to(out.dtype)
    return out
