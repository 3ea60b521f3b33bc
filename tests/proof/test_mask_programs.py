"""Random mask programs against brute force: a proof is never wrong, and well-written masks are rarely unknown.

A program is a conjunction of facts (causal, window, padding, documents, lengths), each written in a random way: other
sides, shifted and scaled comparisons, negations, other shapes, tril and triu, where, masked_fill, sums of additive
masks. Planted errors change the meaning by little: an off-by-one, rows for keys, ``or`` for ``and``.
"""

import random

import pytest
import torch
import torch.nn.functional as F

from tests.support.reading import Record, proven_mask
from tmx_compile.find import find_attention
from tmx_compile.graph.storages import Storages
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.prove import Prover
from tmx_compile.report import Rejected
from tmx_compile.testing import captured_graphs

B, H, D = 2, 2, 8
PROGRAMS = 80
INF = float("-inf")


class Program:
    """Writes one mask. ``errors`` is how many mistakes to plant."""

    def __init__(self, seed, errors):
        rng = random.Random(seed)
        self.q_len = rng.randint(5, 12)
        self.kv_len = self.q_len + rng.choice([0, 0, 0, 4])
        self.shift = self.kv_len - self.q_len
        self.errors = errors
        self.planted = 0
        self.facts = ["causal", *(x for x in ("window", "padding", "documents", "length") if rng.random() < 0.4)]
        rng.shuffle(self.facts)
        # Drawn beforehand: Dynamo traces the program, and no random generator.
        self.draws = [rng.randrange(1 << 20) for _ in range(1000)]
        self.at = 0

    def draw(self, count):
        """A number below ``count``."""
        self.at += 1
        return self.draws[self.at] % count

    def slip(self):
        """Whether to plant a mistake here."""
        if self.errors > self.planted and self.draw(20) < 7:
            self.planted += 1
            return True
        return False

    def pick(self, *choices):
        return choices[self.draw(len(choices))]

    # Positions: (rows, 1) and (1, keys), in some dtype, shape and spelling.

    def positions(self):
        dtype = self.pick(torch.int64, torch.int64, torch.int32, torch.float32)
        start = self.pick(0, 0, 3)
        row = torch.arange(start + self.shift, start + self.shift + self.q_len, dtype=dtype)
        if self.shift and self.slip():
            row = torch.arange(start, start + self.q_len, dtype=dtype)
        key = torch.arange(start, start + self.kv_len, dtype=dtype)
        match self.draw(6):
            case 0:
                return row[:, None], key[None, :]
            case 3:
                return torch.meshgrid(row, key, indexing="ij")
            case 4:
                key, row = torch.meshgrid(key, row, indexing="xy")
                return row, key
            case 5:
                return torch.unsqueeze(input=row, dim=-1), torch.reshape(input=key, shape=(1, -1))
            case 1:
                return row.view(-1, 1), key
            case 2:
                return row.unsqueeze(-1).expand(self.q_len, self.kv_len), key.reshape(1, 1, 1, -1)
            case _:
                return row[None, None, :, None], key[None, None, None]

    def at_least(self, a, b, slack=0):
        """``a >= b - slack`` in one of many spellings."""
        by = self.pick(1, 1, 2, 3)
        move = self.draw(5) - 2
        a, b = a * by + move, b * by + move - slack * by
        if self.slip():
            b = b + self.pick(by, -by)
        match self.draw(10):
            case 0:
                return a >= b
            case 7:
                return torch.ge(input=torch.sub(other=b, input=a, alpha=1), other=0)
            case 8:
                return torch.less_equal(b, other=a)
            case 1:
                return b <= a
            case 2:
                return ~(a < b)
            case 3:
                return torch.logical_not(b > a)
            case 4:
                return a - b > -1
            case 5:
                return (b - a).le(0)
            case 6:
                return torch.ge(a - b, 0)
            case _:
                return -(a - b) < 1

    def causal(self, _):
        row, key = self.positions()
        match self.draw(7):
            case 3:
                square = torch.ones(size=(self.kv_len, self.kv_len), dtype=torch.bool)
                return torch.tril(input=square, diagonal=1 if self.slip() else 0)[-self.q_len :]
            case 4:
                tall = torch.ones(self.kv_len, self.q_len)
                return tall.triu(diagonal=-self.shift - (1 if self.slip() else 0)).T.bool()
            case 0:
                square = torch.ones(self.q_len, self.kv_len, dtype=torch.bool)
                return square.tril(self.shift + (1 if self.slip() else 0))
            case 1:
                return ~torch.ones(self.q_len, self.kv_len).triu(self.shift + 1).bool()
            case 2 if self.slip():
                return self.at_least(key, row)
            case _:
                return self.at_least(row, key)

    def window(self, _):
        size = 1 + self.draw(8)
        row, key = self.positions()
        if self.draw(10) < 3:
            return torch.ones(self.q_len, self.kv_len, dtype=torch.bool).triu(self.shift - size)
        return self.at_least(key, row, size)

    def padding(self, m):
        valid = self.pick(lambda: m.bool(), lambda: m != 0, lambda: m.to(torch.bool), lambda: ~(m == 0))()
        if self.slip():
            valid = valid.flip(-1) if self.draw(2) == 0 else ~valid
        if self.draw(10) < 3:
            sequence = torch.arange(B)[:, None, None, None]
            return valid[sequence, torch.arange(self.kv_len)[None, None, None, :]]
        return self.pick(lambda: valid[:, None, None, :], lambda: valid.view(B, 1, 1, self.kv_len))()

    def documents(self, m):
        number = self.number
        rows = number[:, self.shift :]
        if self.slip():
            rows = rows + 1
        row, key = rows[:, None, :, None], number[:, None, None, :]
        return self.pick(lambda: row == key, lambda: key.eq(row), lambda: ~(row != key), lambda: (row - key) == 0)()

    def length(self, _):
        key = torch.arange(self.kv_len)
        size = self.size[:, None, None, None]
        return self.pick(lambda: key < size, lambda: size > key, lambda: ~(key >= size), lambda: key - size <= -1)()

    def disguise(self, mask):
        """The same truth in other words."""
        match self.draw(11):
            case 7:
                return torch.clone(input=mask).type(torch.bool)
            case 8:
                return mask.where(condition=mask, other=torch.zeros_like(input=mask))
            case 0:
                return mask & (torch.arange(self.kv_len) >= 0)
            case 1:
                return mask | (torch.arange(self.kv_len) < 0)
            case 2:
                return mask.clone().contiguous()
            case 3:
                return torch.where(mask, 0.0, -1e9) == 0
            case 4:
                return mask.to(torch.float32).bool()
            case 5:
                return mask.to(torch.int64) != 0
            case 6:
                return torch.logical_xor(mask, torch.zeros((), dtype=torch.bool))
            case _:
                return mask

    def both(self, a, b):
        if self.slip():
            return a | b
        match self.draw(5):
            case 0:
                return a & b
            case 1:
                return torch.logical_and(b, a)
            case 2:
                return ~(~a | ~b)
            case 3:
                return torch.where(a, b, torch.zeros_like(b))
            case _:
                return a.logical_and(b)

    def __call__(self, m, number, size):
        self.number, self.size = number, size
        made = [self.disguise(getattr(self, fact)(m)) for fact in self.facts]
        low = self.pick(INF, -1e9, -1e4, torch.finfo(torch.float32).min)
        form = self.draw(5)
        if form == 0:
            total = 0.0
            for mask in made:
                total = total + torch.where(mask, 0.0, self.pick(-1e9, -1e4, low))
            return total
        if form == 1:
            total = torch.zeros(B, 1, self.q_len, self.kv_len)
            for mask in made:
                total = total.masked_fill(~mask, low)
            return total
        mask = made[0]
        for other in made[1:]:
            mask = self.both(mask, other)
        if form == 2:
            return torch.where(mask, 0.0, low)
        if form == 3 and low != INF:
            return (1.0 - mask.to(torch.float32)) * low
        return mask.expand(B, 1, self.q_len, self.kv_len) if self.draw(2) == 0 else mask


def inputs(program):
    m = (torch.rand(B, program.kv_len) < 0.8).long()
    number = torch.randint(0, 2, (B, program.kv_len)).cumsum(1)
    return m, number, torch.randint(3, program.kv_len + 1, (B,))


def judged(seed, errors):
    """A program's proof or refusal; a proof is compared with what the program computes on fresh inputs."""
    torch._dynamo.reset()
    program = Program(seed, errors)

    def call(q, k, m, number, size):
        program.at = program.planted = 0
        mask = program(m, number, size)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask), mask

    arguments = (torch.randn(B, H, program.q_len, D), torch.randn(B, H, program.kv_len, D), *inputs(program))
    (gm,) = captured_graphs(call, *arguments)
    (site,) = find_attention(gm)
    if isinstance(site, Rejected):
        return program, site
    proof = Prover.of(site.fake("query"), Storages(gm.graph)).prove(site)
    if isinstance(proof, Proof):
        recorded = Record(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        values = dict(zip(("l_q_", "l_k_", "l_m_", "l_number_", "l_size_"), arguments, strict=True))
        _, mask = recorded.run(*(values[node.name] for node in placeholders))
        seen = mask if mask.dtype == torch.bool else mask > -9000
        seen = seen.expand(B, 1, program.q_len, program.kv_len)
        proven = proven_mask(proof, B, program.q_len, program.kv_len, recorded.seen)
        assert torch.equal(proven, seen), f"seed {seed}, {errors} errors: {proof}"
    return program, proof


def test_well_written_masks_are_rarely_unknown(record_property):
    seeds = [random.randrange(1 << 30) for _ in range(PROGRAMS)]
    refused = []
    for seed in seeds:
        program, answer = judged(seed, 0)
        if isinstance(answer, Rejected):
            refused.append(f"seed {seed} {'+'.join(program.facts)}: {answer}")
    record_property("well-written mask programs", f"{len(refused)} of {PROGRAMS} unknown")
    assert len(refused) <= PROGRAMS * 0.05, "\n".join(refused)


def test_a_planted_error_is_never_proven_to_be_something_else(record_property):
    """An error may still give a mask of the family (a window one longer): then the proof has to say that mask."""
    seeds = [random.randrange(1 << 30) for _ in range(PROGRAMS)]
    planted, proven = 0, 0
    for seed in seeds:
        program, answer = judged(seed, 2)
        planted += program.planted > 0
        proven += program.planted > 0 and isinstance(answer, Proof)
    record_property("mask programs with planted errors", f"{proven} of {planted} proven, as what they are")
    assert planted > PROGRAMS / 3


@pytest.mark.parametrize("wrong", [lambda p: p.reach is not None, lambda p: bool(p.valid)], ids=["window", "padding"])
def test_the_comparison_would_see_a_wrong_proof(wrong, monkeypatch):
    """The brute force is no mirror of the prover: a proof with a fact dropped is caught."""
    from dataclasses import replace

    honest = Prover.prove

    def careless(self, site, **kwargs):
        proof = honest(self, site, **kwargs)
        return replace(proof, reach=None, valid=()) if isinstance(proof, Proof) and wrong(proof) else proof

    monkeypatch.setattr(Prover, "prove", careless)
    with pytest.raises(AssertionError, match="seed"):
        judge_all(range(200))


def judge_all(seeds):
    for seed in seeds:
        judged(seed, 0)
