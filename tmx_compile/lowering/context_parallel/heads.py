"""The whole prompt for a share of the heads: every process computes what one would, of fewer heads.

Queries, keys and values go to the process of their heads in one all-to-all, and results come back in another. Causal
work is then even, and every mask that one process can compute is right: this is for dense layers, and for triangle
layers whose pieces are short. Heads that the processes do not divide are filled up: key heads are repeated among the
query heads that share them, then padded with zeros.

Heads in four groups, one attended to while the next comes in, took longer: on two H100s 480 ms against 468 for 131,072
tokens (benchmarks/results/context_parallel_overlap.json), though hardly any collective ran alone under the profiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile.lowering.base import AttentionCall, Operands, Writer, example, length
from tmx_compile.lowering.context_parallel.ranks import Pending, Ranks, shape_of

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
    kv = [_repeated(x, copies) for x in (operands.key, operands.value)]
    # Of a padded key head, the query heads too.
    padded = [_with_heads(operands.query, more * (heads // (kv_heads * copies))), *(_with_heads(x, more) for x in kv)]
    pending = _to_heads(write, ranks, padded)
    key_mask = None if operands.key_mask is None else whole_mask(write, ranks, operands.key_mask).wait()
    query, key, value = _whole(ranks, padded, pending.wait())
    mask = None if key_mask is None else example(key_mask)
    seen = replace(call, query=example(query), key=example(key), value=example(value), key_mask=mask, layout=_BY_TOKENS)
    out = inner(seen, Operands(query, key, value, key_mask))
    return _own_rows(write, ranks, out, heads)


def share(heads: int, kv_heads: int, size: int) -> tuple[int, int]:
    """How often to repeat each key head, and how many to add behind, so that ``size`` processes divide them.

    Of the possible repetitions, the one with the fewest key heads in the end.
    """
    group = heads // kv_heads
    factors = [n for n in range(1, group + 1) if group % n == 0]
    added = {n: -(kv_heads * n) % size for n in factors}
    best = min(factors, key=lambda n: ((kv_heads * n + added[n]) * (group // n), kv_heads * n + added[n]))
    return best, added[best]


@dataclass(frozen=True)
class WholeMask:
    """A key mask of all pieces, on its way."""

    pending: Pending
    dtype: torch.dtype

    def wait(self) -> Any:
        """(B, N): bool, or numbers of documents."""
        gathered = self.pending.wait().transpose(0, 1)
        return gathered.to(torch.bool) if self.dtype == torch.bool else gathered


def whole_mask(write: Writer, ranks: Ranks, key_mask: Any) -> WholeMask:
    """Start to gather every process's (B, P)."""
    kind = example(key_mask).dtype
    # gloo and NCCL send no bool.
    sent = key_mask.to(torch.uint8) if kind == torch.bool else key_mask
    return WholeMask(ranks.all_gather(write, sent.transpose(0, 1).contiguous()), kind)


def _repeated(x: Any, copies: int) -> Any:
    return x if copies == 1 else x.repeat_interleave(copies, 1)


def _with_heads(x: Any, more: int) -> Any:
    return x if more == 0 else F.pad(x, (0, 0, 0, 0, 0, more))


def _to_heads(write: Writer, ranks: Ranks, parts: list[Any]) -> Pending:
    """Start to send the heads of every part (B, h, P, d) to their processes: (size, B, P, all of a token's numbers)."""
    sent = []
    for x in parts:
        batch, heads, tokens, dim = shape_of(x)
        own = heads // ranks.size
        by_owner = x.transpose(1, 2).reshape(batch, tokens, ranks.size, own * dim)
        sent.append(by_owner.permute(2, 0, 1, 3))
    return ranks.all_to_all(write, torch.cat(sent, 3).contiguous(), [1] * ranks.size, [1] * ranks.size)


def _whole(ranks: Ranks, parts: list[Any], got: Any) -> list[Any]:
    """(B, h / size, N, d) of every part: tokens outside heads in memory, as attention wants it."""
    batch, tokens = length(got, 1), ranks.size * length(got, 2)
    rows, at, found = got.transpose(0, 1).reshape(batch, tokens, length(got, 3)), 0, []
    for x in parts:
        own, dim = length(x, 1) // ranks.size, length(x, 3)
        found.append(rows[:, :, at : at + own * dim].view(batch, tokens, own, dim).transpose(1, 2))
        at = at + own * dim
    return found


def _own_rows(write: Writer, ranks: Ranks, out: Any, heads: int) -> Any:
    """(B, h, N, Dv) of every process's heads to (B, H, P, Dv): the way back."""
    batch, own, tokens, dim = shape_of(out)
    piece = tokens // ranks.size
    parts = out.transpose(1, 2).reshape(batch, ranks.size, piece, own, dim).transpose(0, 1).contiguous()
    got = ranks.all_to_all(write, parts, [1] * ranks.size, [1] * ranks.size).wait()
    rows = got.permute(1, 2, 0, 3, 4).reshape(batch, piece, ranks.size * own, dim)
    return rows[:, :, :heads].transpose(1, 2)
