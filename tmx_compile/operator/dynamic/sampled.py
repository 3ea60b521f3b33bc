"""How much of a row's softmax each block of keys holds, exactly, for a few rows of each block of rows.

Of each group of ``stride`` rows one is looked at, against every key that it sees. A block of keys weighs as much as the
sampled row that pays it most: a mean over rows, or over keys before the softmax, would hide the one key that a row
looks up. (MInference, arXiv 2407.02490, looks at the last rows of a prompt in this way, for all rows.) It costs
``1 / stride`` of dense attention's scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.grid import Grid, groups_of, products

_STEP = 5


def place_in_group(group: Tensor, stride: int) -> Tensor:
    """Which row of each group is sampled: another one from group to group, so that no period of a text hides rows."""
    return (_STEP * group + stride // 2) % stride


class Sampled:
    """The sampled rows and the keys of one call.

    Args:
        query: (B, H, Sq, D).
        key: (B, Hkv, Skv, D).
        key_mask: (B, Skv) bool or None.
        grid: of the call.
        selection: its stride.
        scale: factor on the scores.
    """

    def __init__(
        self, query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, selection: Selection, scale: float
    ) -> None:
        self.grid = grid
        self.of_block = grid.block // selection.stride
        """Rows that are sampled of a block."""
        self.width = grid.block
        """Scores of a sampled row with a block of keys."""
        keys, self.exists = grid.shown_keys(key, key_mask)
        self.keys = keys.float()
        group = torch.arange(grid.rows * self.of_block, device=key.device) + grid.first * self.of_block
        wanted = group * selection.stride + place_in_group(group, selection.stride)
        self.position = wanted.clamp(grid.offset, grid.kv_len - 1)
        """(groups,) positions of the sampled rows; of a group with few rows the nearest one that exists."""
        self.sampled = self.position // selection.stride == group
        """(groups,) whether a group has a row."""
        self.rows = query[:, :, self.position - grid.offset].float() * scale

    def masses(self, first: int, stop: int) -> Tensor:
        """The masses (B, H, stop - first, columns) float32 of the blocks of rows [first, stop), counted from row 0's.

        Each in [0, 1]; those of a row of blocks do not add up to 1.
        """
        low, high = first * self.of_block, stop * self.of_block
        columns = self.grid.first + stop
        scores = products(self.rows[:, :, low:high], self.keys[:, :, : columns * self.grid.block])
        place = torch.arange(scores.shape[3], device=scores.device)
        seen = (place <= self.position[low:high, None]) & self.sampled[low:high, None]
        seen = seen & self.exists[:, None, : scores.shape[3]]
        shares = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), -1).nan_to_num(0.0)
        masses = groups_of(groups_of(shares, self.grid.block, 3).sum(4), self.of_block).amax(3)
        return torch.nn.functional.pad(masses, (0, self.grid.columns - columns))
