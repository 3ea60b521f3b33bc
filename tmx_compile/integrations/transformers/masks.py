"""Masks over the few keys that a streaming layer holds, from the mask that its model made for all keys."""

from __future__ import annotations

import torch
from torch import Tensor


def first_valid(mask: Tensor) -> Tensor:
    """(B,) the first key that the last row of a (B, 1, rows, keys) mask attends to: where each sequence starts."""
    last = mask[:, 0, -1]
    return (last if last.dtype == torch.bool else last == 0).to(torch.int8).argmax(1)


def limited(mask: Tensor | None, kept: Tensor, position: Tensor) -> Tensor:
    """A mask over columns.

    Args:
        mask: over all keys, (B, 1, rows, keys) bool or float; None: nothing but ``kept``.
        kept: (B or 1, rows, columns) bool, which columns a row may attend to by its place.
        position: (B or 1, columns) int64, the key that a column holds.

    Returns:
        (B or 1, 1, rows, columns) of the mask's kind.
    """
    kept = kept[:, None]
    if mask is None:
        return kept
    batch = max(mask.shape[0], position.shape[0])
    index = position.clamp(0, mask.shape[3] - 1)[:, None, None, :].expand(batch, 1, mask.shape[2], -1)
    seen = mask.expand(batch, -1, -1, -1).gather(3, index)
    if seen.dtype == torch.bool:
        return seen & kept
    return seen.masked_fill(~kept, torch.finfo(seen.dtype).min)


def take(x: Tensor, column: Tensor) -> Tensor:
    """Columns (B, n) of (B, H, columns, D): (B, H, n, D)."""
    return x.gather(2, column[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
