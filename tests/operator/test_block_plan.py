"""The check of a FlexAttention block plan against brute force: honest plans hold, damaged ones do not."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tmx_compile.operator.block_plan import PLAN_HOLDS


class Problem:
    """A random mask, causal with padding, holes, documents or a window, and the plan that torch makes of it."""

    def __init__(self, draw):
        self.batch, kv_len = draw.choice([1, 2, 3]), draw.randint(1, 90)
        q_len = draw.randint(1, kv_len)
        first_row = kv_len - q_len if draw.random() < 0.7 else draw.randint(0, kv_len - q_len)
        self.rows, self.keys = draw.choice([4, 7, 8, 16]), draw.choice([4, 7, 8, 16])
        reach = draw.choice([None, None, 0, 3, 10, 50])
        key_mask = self._key_mask(draw, kv_len)
        rows_too = draw.random() < 0.5
        self.rest = key_mask, q_len, kv_len, first_row, self.rows, self.keys, reach

        def mask_mod(b, h, row, key):
            position = row + first_row
            seen = position >= key
            if reach is not None:
                seen = seen & (position - key <= reach)
            if key_mask is not None:
                seen = seen & (key_mask[b, key] != 0)
                if key_mask.dtype != torch.bool:
                    seen = seen & (self.documents[b, position] == self.documents[b, key])
                if rows_too:
                    seen = seen & (key_mask[b, position] != 0)
            return seen

        separate = draw.random() < 0.7
        block = (self.rows, self.keys)
        mask = create_block_mask(
            mask_mod, self.batch, None, q_len, kv_len, device="cpu", BLOCK_SIZE=block, separate_full_blocks=separate
        )
        self.plan = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
        b, row, key = torch.arange(self.batch)[:, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len)
        self.dense = mask_mod(b, 0, row, key).expand(self.batch, q_len, kv_len)
        # Rows that are padding are never looked at.
        matter = torch.ones(1, kv_len, dtype=torch.bool) if key_mask is None else key_mask != 0
        self.matter = matter.expand(self.batch, kv_len)[:, first_row : first_row + q_len]

    def _key_mask(self, draw, kv_len):
        kind = draw.choice(["none", "padding", "holes", "documents", "padded documents"])
        if kind == "none":
            return None
        if kind == "holes":
            return torch.rand(self.batch, kv_len) < 0.5
        mask = torch.ones(self.batch, kv_len, dtype=torch.bool)
        if "pad" in kind:
            for row in mask:
                start = draw.randint(0, kv_len)
                row[:start] = False
                row[draw.randint(start, kv_len) :] = False
        if "documents" in kind:
            self.documents = (torch.rand(self.batch, kv_len) < 0.1).cumsum(1) + 1
            return self.documents * mask
        return mask

    def holds(self, plan):
        return bool(PLAN_HOLDS(*plan, *self.rest))

    def damaged(self, draw, how):
        """The plan with one listed block dropped, listed twice, or listed as a full one; None where that is right."""
        counts, indices, full_counts, full_indices = (None if x is None else x.clone() for x in self.plan)
        listed = counts[:, 0].nonzero().tolist()
        if not listed:
            return None
        b, i = draw.choice(listed)
        n = int(counts[b, 0, i])
        block = draw.choice(indices[b, 0, i, :n].tolist())
        rows = slice(i * self.rows, (i + 1) * self.rows)
        cells = self.dense[b, rows, block * self.keys : (block + 1) * self.keys][self.matter[b, rows]]
        if how == "twice":
            if n == indices.shape[-1]:
                return None
            indices[b, 0, i, n] = block
            counts[b, 0, i] = n + 1
            return counts, indices, full_counts, full_indices
        kept = [x for x in indices[b, 0, i, :n].tolist() if x != block]
        indices[b, 0, i, : n - 1] = torch.tensor(kept, dtype=torch.int32)
        counts[b, 0, i] = n - 1
        if how == "full" and full_counts is not None and not cells.all():
            full_indices[b, 0, i, int(full_counts[b, 0, i])] = block
            full_counts[b, 0, i] += 1
            return counts, indices, full_counts, full_indices
        return (counts, indices, full_counts, full_indices) if how == "dropped" and cells.any() else None


@pytest.mark.parametrize("how", ["dropped", "full", "twice"])
def test_random_plans(how):
    seed = random.randrange(1 << 30)
    damaged = 0
    for number in range(120):
        draw = random.Random(seed + number)
        torch.manual_seed(seed + number)
        problem = Problem(draw)
        assert problem.holds(problem.plan), f"an honest plan, seed {seed + number}"
        plan = problem.damaged(draw, how)
        if plan is not None:
            damaged += 1
            assert not problem.holds(plan), f"{how}, seed {seed + number}"
    assert damaged > 20


def test_documents_in_two_pieces_are_refused():
    """The keys that a block of rows sees are then no one range: said, not guessed."""
    documents = torch.tensor([[1, 1, 2, 2, 1, 1]])
    plan = torch.tensor([[[1]]], dtype=torch.int32), torch.tensor([[[[0]]]], dtype=torch.int32), None, None
    assert not PLAN_HOLDS(*plan, documents, 6, 6, 0, 8, 8, None)
    assert PLAN_HOLDS(*plan, torch.tensor([[1, 1, 2, 2, 3, 3]]), 6, 6, 0, 8, 8, None)


def test_a_plan_that_cannot_be_read():
    def plan(count, index, width=2):
        indices = torch.zeros(1, 1, 1, width, dtype=torch.int32)
        indices[0, 0, 0, 0] = index
        return torch.tensor([[[count]]], dtype=torch.int32), indices, None, None

    rest = None, 8, 8, 0, 8, 8, None
    assert PLAN_HOLDS(*plan(1, 0), *rest)
    assert not PLAN_HOLDS(*plan(3, 0), *rest)
    assert not PLAN_HOLDS(*plan(1, -1), *rest)
    assert not PLAN_HOLDS(*plan(1, 0), None, 9, 9, 0, 8, 8, None), "a row block is missing"


def test_the_operator():
    torch.library.opcheck(PLAN_HOLDS, (*Problem(random.Random(3)).plan, *Problem(random.Random(3)).rest))
