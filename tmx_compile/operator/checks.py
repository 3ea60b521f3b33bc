"""What the user promised, checked when the compiled model runs: a causal mask, consecutive row positions.

Both are operators of their own, so that no compiler removes them; what the substitution needs next is their result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cells of a mask looked at together: 16 MiB of bool.
CELLS = 1 << 24
MASKED = -9984.0
"""Added scores from here down are masked: -1e4 as bfloat16 rounds it, the highest that models write."""

_BROKEN = "assume_causal was promised, but {what}"


@torch.library.custom_op("tmx::causal_key_mask", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _causal_key_mask(mask: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(mask.shape)
    mask = mask[(None,) * (4 - mask.dim())]
    batch, width = mask.shape[0], mask.shape[-1]
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != q_len or width < kv_len:
        raise ValueError(f"expected a mask of shape (batch, 1, {q_len}, at least {kv_len}), got {shape}")
    step = max(1, CELLS // max(1, batch * kv_len))
    blocks = [mask[:, 0, row : row + step, :kv_len] for row in range(0, q_len, step)]
    key = torch.arange(kv_len, device=mask.device)
    valid = torch.zeros(batch, kv_len, dtype=torch.bool, device=mask.device)
    firsts, lasts = [], []
    for block in blocks:
        seen = _attended(block)
        valid |= seen.any(1)
        firsts.append(torch.where(seen, key, kv_len).amin(2))
        lasts.append(torch.where(seen, key, -1).amax(2))
    row = torch.arange(q_len, device=mask.device)
    oldest, newest = torch.cat(firsts, 1), torch.cat(lasts, 1)
    first = _first_row(newest - row, kv_len - q_len)
    position = first + row
    own = valid[:, position]
    # How far back the rows see (`far`), and whether some row would see further if it were not for a window.
    start = torch.where(valid, key, kv_len).amin(1, keepdim=True)
    # A row whose own key is hidden may see nothing; before its sequence, no row has a meaning.
    exempt = ~own & ((position < start) | (newest < 0))
    far = torch.where(exempt, 0, position - oldest).amax()
    shown = (~exempt & (position - start > far)).any()
    good = torch.ones((), dtype=torch.bool, device=mask.device)
    for number, block in enumerate(blocks):
        here = slice(number * step, (number + 1) * step)
        p, free = position[here], exempt[:, here]
        causal = valid[:, None, :] & (key <= p[:, None]) & (p[:, None] - key <= far)
        good = good & ((_attended(block) == causal) | free[:, :, None]).all()
    # One read of the device: what follows depends on the window, and is said on the host.
    kept, limit, limited = torch.stack([good.long(), far, shown.long()]).tolist()
    if not kept:
        what = "a mask is not causal: a row attends a later key, or does not attend an earlier valid one"
        raise ValueError(_BROKEN.format(what=what))
    return valid, first, torch.tensor([limit, limited])


def _first_row(ahead: Tensor, room: int) -> Tensor:
    """The position of row 0, from how far each row's newest key lies ahead of the row's number, (B, Sq).

    A row whose own key is valid has it as its newest. Others (padded on the right, or of no sequence) have any number,
    and hardly two of them the same one: what most rows say is the position.
    """
    if room == 0:
        return torch.zeros((), dtype=torch.int64, device=ahead.device)
    inside = torch.where((ahead >= 0) & (ahead <= room), ahead, room + 1)
    votes = torch.zeros(room + 2, dtype=torch.int64, device=ahead.device)
    votes.index_add_(0, inside.flatten(), torch.ones_like(inside.flatten()))
    return votes[:-1].argmax()


def _attended(mask: Tensor) -> Tensor:
    """True where a mask lets a row attend, (B, rows, keys); neither 0 nor masked is an error."""
    if mask.dtype == torch.bool:
        return mask
    _check(((mask == 0) | (mask <= MASKED)).all(), "a mask adds values other than 0 and minus infinity to the scores")
    return mask == 0


@_causal_key_mask.register_fake
def _(mask: Tensor, q_len: int, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    del q_len
    batch = mask.shape[0] if mask.dim() == 4 else 1
    valid = mask.new_empty(batch, kv_len, dtype=torch.bool)
    window = torch.empty(2, dtype=torch.int64, device="cpu")
    return valid, mask.new_empty((), dtype=torch.int64), window


@torch.library.custom_op("tmx::first_position", mutates_args=())
def _first_position(positions: Tensor) -> Tensor:
    good = (positions[1:] - positions[:-1] == 1).all() & (positions[:1] >= 0).all()
    _check(good, "the positions of the rows are not consecutive")
    return positions[0].clone()


@_first_position.register_fake
def _(positions: Tensor) -> Tensor:
    return positions.new_empty(())


@torch.library.custom_op("tmx::first_row_inside", mutates_args=())
def _first_row_inside(first: Tensor, q_len: int, kv_len: int) -> Tensor:
    room = kv_len - q_len
    message = f"attention rows start at key {{}}, and {q_len} rows among {kv_len} keys start at 0 to {room}"
    good = ((first >= 0) & (first <= room)).all()
    if first.device.type != "cpu":
        torch._assert_async(good, message.format("(a position that the run tells)"))
    elif not bool(good):
        raise ValueError(message.format(", ".join(map(str, first.flatten().tolist()))))
    return first.clone()


@_first_row_inside.register_fake
def _(first: Tensor, q_len: int, kv_len: int) -> Tensor:
    return torch.empty_like(first)


def _check(good: Tensor, what: str) -> None:
    """Raise where that costs nothing; on an accelerator, assert without waiting for it."""
    message = _BROKEN.format(what=what)
    if good.device.type != "cpu":
        torch._assert_async(good, message)
    elif not bool(good):
        raise ValueError(message)


CHECK_MASK = torch.ops.tmx.causal_key_mask.default
"""``(mask, Sq, Skv) -> (valid keys (B or 1, Skv) bool, position of row 0 () int64, (2,) int64 in host memory)``.

The mask is (Sq, >= Skv), (1, Sq, >= Skv) or (B or 1, 1, Sq, >= Skv), bool or float. It must be causal and-ed with the
valid keys and with at most one window; a row whose own key is hidden may be empty, and one before its sequence's first
key may hold anything. The last result tells how far back the rows
see, and 1 where that is a window's doing. Raises ``ValueError`` where the mask is anything else. O(block) memory.
"""

FIRST_POSITION = torch.ops.tmx.first_position.default
"""``(positions (Sq,) int) -> position of row 0 ()``; raises ``ValueError`` where they are not consecutive."""

FIRST_ROW_INSIDE = torch.ops.tmx.first_row_inside.default
"""``(position of row 0, Sq, Skv) -> position of row 0``; raises ``ValueError`` where a row lies beyond the keys."""
