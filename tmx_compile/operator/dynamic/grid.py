"""The grid of blocks that rows and keys fall into, and which of its cells are kept whatever the estimate says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tmx_compile.mask.selection import Selection
from tmx_compile.operator.kernel import valid_range


def groups_of(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """A tensor with dimension ``dim`` in groups of ``size``: (..., n, ...) as (..., n / size, size, ...)."""
    return torch.unflatten(x, dim, (-1, size))


def products(rows: Tensor, keys: Tensor) -> Tensor:
    """(B, H, R, K) products of rows (B, H, R, D) and keys (B, Hkv, K, D), whose heads they share."""
    batch, heads, count, dim = rows.shape
    by_key_head = rows.reshape(batch, keys.shape[1], heads // keys.shape[1] * count, dim)
    return (by_key_head @ keys.mT).view(batch, heads, count, -1)


@dataclass(frozen=True)
class Grid:
    """Blocks of ``block`` positions, counted from key 0: row i stands at position Skv - Sq + i, as in the operator.

    Attributes:
        q_len: Sq.
        kv_len: Skv.
        block: positions of a block.
    """

    q_len: int
    kv_len: int
    block: int

    @property
    def offset(self) -> int:
        """The position of row 0."""
        return self.kv_len - self.q_len

    @property
    def first(self) -> int:
        """The block that row 0 is in."""
        return self.offset // self.block

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.kv_len // self.block)

    @property
    def rows(self) -> int:
        """Blocks of rows: those of keys from ``first`` on."""
        return self.columns - self.first

    def padded_rows(self, x: Tensor) -> Tensor:
        """Rows (B, H, Sq, D) as whole blocks (B, H, rows * block, D), with zeros for those that do not exist."""
        front = self.offset - self.first * self.block
        behind = self.rows * self.block - front - self.q_len
        return F.pad(x, (0, 0, front, behind)) if front or behind else x

    def padded_keys(self, x: Tensor) -> Tensor:
        """Keys (B, Hkv, Skv, D) as whole blocks, likewise."""
        behind = self.columns * self.block - self.kv_len
        return F.pad(x, (0, 0, 0, behind)) if behind else x

    def shown_keys(self, key: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys as whole blocks, with zeros for hidden ones, which may hold anything; and :meth:`existing_keys`."""
        exists = self.existing_keys(key_mask, key.device)
        keys = self.padded_keys(key)
        if key_mask is not None:
            keys = keys.masked_fill(~exists[:, None, :, None], 0.0)
        return keys, exists

    def existing_rows(self, device: torch.device) -> Tensor:
        """(rows * block,) bool: which rows of the whole blocks exist."""
        position = torch.arange(self.rows * self.block, device=device) + self.first * self.block
        return (position >= self.offset) & (position < self.kv_len)

    def existing_keys(self, key_mask: Tensor | None, device: torch.device) -> Tensor:
        """(B or 1, columns * block) bool: which keys of the whole blocks may be attended."""
        behind = self.columns * self.block - self.kv_len
        if key_mask is None:
            key_mask = torch.ones(1, self.kv_len, dtype=torch.bool, device=device)
        return F.pad(key_mask, (0, behind))


@dataclass(frozen=True)
class Bounds:
    """Of each sequence, in blocks, (B or 1,) int64 each.

    Attributes:
        start: the block of the first valid key.
        end: one past that of the last; 0 where there is none.
        sink_end: one past the last block with a sink.
        last_low: the first block with a last row; ``end`` where there is none.
    """

    start: Tensor
    end: Tensor
    sink_end: Tensor
    last_low: Tensor

    @classmethod
    def of(cls, grid: Grid, key_mask: Tensor | None, selection: Selection, device: torch.device) -> Bounds:
        """The bounds of every sequence."""
        if key_mask is None:
            known = Bounds.without_padding(grid, selection)
            return cls(*(torch.full((1,), bound, dtype=torch.int64, device=device) for bound in known))
        selection = selection.bounded(grid.kv_len)
        start, end = valid_range(key_mask)
        return cls(*_in_blocks(start, end, selection, grid.block, torch.minimum, torch.maximum))

    @staticmethod
    def without_padding(grid: Grid, selection: Selection) -> tuple[int, int, int, int]:
        """The same four where every key may be attended."""
        known: tuple[int, int, int, int]
        known = _in_blocks(0, grid.kv_len, selection.bounded(grid.kv_len), grid.block, min, max)
        return known

    def kept(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Which cells may hold a pair that is attended, and which of them are always kept.

        Args:
            row: (R,) blocks of rows, by their place among all blocks.
            column: (C,) blocks of keys.

        Returns:
            possible, always: (B or 1, R, C) bool.
        """
        start, end, sink_end, last_low = (
            x[:, None, None] for x in (self.start, self.end, self.sink_end, self.last_low)
        )
        row, column = row[None, :, None], column[None, None, :]
        possible = (column <= row) & (column >= start) & (column < end)
        near = column >= row - 1
        whole = (row >= last_low) & (row < end)
        return possible, possible & (near | (column < sink_end) | whole)


def _in_blocks(start: Any, end: Any, selection: Selection, block: int, least: Any, most: Any) -> Any:
    """The four of :class:`Bounds` from the valid keys [start, end)."""
    stop = (end + block - 1) // block
    sink_end = (least(start + selection.sink, end) + block - 1) // block
    last_low = most(end - selection.last, start) // block
    return start // block, stop, sink_end, last_low if selection.last else stop
