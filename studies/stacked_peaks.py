"""Lists of blocks from exact scores, by the row that needs a block most: what a better estimate could reach.

No way to save time: the scores of all pairs are formed, some rows of blocks at a time. It tells what the estimate costs
from what leaving blocks out costs. A block of keys weighs as much as the largest mass that one row of the block of rows
pays it, so a row that looks one thing up counts as much as many rows that look everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from studies.stacked_estimates import lists_of
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists
from tmx_compile.operator.dynamic.choice import choose, grid_of
from tmx_compile.operator.dynamic.grid import Bounds, groups_of

SCORE_BUDGET = 1 << 25
"""Scores that are formed at once."""


def peak_lists(query: Tensor, key: Tensor, selection: Selection, scale: float) -> Lists:
    """As :func:`tmx_compile.operator.dynamic.select`, without padding, for as many rows as keys.

    Args:
        query: (1, H, N, D), N a multiple of the block.
        key: (1, Hkv, N, D).
        selection: its share, block, sinks and last rows.
        scale: factor on the scores.
    """
    grid = grid_of(query, key, selection)
    block, heads = grid.block, query.shape[1]
    if query.shape[2] % block or grid.offset:
        raise ValueError(f"query must have as many rows as keys, a multiple of {block}, got {query.shape[2]}")
    bounds = Bounds.of(grid, None, selection, query.device)
    key = key.repeat_interleave(heads // key.shape[1], 1)
    column = torch.arange(grid.columns, device=query.device)
    place = torch.arange(grid.kv_len, device=query.device)
    together = max(1, SCORE_BUDGET // (heads * block * grid.kv_len))
    chosen_parts, possible_blocks = [], 0
    for first in range(0, grid.rows, together):
        row = torch.arange(first, min(grid.rows, first + together), device=query.device)
        at = torch.arange(first * block, (int(row[-1]) + 1) * block, device=query.device)
        scores = (query[:, :, at].float() @ key.float().mT * scale).masked_fill(place > at[:, None], float("-inf"))
        weights = groups_of(torch.softmax(scores, -1), block, 3).sum(4)
        masses = groups_of(weights, block).amax(3)
        possible, always = bounds.kept(row, column)
        masses = masses / masses.sum(-1, keepdim=True)
        chosen_parts.append(choose(masses, possible[:, None], always[:, None], selection.share))
        possible_blocks += int(possible.sum())
    return lists_of(torch.cat(chosen_parts, 2), possible_blocks)
