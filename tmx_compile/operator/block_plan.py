"""Whether the block plan of a FlexAttention call lists what its mask attends, without forming the mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MESSAGE = (
    "tmx_compile: the BlockMask does not list the blocks that its mask_mod attends (or lists one twice, or repeats a "
    "document's number in two places): make it with create_block_mask from the same mask_mod"
)


@torch.library.custom_op("tmx::block_plan_holds", mutates_args=())
def _block_plan_holds(
    counts: Tensor,
    indices: Tensor,
    full_counts: Tensor | None,
    full_indices: Tensor | None,
    key_mask: Tensor | None,
    q_len: int,
    kv_len: int,
    first_row: int,
    rows: int,
    keys: int,
    reach: int | None,
) -> Tensor:
    device = counts.device
    q_blocks, k_blocks = -(-q_len // rows), -(-kv_len // keys)
    partial, good = _listed(counts, indices, q_blocks, k_blocks)
    full = torch.zeros_like(partial)
    if full_counts is not None and full_indices is not None:
        full, full_good = _listed(full_counts, full_indices, q_blocks, k_blocks)
        good = good & full_good
    if key_mask is None:
        key_mask = torch.ones(1, kv_len, dtype=torch.bool, device=device)
    elif key_mask.shape[1] < kv_len:
        key_mask = torch.nn.functional.pad(key_mask, (0, kv_len - key_mask.shape[1]))
    visible = _Visible(key_mask, reach)
    row = torch.arange(q_blocks, device=device) * rows + first_row
    last_row = (row + rows).clamp(max=first_row + q_len) - 1
    key = torch.arange(k_blocks, device=device) * keys
    last_key = (key + keys).clamp(max=kv_len) - 1
    listed = partial + full
    needed = visible.any(row, last_row, key, last_key)[:, None]
    whole = visible.all(row, last_row, key, last_key)[:, None]
    good = good & (listed <= 1).all() & (~needed | (listed > 0)).all() & (whole | (full == 0)).all()
    return good & visible.one_run_each


def _listed(counts: Tensor, indices: Tensor, q_blocks: int, k_blocks: int) -> tuple[Tensor, Tensor]:
    """How often each block of keys is listed, (B or 1, H or 1, row blocks, key blocks), and whether it can be read."""
    if counts.shape[-1] < q_blocks:
        return counts.new_zeros(1, 1, q_blocks, k_blocks), torch.zeros((), dtype=torch.bool, device=counts.device)
    counts, indices = counts[..., :q_blocks], indices[..., :q_blocks, :]
    used = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    good = (counts <= indices.shape[-1]).all() & (~used | (indices >= 0)).all()
    # One column more, for what is not used: it is cut off again.
    place = torch.where(used, indices, k_blocks).clamp(0, k_blocks).long()
    table = counts.new_zeros(*counts.shape, k_blocks + 1).scatter_add_(-1, place, torch.ones_like(indices))
    return table[..., :k_blocks], good


class _Visible:
    """Which keys the rows of a block see together, for rows at (B, Skv) positions whose own key is valid.

    A row at p sees the valid keys from ``low[p]`` to p, and ``low`` never falls: what a block of rows sees reaches from
    the ``low`` of its first valid row to its last valid row.
    """

    def __init__(self, key_mask: Tensor, reach: int | None) -> None:
        valid = key_mask > 0 if key_mask.dtype != torch.bool else key_mask
        kv_len = valid.shape[1]
        position = torch.arange(kv_len, device=valid.device).expand_as(valid)
        self.before = torch.where(valid, position, -1).cummax(1).values
        self.after = torch.where(valid, position, kv_len).flip(1).cummin(1).values.flip(1)
        self.count = torch.nn.functional.pad(valid.long().cumsum(1), (1, 0))
        self.low = torch.zeros_like(position) if reach is None else (position - reach).clamp(min=0)
        self.one_run_each = torch.ones((), dtype=torch.bool, device=valid.device)
        if key_mask.dtype != torch.bool:
            # An invalid key counts to the document before it, so that holes do not split a document.
            near = torch.where(self.before >= 0, self.before, self.after.clamp(max=kv_len - 1))
            document = key_mask.gather(1, near)
            begins = torch.nn.functional.pad(document[:, 1:] != document[:, :-1], (1, 0))
            ordered = document.sort(1).values
            distinct = (ordered[:, 1:] != ordered[:, :-1]).sum(1)
            self.one_run_each = (begins.sum(1) == distinct).all()
            self.low = torch.maximum(self.low, torch.where(begins, position, 0).cummax(1).values)

    def any(self, row: Tensor, last_row: Tensor, key: Tensor, last_key: Tensor) -> Tensor:
        """(B or 1, row blocks, key blocks): whether some row of the block sees some key of the block."""
        first, last = self.after[:, row], self.before[:, last_row]
        low = self.low.gather(1, first.clamp(max=self.low.shape[1] - 1))
        begin = torch.maximum(low[:, :, None], key)
        end = torch.maximum(torch.minimum(last[:, :, None], last_key) + 1, begin)
        seen = self._count(end) - self._count(begin)
        return (first <= last_row)[:, :, None] & (seen > 0)

    def all(self, row: Tensor, last_row: Tensor, key: Tensor, last_key: Tensor) -> Tensor:
        """(B or 1, row blocks, key blocks): whether every row of the block sees every key of the block."""
        valid = self.count[:, last_key + 1] - self.count[:, key] == last_key + 1 - key
        causal = last_key <= row[:, None]
        near = self.low[:, last_row][:, :, None] <= key
        return valid[:, None, :] & causal & near

    def _count(self, position: Tensor) -> Tensor:
        """Valid keys before each position, of any shape after the batch."""
        return self.count.gather(1, position.flatten(1)).view_as(position)


@_block_plan_holds.register_fake
def _(counts: Tensor, *_: Any) -> Tensor:
    return counts.new_empty((), dtype=torch.bool)


PLAN_HOLDS = torch.ops.tmx.block_plan_holds.default
"""``(counts, indices, full counts?, full indices?, key mask?, Sq, Skv, position of row 0, rows in a block, keys in a
block, reach?) -> () bool``: whether a block plan agrees with a mask that is causal and-ed with the key mask.

Counts are (B or 1, H or 1, row blocks) and indices (B or 1, H or 1, row blocks, any number) int32, as in ``BlockMask``;
the key mask is the operator's, (B or 1, at most Skv) bool or numbers of documents. Every block with an attended pair of
valid rows must be listed once, a full block must be attended as a whole. Costs O(Skv + row blocks * key blocks).
"""
