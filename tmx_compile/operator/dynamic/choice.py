"""Which blocks of keys each block of rows visits: a compact list, chosen by estimated mass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.estimate import Groups
from tmx_compile.operator.dynamic.grid import Bounds, Grid
from tmx_compile.operator.dynamic.sampled import Sampled

SCORE_BUDGET = 1 << 22
"""Scores that are formed at once, unless one row of blocks has more."""
MOST_BLOCKS = 2**15 - 1
"""Blocks of keys that a list can name: four million tokens in blocks of 128."""


class Lists(NamedTuple):
    """The blocks that every block of rows visits.

    Attributes:
        blocks: (B, H, R, C) int16: the first ``counts`` of a row are blocks of keys, ascending; the rest is arbitrary.
        counts: (B, H, R) int32.
        visited: (2,) int64: blocks visited, and blocks that dense causal attention would visit, over all heads.

    The lists are all that is kept of size (N / block)^2: 2 bytes for each, 64 MB at 131,072 tokens and 32 heads in
    blocks of 128, where the queries take 1 GB.
    """

    blocks: Tensor
    counts: Tensor
    visited: Tensor


def select(query: Tensor, key: Tensor, key_mask: Tensor | None, selection: Selection, scale: float) -> Lists:
    """Choose blocks for one call, in plain PyTorch, a few rows of blocks at a time.

    Args:
        query: (B, H, Sq, D).
        key: (B, Hkv, Skv, D).
        key_mask: (B, Skv) bool or None.
        selection: how.
        scale: factor on the scores.
    """
    grid = grid_of(query, key, selection)
    batch, heads = query.shape[:2]
    device = query.device
    bounds = Bounds.of(grid, key_mask, selection, device)
    estimate = Sampled if selection.method == "sampled" else Groups
    groups = estimate(query, key, key_mask, grid, selection, scale)
    blocks = torch.zeros(batch, heads, grid.rows, grid.columns, dtype=torch.int16, device=device)
    counts = torch.zeros(batch, heads, grid.rows, dtype=torch.int32, device=device)
    possible_blocks = torch.zeros((), dtype=torch.int64, device=device)
    column = torch.arange(grid.columns, device=device)
    first = 0
    while first < grid.rows:
        a_row = batch * heads * groups.of_block * groups.width * (grid.first + first + 1)
        stop = min(grid.rows, first + max(1, SCORE_BUDGET // a_row))
        row = torch.arange(first, stop, device=device) + grid.first
        possible, always = bounds.kept(row, column)
        chosen = choose(groups.masses(first, stop), possible[:, None], always[:, None], selection.share)
        counts[:, :, first:stop] = chosen.sum(-1)
        # Ascending, the chosen ones first.
        blocks[:, :, first:stop] = torch.where(chosen, column, column + grid.columns).argsort(-1).to(torch.int16)
        possible_blocks += possible.sum()
        first = stop
    repeats = batch * heads // bounds.start.shape[0]
    visited = torch.stack([counts.sum(dtype=torch.int64), possible_blocks * repeats])
    return Lists(blocks, counts, visited)


def choose(masses: Tensor, possible: Tensor, always: Tensor, share: float) -> Tensor:
    """The cells kept, bool: ``always``, and of the others the heaviest until all hold ``share`` of the row's mass.

    Cells of one mass are kept or left out together.

    Args:
        masses: (B, H, R, C) not negative; those of a row need not add up to 1.
        possible: broadcasts to it: cells that may be kept.
        always: likewise, of these: cells that are.
        share: in (0, 1].
    """
    if share == 1.0:
        # No sum that is rounded leaves a cell out.
        return possible.expand(masses.shape)
    masses = torch.where(possible, masses, 0.0)
    wanted = masses.sum(-1) * share - torch.where(always, masses, 0.0).sum(-1)
    others = torch.where(always, 0.0, masses)
    ordered = others.sort(-1, descending=True).values
    # How many are taken: each whose predecessors hold too little.
    before = ordered.cumsum(-1) - ordered
    taken = (before < wanted[..., None]).sum(-1, keepdim=True)
    least = ordered.gather(-1, (taken - 1).clamp(min=0))
    heavy = (others >= least) & (others > 0) & (taken > 0)
    return (always | heavy) & possible


def grid_of(query: Tensor, key: Tensor, selection: Selection) -> Grid:
    """The grid of a call.

    Raises:
        ValueError: more blocks of keys than a list can name.
    """
    grid = Grid(query.shape[2], key.shape[2], selection.block)
    if grid.columns > MOST_BLOCKS:
        raise ValueError(f"key must have at most {MOST_BLOCKS * selection.block} tokens, got {key.shape[2]}")
    return grid
