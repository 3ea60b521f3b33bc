"""Lists of blocks from estimates that are no part of the package: what they would reach, and not how fast.

``two keys``: every row against two keys of each block: the one farthest from the block's mean, and the mean of the
others. ``box``: every row against the largest score that any key in the block's box could have (Quest, arXiv
2406.10774). A block of keys weighs as much as the row that pays it most, as in :mod:`studies.stacked_peaks`. ``two keys
+ sampled`` takes the larger of that and of what one row of 16 pays, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists
from tmx_compile.operator.dynamic.choice import choose, grid_of
from tmx_compile.operator.dynamic.grid import Bounds, Grid, groups_of
from tmx_compile.operator.dynamic.sampled import Sampled

ESTIMATES = ("two keys", "box", "two keys + sampled")
SCORE_BUDGET = 1 << 25
"""Scores that are formed at once."""


def estimated_lists(name: str, query: Tensor, key: Tensor, selection: Selection, scale: float) -> Lists:
    """As :func:`studies.stacked_peaks.peak_lists`, from an estimate of :data:`ESTIMATES`."""

    def masses(grid: Grid, first: int, stop: int) -> Tensor:
        return block_masses(name, query, key, grid, first, stop, scale)

    return lists_by(masses, 2 * -(-key.shape[2] // selection.block), query, key, selection)


def lists_by(
    masses_of: Callable[[Grid, int, int], Tensor], width: int, query: Tensor, key: Tensor, selection: Selection
) -> Lists:
    """The lists that follow from masses, (1, H, stop - first, C) of blocks of rows [first, stop), not normalised.

    ``width`` scores are formed for each row.
    """
    grid = grid_of(query, key, selection)
    block, heads = grid.block, query.shape[1]
    if query.shape[2] % block or grid.offset:
        raise ValueError(f"query must have as many rows as keys, a multiple of {block}, got {query.shape[2]}")
    bounds = Bounds.of(grid, None, selection, query.device)
    column = torch.arange(grid.columns, device=query.device)
    together = max(1, SCORE_BUDGET // (heads * block * width))
    chosen_parts, possible_blocks = [], 0
    for first in range(0, grid.rows, together):
        stop = min(grid.rows, first + together)
        masses = masses_of(grid, first, stop)
        possible, always = bounds.kept(torch.arange(first, stop, device=query.device), column)
        masses = masses / masses.sum(-1, keepdim=True)
        chosen_parts.append(choose(masses, possible[:, None], always[:, None], selection.share))
        possible_blocks += int(possible.sum())
    return lists_of(torch.cat(chosen_parts, 2), possible_blocks)


def block_masses(name: str, query: Tensor, key: Tensor, grid: Grid, first: int, stop: int, scale: float) -> Tensor:
    """The masses (1, H, stop - first, C) of blocks of rows, not normalised."""
    block = grid.block
    keys = groups_of(key.float().repeat_interleave(query.shape[1] // key.shape[1], 1), block)
    rows = query[:, :, first * block : stop * block].float() * scale
    scores = _box(rows, keys) if name == "box" else _two_keys(rows, keys)
    own = torch.arange(first * block, stop * block, device=query.device) // block
    later = torch.arange(grid.columns, device=query.device) > own[:, None]
    masses = groups_of(torch.softmax(scores.masked_fill(later, float("-inf")), -1), block).amax(3)
    if "sampled" not in name:
        return masses
    sampled = Sampled(query, key, None, grid, Selection("sampled", block=block), scale)
    return torch.maximum(masses, sampled.masses(first, stop))


def lists_of(chosen: Tensor, possible_blocks: int) -> Lists:
    """Lists of chosen cells (1, H, R, C), of so many that are possible for each head."""
    column = torch.arange(chosen.shape[3], device=chosen.device)
    counts = chosen.sum(-1, dtype=torch.int32)
    blocks = torch.where(chosen, column, column + chosen.shape[3]).argsort(-1).to(torch.int16)
    visited = torch.stack([counts.sum(dtype=torch.int64), counts.new_tensor(possible_blocks * chosen.shape[1])])
    return Lists(blocks, counts, visited)


def _two_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """Log-sum-exps (1, H, rows, C) over blocks of keys (1, H, C, block, D)."""
    block = keys.shape[3]
    mean = keys.mean(3, keepdim=True)
    place = (keys - mean).square().sum(-1, keepdim=True).argmax(3, keepdim=True)
    far = keys.gather(3, place.expand(-1, -1, -1, 1, keys.shape[4]))
    others = (mean * block - far) / (block - 1)
    at_far, at_others = (rows @ x.squeeze(3).mT for x in (far, others))
    return torch.logaddexp(at_far, at_others + math.log(block - 1))


def _box(rows: Tensor, keys: Tensor) -> Tensor:
    """The same by the corner of each block's box that scores most."""
    return rows.clamp(min=0) @ keys.amax(3).mT + rows.clamp(max=0) @ keys.amin(3).mT
