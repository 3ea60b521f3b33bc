"""The whole prompt for a share of the heads: every process computes what one would, of fewer heads.

Queries, keys and values go to the process of their heads, and results come back. Causal work is then even, and every
mask that one process can compute is right: this is for dense layers, and for triangle layers whose pieces are short.
Heads that the processes do not divide are filled up: key heads are repeated among the query heads that share them,
then padded with zeros.

A process's heads travel in groups, an all-to-all each: all start at once, and while the first one's attention runs the
others come in, and the results of those before go back. What nothing hides is the way of the first group, and that
of the last one's results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile.lowering.base import AttentionCall, Operands, Writer, example, length
from tmx_compile.lowering.context_parallel.ranks import Pending, Ranks

MOST_GROUPS = 4
"""More would hide little more, and each is two messages and an attention of its own."""

_BY_TOKENS = (0, 2, 1, 3)


def attend(
    write: Writer,
    ranks: Ranks,
    call: AttentionCall,
    operands: Operands,
    inner: Callable[[AttentionCall, Operands], Any],
) -> Any:
    """Attention (B, H, P, Dv) of this process's rows, (B, H, P, D), by ``inner`` over all rows of some heads."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    copies, more = share(heads, kv_heads, ranks.size)
    per_key = heads // (kv_heads * copies)
    key, value = (_with_heads(_repeated(x, copies), more) for x in (operands.key, operands.value))
    # Of a padded key head, the query heads too.
    query = _with_heads(operands.query, more * per_key)
    own = (kv_heads * copies + more) // ranks.size
    count = groups(own, per_key)
    masks = None if operands.key_mask is None else whole_mask(write, ranks, operands.key_mask)
    coming = []
    for number in range(count):
        taken = [_Share(query, own * per_key // count, number * own * per_key // count)]
        # Where a key head's queries go in several groups, it goes with their first.
        if number * own % count == 0:
            taken += [_Share(x, max(1, own // count), number * own // count) for x in (key, value)]
        coming.append((taken, _to_heads(write, ranks, taken)))
    key_mask = None if masks is None else masks()
    mask = None if key_mask is None else example(key_mask)
    going: list[Pending] = []
    kv: list[Any] = []
    for taken, pending in coming:
        found = _whole(ranks, taken, pending.wait())
        kv = found[1:] or kv
        whole = Operands(found[0], kv[0], kv[1], key_mask)
        seen = replace(
            call,
            query=example(whole.query),
            key=example(whole.key),
            value=example(whole.value),
            key_mask=mask,
            layout=_BY_TOKENS,
        )
        out = inner(seen, whole)
        going.append(_to_rows(write, ranks, out))
    return _own_rows([each.wait() for each in going], heads)


def groups(kv_heads: int, per_key: int) -> int:
    """In how many groups a process's ``kv_heads`` key heads travel, of ``per_key`` query heads each: at most four.

    A group is some key heads and all of their query heads, or a part of one key head's query heads.
    """
    divides = [n for n in range(1, MOST_GROUPS + 1) if kv_heads % n == 0 or (kv_heads == 1 and per_key % n == 0)]
    return max(divides)


def share(heads: int, kv_heads: int, size: int) -> tuple[int, int]:
    """How often to repeat each key head, and how many to add behind, so that ``size`` processes divide them.

    Of the possible repetitions, the one with the fewest key heads in the end.
    """
    group = heads // kv_heads
    factors = [n for n in range(1, group + 1) if group % n == 0]
    added = {n: -(kv_heads * n) % size for n in factors}
    best = min(factors, key=lambda n: ((kv_heads * n + added[n]) * (group // n), kv_heads * n + added[n]))
    return best, added[best]


def whole_mask(write: Writer, ranks: Ranks, key_mask: Any) -> Callable[[], Any]:
    """Start to gather every process's (B, P), bool or numbers of documents; the result waits for (B, N)."""
    kind = example(key_mask).dtype
    # gloo and NCCL send no bool.
    sent = key_mask.to(torch.uint8) if kind == torch.bool else key_mask
    pending = ranks.all_gather(write, sent.transpose(0, 1).contiguous())

    def wait() -> Any:
        gathered = pending.wait().transpose(0, 1)
        return gathered.to(torch.bool) if kind == torch.bool else gathered

    return wait


def _repeated(x: Any, copies: int) -> Any:
    return x if copies == 1 else x.repeat_interleave(copies, 1)


def _with_heads(x: Any, more: int) -> Any:
    return x if more == 0 else F.pad(x, (0, 0, 0, 0, 0, more))


@dataclass(frozen=True)
class _Share:
    """``heads`` of every process's heads of ``x`` (B, H, P, D), the process's ``first`` one on."""

    x: Any
    heads: int
    first: int

    @property
    def width(self) -> int:
        """Numbers of a token."""
        dim: int = example(self.x).shape[3]
        return self.heads * dim


def _to_heads(write: Writer, ranks: Ranks, taken: list[_Share]) -> Pending:
    """Start to send, in one message to each process, its heads of all that is taken: (size, B, P, all widths)."""
    parts = []
    for each in taken:
        batch, heads, tokens, dim = (length(each.x, d) for d in range(4))
        by_owner = each.x.transpose(1, 2).reshape(batch, tokens, ranks.size, heads // ranks.size, dim)
        chosen = by_owner[:, :, :, each.first : each.first + each.heads]
        parts.append(chosen.permute(2, 0, 1, 3, 4).reshape(ranks.size, batch, tokens, each.width))
    message = torch.cat(parts, 3) if len(parts) > 1 else parts[0].contiguous()
    return ranks.all_to_all(write, message, [1] * ranks.size, [1] * ranks.size)


def _whole(ranks: Ranks, taken: list[_Share], got: Any) -> list[Any]:
    """(B, h, N, D) of each that was taken, h its ``heads``: tokens outside heads in memory, as attention wants it."""
    batch, tokens = length(got, 1), ranks.size * length(got, 2)
    rows, at, found = got.transpose(0, 1).reshape(batch, tokens, length(got, 3)), 0, []
    for each in taken:
        part = rows[:, :, at : at + each.width].view(batch, tokens, each.heads, length(each.x, 3))
        found.append(part.transpose(1, 2))
        at += each.width
    return found


def _to_rows(write: Writer, ranks: Ranks, out: Any) -> Pending:
    """Start to send (B, h, N, Dv) back, to the processes of its rows."""
    batch, heads, tokens, dim = (length(out, d) for d in range(4))
    parts = out.transpose(1, 2).reshape(batch, ranks.size, tokens // ranks.size, heads, dim).transpose(0, 1)
    return ranks.all_to_all(write, parts.contiguous(), [1] * ranks.size, [1] * ranks.size)


def _own_rows(groups: list[Any], heads: int) -> Any:
    """(B, H, P, Dv) of this process's rows from (size, B, P, h, Dv) of each group."""
    rows = torch.stack([x.permute(1, 2, 0, 3, 4) for x in groups], 3)
    batch, tokens, size, count, own, dim = (length(rows, d) for d in range(6))
    return rows.reshape(batch, tokens, size * count * own, dim)[:, :, :heads].transpose(1, 2)
