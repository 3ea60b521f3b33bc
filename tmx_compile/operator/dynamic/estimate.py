"""How much of a row of blocks' softmax each block of keys holds, estimated from groups of tokens.

A *group* is ``stride`` consecutive positions. The score of a group of rows with a group of keys is a mean over some of
their pairs, and stands for all of them:

- ``pooled``: the mean over all pairs, which is the product of the mean query and the mean key (as FlexPrefill,
  arXiv 2502.20766, and earlier work do with whole blocks);
- ``antidiagonal``: the mean over the pairs on the antidiagonal of the group's square, which meets every row and every
  key once (XAttention, arXiv 2503.16428). It costs ``stride`` times as much.

The softmax runs over groups; a block's mass is the sum over its groups of keys, and the mean over its groups of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.grid import Grid, groups_of, products


class Groups:
    """Rows and keys of one call in groups, and the scores between them.

    Args:
        query: (B, H, Sq, D).
        key: (B, Hkv, Skv, D).
        key_mask: (B, Skv) bool or None.
        grid: of the call.
        selection: method and stride.
        scale: factor on the scores.
    """

    def __init__(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, selection: Selection, scale: float
    ) -> None:
        self.grid = grid
        self.stride = selection.stride
        self.of_block = grid.block // selection.stride
        """Groups of a block."""
        self.width = self.of_block
        """Scores of a group of rows with a block of keys."""
        keys, exists = grid.shown_keys(key, key_mask)
        rows = grid.padded_rows(query)
        self.rows_of = grid.existing_rows(query.device).view(-1, self.stride).sum(1)
        """(groups of rows,) how many rows each has."""
        self.keys_of = exists.view(exists.shape[0], -1, self.stride).sum(2)
        """(B or 1, groups of keys) how many valid keys each has."""
        # A mean over all pairs of a full group: what is missing is made up for in the scores.
        factor = scale / self.stride
        if selection.method == "pooled":
            self.rows = groups_of(rows, self.stride).sum(3, dtype=torch.float32) * (factor / self.stride)
            self.keys = groups_of(keys, self.stride).sum(3, dtype=torch.float32)
        else:
            self.rows = groups_of(rows, self.stride).flip(3).flatten(3).float() * factor
            self.keys = groups_of(keys, self.stride).flatten(3).float()

    def masses(self, first: int, stop: int) -> Tensor:
        """The masses (B, H, stop - first, columns) float32 of the blocks of rows [first, stop), counted from row 0's.

        Those of a row of blocks add up to 1, or are all 0 where it sees no key.
        """
        low, high = first * self.of_block, stop * self.of_block
        columns = self.grid.first + stop
        scores = products(self.rows[:, :, low:high], self.keys[:, :, : columns * self.of_block])
        missing = self.stride / self.rows_of[low:high].clamp(min=1)
        keys_of = self.keys_of[:, None, None, : scores.shape[3]]
        # As many keys as a group has, each with the group's score.
        scores = scores * missing[:, None] * (self.stride / keys_of.clamp(min=1)) + keys_of.log()
        place = torch.arange(scores.shape[3], device=scores.device)
        row = torch.arange(low, high, device=scores.device)[:, None] + self.grid.first * self.of_block
        scores = scores.masked_fill(place > row, float("-inf"))
        shares = torch.softmax(scores, -1).nan_to_num(0.0)
        shares = groups_of(shares, self.of_block, 3).sum(4)
        exist = (self.rows_of[low:high] > 0).to(shares.dtype)[:, None]
        by_block = groups_of(shares * exist, self.of_block).sum(3)
        masses = by_block / exist.view(stop - first, self.of_block).sum(1).clamp(min=1.0)[:, None]
        return torch.nn.functional.pad(masses, (0, self.grid.columns - columns))
