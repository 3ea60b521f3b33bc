"""The whole prompt for a share of the heads: every process computes what one would, of fewer heads.

Queries, keys and values go to the process of their heads, and results come back: an all-to-all each. Causal work is
then even, and every mask that one process can compute is right: this is for dense layers, and for triangle layers
whose pieces are short. Heads that the processes do not divide are filled up: key heads are repeated among the query
heads that share them, then padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from tmx_compile.lowering.base import AttentionCall, Operands, Writer, example, length
from tmx_compile.lowering.context_parallel.ranks import Ranks


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
    query, key, value = (_whole(write, ranks, x) for x in padded)
    key_mask = None if operands.key_mask is None else whole_mask(write, ranks, operands.key_mask)
    whole = Operands(query, key, value, key_mask)
    mask = None if key_mask is None else example(key_mask)
    seen = replace(call, query=example(query), key=example(key), value=example(value), key_mask=mask, layout=None)
    out = inner(seen, whole)
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


def whole_mask(write: Writer, ranks: Ranks, key_mask: Any) -> Any:
    """(B, N) of every process's (B, P): bool, or numbers of documents."""
    kind = example(key_mask).dtype
    # gloo and NCCL send no bool.
    sent = key_mask.to(torch.uint8) if kind == torch.bool else key_mask
    gathered = ranks.all_gather(write, sent.transpose(0, 1).contiguous()).transpose(0, 1)
    return gathered.to(torch.bool) if kind == torch.bool else gathered


def _repeated(x: Any, copies: int) -> Any:
    return x if copies == 1 else x.repeat_interleave(copies, 1)


def _with_heads(x: Any, more: int) -> Any:
    return x if more == 0 else F.pad(x, (0, 0, 0, 0, 0, more))


def _whole(write: Writer, ranks: Ranks, x: Any) -> Any:
    """(B, h, P, D) of every process to (B, h / size, N, D): tokens outside heads in memory, as attention wants it."""
    batch, heads, tokens, dim = (length(x, d) for d in range(4))
    own = heads // ranks.size
    parts = x.transpose(1, 2).reshape(batch, tokens, ranks.size, own, dim).permute(2, 0, 1, 3, 4).contiguous()
    got = ranks.all_to_all(write, parts, [1] * ranks.size, [1] * ranks.size)
    return got.transpose(0, 1).reshape(batch, ranks.size * tokens, own, dim).transpose(1, 2)


def _own_rows(write: Writer, ranks: Ranks, out: Any, heads: int) -> Any:
    """(B, h, N, Dv) of every process's heads to (B, H, P, Dv): the way back."""
    batch, own, tokens, dim = (length(out, d) for d in range(4))
    piece = tokens // ranks.size
    parts = out.transpose(1, 2).reshape(batch, ranks.size, piece, own, dim).transpose(0, 1).contiguous()
    got = ranks.all_to_all(write, parts, [1] * ranks.size, [1] * ranks.size)
    rows = got.permute(1, 2, 0, 3, 4).reshape(batch, piece, ranks.size * own, dim)
    return rows[:, :, :heads].transpose(1, 2)
