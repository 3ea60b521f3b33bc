"""Attention under an explicit mask, block by block: blocks that the mask empties are neither gathered nor multiplied.

The (row block, key block) plane of a mask is looked at once. A *task* is one row block with the list of key blocks
where any of its rows attends. Tasks with equally many key blocks are computed together, as many as the memory budget
allows; a long list is walked in parts, whose results are joined by their running maxima and sums. So the work is
exactly the blocks that are left, in few large matrix products, and memory beyond the operands stays within the budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tmx_compile.operator import MASKED
from tmx_compile.operator.kernel import Problem, accumulation_dtype, attended

# Numbers gathered or computed at once: 2**24 float32 values are 64 MiB.
BUDGET = 1 << 24


@dataclass(frozen=True)
class Tasks:
    """Row blocks that attend to equally many key blocks.

    Attributes:
        where: (T, 3) int64: index into the mask's batch, into its heads, row block.
        blocks: (T, K) int64: the key blocks of each, ascending.
    """

    where: Tensor
    blocks: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, block: int, plan: Problem | None = None
) -> Tensor:
    """Softmax attention with added scores, under ``plan`` too where there is one.

    Args:
        query: (B, Sq, H, D).
        key: (B, Skv, Hkv, D).
        value: (B, Skv, Hkv, Dv).
        mask: (1 or B, 1 or H, Sq, Skv): floats added to the scores, where -1e4 and less masks, or bool, True = attend.
        scale: factor on the scores, before the mask is added.
        block: rows and keys of a block.
        plan: a triangle of one sequence, for all: pairs outside of it are masked.

    Returns:
        (B, Sq, H, Dv) in query's dtype, 0 on a row that attends to nothing.
    """
    if query.numel() == 0 or value.numel() == 0:
        return query.new_zeros(*query.shape[:3], value.shape[3])
    problem = _Problem(query, key, value, mask, scale, block, plan)
    # Whole blocks, so that every row of a task has its place.
    batches, batch, q_len, mask_heads, heads, _ = problem.query.shape
    out = query.new_zeros(batches, batch, q_len + -q_len % block, mask_heads, heads, value.shape[3])
    # The caller's autocast would round the float32 products.
    with torch.autocast(query.device.type, enabled=False):
        for tasks in tasks_of(occupied(mask, block, plan)):
            for some in problem.affordable(tasks):
                rows = some.where[:, 0, None], slice(None), problem.rows(some), some.where[:, 1, None]
                out[rows] = problem.solve(some).to(out.dtype)
    return out.flatten(3, 4).flatten(0, 1)[:, :q_len].contiguous()


def occupied(mask: Tensor, block: int, plan: Problem | None = None) -> Tensor:
    """Which blocks have a pair that is attended to: (1 or B, 1 or H, row blocks, key blocks) bool, on mask's device."""
    batch, heads, q_len, kv_len = mask.shape
    keys = torch.arange(kv_len, device=mask.device)
    # As many row blocks at once as the budget allows.
    step = block * max(1, BUDGET // max(1, batch * heads * kv_len * block))
    found = []
    for row in range(0, q_len, step):
        seen = _attended(mask[:, :, row : row + step])
        if plan is not None:
            rows = torch.arange(row, row + seen.shape[2], device=mask.device)
            seen &= attended(plan, rows[:, None] + plan.offset, keys)
        seen = F.pad(seen, (0, -kv_len % block, 0, -seen.shape[2] % block))
        found.append(_split(_split(seen, 3, block), 2, block).any(5).any(3))
    return torch.cat(found, 2)


def _attended(mask: Tensor) -> Tensor:
    return mask.clone() if mask.dtype == torch.bool else mask > MASKED


def tasks_of(blocks: Tensor) -> Iterator[Tasks]:
    """Group the row blocks by how many key blocks they attend to; those without any are left out."""
    # Looked at on the host: how much there is to compute depends on it.
    here = blocks.cpu()
    counts = here.sum(3)
    for count in sorted(set(counts.flatten().tolist())):
        if count:
            where = (counts == count).nonzero()
            chosen = here[tuple(where.unbind(1))].nonzero()[:, 1].view(-1, count)
            yield Tasks(where.to(blocks.device), chosen.to(blocks.device))


def _split(x: Tensor, dim: int, size: int) -> Tensor:
    """Make two of one dimension: as many as needed, and ``size``."""
    return x.view(*x.shape[:dim], -1, size, *x.shape[dim + 1 :])


class _Problem:
    """One call. Heads and batch that share a mask go through a task together."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, block: int, plan: Problem | None
    ) -> None:
        self.mask, self.scale, self.block, self.plan = mask, scale, block, plan
        self.q_len, self.kv_len = query.shape[1], key.shape[1]
        self.dtype = accumulation_dtype(query.dtype)
        self.batches, self.mask_heads = mask.shape[:2]
        self.group = query.shape[2] // key.shape[2]
        # Key heads in the mask's own grouping: with a mask for every head a task has one head and its key head.
        self.key_groups = 1 if self.mask_heads == 1 else key.shape[2]
        self.query, self.key, self.value = self.grouped(query), self._keys(key), self._keys(value)
        inner = self.query.shape[1] * self.query.shape[4]
        per_key = self.key.shape[1] * self.key.shape[4] * (key.shape[3] + value.shape[3])
        # What one block of rows and one block of keys hold: scores and weights, and the gathered keys and values.
        self.cost = block * (3 * inner * block + per_key)

    def grouped(self, x: Tensor) -> Tensor:
        """(B, S, H, D) as (mask's batch, rest of it, S, mask's heads, rest of them, D)."""
        return _split(_split(x, 2, x.shape[2] // self.mask_heads), 0, len(x) // self.batches)

    def _keys(self, x: Tensor) -> Tensor:
        return _split(_split(x, 2, x.shape[2] // self.key_groups), 0, len(x) // self.batches)

    def affordable(self, tasks: Tasks) -> Iterator[Tasks]:
        """The tasks in parts that fit the budget; at least one at a time."""
        size = max(1, BUDGET // (self.cost * tasks.blocks.shape[1]))
        for first in range(0, len(tasks.where), size):
            yield Tasks(tasks.where[first : first + size], tasks.blocks[first : first + size])

    def rows(self, tasks: Tasks) -> Tensor:
        """(T, block) row numbers, those past the end included."""
        return self._numbers(tasks.where[:, 2:])

    def _numbers(self, blocks: Tensor) -> Tensor:
        within = torch.arange(self.block, device=blocks.device)
        return (blocks[:, :, None] * self.block + within).flatten(1)

    def solve(self, tasks: Tasks) -> Tensor:
        """(T, block, rest of the batch, rest of the heads, Dv): the rows of each task."""
        batch, head, _ = tasks.where.unsqueeze(2).unbind(1)
        # Without a mask for every head all heads are one: the first.
        key_head = head // self.group
        rows = self.rows(tasks)
        query = self.query[batch, :, rows.clamp(max=self.q_len - 1), head].to(self.dtype) * self.scale
        # (T, rest of the batch, key heads, group, rows, D), where a product sees group and rows as one.
        query = _split(query, 3, query.shape[3] // self.key.shape[4]).permute(0, 2, 3, 4, 1, 5)
        shape = query.shape[:5]
        query = query.flatten(3, 4)
        top = query.new_full((*shape, 1), float("-inf"))
        total = torch.zeros_like(top)
        acc = query.new_zeros(*shape, self.value.shape[5])
        width = max(1, BUDGET // (self.cost * len(rows)))
        for first in range(0, tasks.blocks.shape[1], width):
            keys = self._numbers(tasks.blocks[:, first : first + width])
            source = (batch, slice(None), keys.clamp(max=self.kv_len - 1), key_head)
            scores = query @ self.key[source].to(self.dtype).permute(0, 2, 3, 4, 1)
            scores = _split(scores, 3, self.block)
            scores = self._masked(scores, batch, head, rows, keys)
            # The result does not depend on what is taken off, so no gradient need go through it.
            peak = torch.maximum(top, scores.detach().amax(5, keepdim=True))
            base = peak.masked_fill(peak == float("-inf"), 0.0)
            weights, decay = torch.exp(scores - base), torch.exp(top - base)
            values = self.value[source].to(self.dtype).permute(0, 2, 3, 1, 4)
            total = total * decay + weights.sum(5, keepdim=True)
            acc = acc * decay + _split(weights.flatten(3, 4) @ values, 3, self.block)
            top = peak
        out = acc / total.masked_fill(total == 0, 1.0)
        return out.permute(0, 4, 1, 2, 3, 5).flatten(3, 4)

    def _masked(self, scores: Tensor, batch: Tensor, head: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        """Add the mask, and -inf where it masks; (T, rest of the batch, key heads, group, rows, keys)."""
        row, column = rows[:, :, None], keys[:, None, :]
        inside = (batch[:, :, None], head[:, :, None], row.clamp(max=self.q_len - 1), column.clamp(max=self.kv_len - 1))
        added = self.mask[inside]
        seen = _attended(added) & (row < self.q_len) & (column < self.kv_len)
        if self.plan is not None:
            seen &= attended(self.plan, row + self.plan.offset, column)
        seen = seen[:, None, None, None]
        if added.dtype != torch.bool:
            scores = scores + added.to(self.dtype)[:, None, None, None]
        return scores.masked_fill(~seen, float("-inf"))
