"""Lists of blocks from exact scores, by the row that needs a block most: what a better estimate could reach.

No way to save time: the scores of all pairs are formed, some rows of blocks at a time. It tells what the estimate costs
from what leaving blocks out costs. A block of keys weighs as much as the largest mass that one row of the block of rows
pays it, so a row that looks one thing up counts as much as many rows that look everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from studies.stacked_estimates import lists_by
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists
from tmx_compile.operator.dynamic.grid import Grid, groups_of


def peak_lists(query: Tensor, key: Tensor, selection: Selection, scale: float) -> Lists:
    """As :func:`tmx_compile.operator.dynamic.select`, without padding, for as many rows as keys.

    Args:
        query: (1, H, N, D), N a multiple of the block.
        key: (1, Hkv, N, D).
        selection: its share, block, sinks and last rows.
        scale: factor on the scores.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    place = torch.arange(key.shape[2], device=query.device)

    def masses(grid: Grid, first: int, stop: int) -> Tensor:
        at = place[first * grid.block : stop * grid.block]
        scores = (query[:, :, at].float() @ key.float().mT * scale).masked_fill(place > at[:, None], float("-inf"))
        weights = groups_of(torch.softmax(scores, -1), grid.block, 3).sum(4)
        return groups_of(weights, grid.block).amax(3)

    return lists_by(masses, key.shape[2], query, key, selection)
