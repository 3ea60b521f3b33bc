"""What the user promised, checked when the compiled model runs: a causal mask, consecutive row positions.

Both are operators of their own, so that no compiler removes them; what the substitution needs next is their result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cells of a mask looked at together: 16 MiB of bool.
_CELLS = 1 << 24
MASKED = -9984.0
"""Added scores from here down are masked: -1e4 as bfloat16 rounds it, the highest that models write."""

_BROKEN = "assume_causal was promised, but {what}"


@torch.library.custom_op("tmx::causal_key_mask", mutates_args=())
def _causal_key_mask(mask: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    batch, width = mask.shape[0], mask.shape[-1]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != q_len or width < kv_len:
        raise ValueError(f"expected a mask of shape (batch, 1, {q_len}, at least {kv_len}), got {tuple(mask.shape)}")
    rows = max(1, _CELLS // max(1, batch * kv_len))
    valid = mask.new_zeros(batch, kv_len, dtype=torch.bool)
    for row in range(0, q_len, rows):
        valid |= _attended(mask[:, 0, row : row + rows, :kv_len]).any(1)
    key = torch.arange(kv_len, device=mask.device)
    # The last row stands at the last key that any row attends.
    end = torch.where(valid, key + 1, 0).amax() if q_len < kv_len else torch.tensor(kv_len, device=mask.device)
    first = end - q_len
    good = torch.ones((), dtype=torch.bool, device=mask.device)
    for row in range(0, q_len, rows):
        seen = _attended(mask[:, 0, row : row + rows, :kv_len])
        position = first + torch.arange(row, row + seen.shape[1], device=mask.device)
        causal = valid[:, None, :] & (key <= position[:, None])
        own = valid[:, position.clamp(0, kv_len - 1)]
        good = good & ((seen == causal) | ~own[:, :, None]).all()
    _check(good, "a mask is not causal: a row attends a later key, or does not attend an earlier valid one")
    return valid, first


def _attended(mask: Tensor) -> Tensor:
    """True where a mask lets a row attend, (B, rows, keys); neither 0 nor masked is an error."""
    if mask.dtype == torch.bool:
        return mask
    _check(((mask == 0) | (mask <= MASKED)).all(), "a mask adds values other than 0 and minus infinity to the scores")
    return mask == 0


@_causal_key_mask.register_fake
def _(mask: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
    del q_len
    return mask.new_empty(mask.shape[0], kv_len, dtype=torch.bool), mask.new_empty((), dtype=torch.int64)


@torch.library.custom_op("tmx::first_position", mutates_args=())
def _first_position(positions: Tensor) -> Tensor:
    good = (positions[1:] - positions[:-1] == 1).all() & (positions[:1] >= 0).all()
    _check(good, "the positions of the rows are not consecutive")
    return positions[0].clone()


@_first_position.register_fake
def _(positions: Tensor) -> Tensor:
    return positions.new_empty(())


def _check(good: Tensor, what: str) -> None:
    """Raise where that costs nothing; on an accelerator, assert without waiting for it."""
    message = _BROKEN.format(what=what)
    if good.device.type != "cpu":
        torch._assert_async(good, message)
    elif not bool(good):
        raise ValueError(message)


CHECK_MASK = torch.ops.tmx.causal_key_mask.default
"""``(mask (B, 1, Sq, >= Skv) bool or float, Sq, Skv) -> (valid keys (B, Skv) bool, position of row 0 () int64)``.

The mask must be causal and-ed with the valid keys, in every row whose own key is valid. Raises ``ValueError`` where it
is not, in O(block) memory.
"""

FIRST_POSITION = torch.ops.tmx.first_position.default
"""``(positions (Sq,) int) -> position of row 0 ()``; raises ``ValueError`` where they are not consecutive."""
