"""Eager forward and backward of the operator in plain PyTorch, O(N) in memory.

This is the operator's body wherever no lowering ran: eager mode, Dynamo past its recompile limit, debugging. It walks
blocks of query rows. A block reads one slice of consecutive keys, its *span*, and, where the span does not reach back
to the sinks, the sink keys gathered per sequence. Scores exist for one block at a time, so memory is
O(rows per block x keys per block), whatever N is. Arithmetic is float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry

# Scores held at once: 2**22 float32 values are 16 MiB, which stays near the caches and well under any tensor of a
# long prompt.
SCORE_BUDGET = 1 << 22
_MAX_ROWS = 512


@dataclass(frozen=True)
class Problem:
    """Lengths and per-sequence extents of one call; all positions are absolute key positions."""

    q_len: int
    kv_len: int
    geometry: Geometry  # no sink, no window beyond Skv
    start: Tensor  # (B,) int64, first valid key
    end: Tensor  # (B,) int64, one past the last valid key
    key_mask: Tensor | None  # (B, Skv) bool

    @property
    def offset(self) -> int:
        """Absolute position of query row 0."""
        return self.kv_len - self.q_len

    @property
    def reach(self) -> int:
        """How far behind its own key any row looks: Skv where no row is limited."""
        return self.geometry.reach_within(self.kv_len)


@dataclass(frozen=True)
class Block:
    """Query rows [row, row_end) with the keys they may attend to."""

    row: int
    row_end: int
    key: int
    key_end: int
    sinks: Tensor | None  # (B, s) int64 positions before the span, gathered per sequence
    allowed: Tensor  # (B, rows, s + span) bool


def problem(query: Tensor, key: Tensor, key_mask: Tensor | None, geometry: Geometry) -> Problem:
    """Read lengths and valid ranges; a sequence with no valid key gets the empty range [0, 0)."""
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if key_mask is None:
        start = torch.zeros(batch, dtype=torch.int64, device=query.device)
        end = torch.full_like(start, kv_len)
    else:
        start, end = valid_range(key_mask)
    return Problem(q_len, kv_len, geometry.within_reach().bounded(kv_len), start, end, key_mask)


def valid_range(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """First valid key and one past the last one, per sequence.

    Args:
        key_mask: (B, Skv) bool, True at keys that may be attended.

    Returns:
        start, end: (B,) int64; (0, 0) for a sequence without a valid key.
    """
    kv_len = key_mask.shape[1]
    position = torch.arange(kv_len, device=key_mask.device)
    end = torch.where(key_mask, position + 1, 0).amax(1)
    start = torch.where(key_mask, position, kv_len).amin(1)
    return torch.minimum(start, end), end


def blocks(p: Problem, heads: int, budget: int | None = None) -> Iterator[Block]:
    """The row blocks of a problem, in order; every attended pair is in exactly one of them.

    A block has no more than ``budget`` scores, unless 16 rows have more.
    """
    budget = SCORE_BUDGET if budget is None else budget
    batch = p.start.shape[0]
    if batch == 0 or p.q_len == 0:
        return
    device = p.start.device
    sink, window, last = p.geometry.counts
    # One host read for the whole call; per-block reads would stall an accelerator.
    first_last_row = int(p.end.min()) - last
    row = 0
    while row < p.q_len:
        first = p.offset + row
        # A block with a last row reads all earlier keys, so it gets fewer rows for the same score budget.
        whole = first + _MAX_ROWS > first_last_row
        keys = min(first, p.reach) + _MAX_ROWS if whole else min(first, window) + _MAX_ROWS // 2 + sink
        rows = max(16, min(_MAX_ROWS, max(64, window), budget // max(1, batch * heads * keys)))
        row_end = min(p.q_len, row + rows)
        stop = p.offset + row_end
        begin = max(0, first - (p.reach if stop > first_last_row else window))
        position = torch.arange(first, stop, device=device)[None, :, None]
        span = torch.arange(begin, stop, device=device)[None, None, :]
        allowed = attended(p, position, span)
        if p.key_mask is not None:
            allowed &= p.key_mask[:, None, begin:stop]
        sinks = None
        # Beyond the reach of the block's first row there is no sink to see.
        if begin > 0 and sink > 0 and begin > first - p.reach:
            sinks = p.start[:, None] + torch.arange(sink, device=device)[None, :]
            before = sinks < begin
            sinks = sinks.clamp(max=p.kv_len - 1)
            sink_allowed = attended(p, position, sinks[:, None, :]) & before[:, None, :]
            if p.key_mask is not None:
                sink_allowed &= p.key_mask.gather(1, sinks)[:, None, :]
            allowed = torch.cat([sink_allowed, allowed], 2)
        yield Block(row, row_end, begin, stop, sinks, allowed)
        row = row_end


def attended(p: Problem, row: Tensor, key: Tensor) -> Tensor:
    """The triangle formula for absolute positions that broadcast to (B, rows, keys)."""
    start, end = p.start[:, None, None], p.end[:, None, None]
    allowed: Tensor = formula.attended(row, key, start, end, p.geometry)
    return allowed


def grouped(rows: Tensor, kv_heads: int) -> Tensor:
    """(B, H, r, D) -> (B, Hkv, H/Hkv * r, D): the query heads that share a key head, stacked as rows."""
    b, h, r, d = rows.shape
    return rows.reshape(b, kv_heads, h // kv_heads * r, d)


def _keys(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's sink rows and span of ``x`` (B, Hkv, Skv, D) as (B, Hkv, s + span, D)."""
    span = x[:, :, block.key : block.key_end]
    if block.sinks is not None:
        index = block.sinks[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        span = torch.cat([x.gather(2, index), span], 2)
    return span.to(dtype)


def _scores(query: Tensor, keys: Tensor, block: Block, scale: float, softcap: float | None) -> Tensor:
    """Masked scores of a block: (B, H, rows, s + span)."""
    b, h = query.shape[:2]
    rows = query[:, :, block.row : block.row_end].to(keys.dtype)
    scores = grouped(rows, keys.shape[1]) @ keys.transpose(2, 3)
    scores = capped(scores.view(b, h, block.row_end - block.row, -1), scale, softcap)
    return scores.masked_fill_(~block.allowed[:, None], float("-inf"))


def capped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores from products of queries and keys, in place."""
    return products.mul_(scale) if softcap is None else products.mul_(scale / softcap).tanh_().mul_(softcap)


def slope(scores: Tensor, scale: float, softcap: float | None) -> Tensor | float:
    """The derivative of masked scores by the products that they were made of; 0 where a softcap's are masked."""
    if softcap is None:
        return scale
    return scores.clamp(min=-softcap).div_(softcap).square_().neg_().add_(1.0).mul_(scale)


def log_sum_exp(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Of each row of (B, H, rows, keys) scores and its head's sink logit: (B, H, rows, 1)."""
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return lse if sink_logits is None else torch.logaddexp(lse, sink_logits.to(lse.dtype)[:, None, None])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output (B, H, Sq, Dv) in the inputs' dtype and log-sum-exp (B, H, Sq) in float32."""
    b, h, q_len, _ = query.shape
    dtype = accumulation_dtype(query.dtype)
    # The memory of SDPA's results, (B, Sq, H, Dv): what follows most often views them as rows of all heads.
    out = query.new_zeros(b, q_len, h, value.shape[3]).transpose(1, 2)
    lse = query.new_full((b, h, q_len), float("-inf"), dtype=torch.float32)
    p = problem(query, key, key_mask, geometry)
    for block in blocks(p, h):
        scores = _scores(query, _keys(key, block, dtype), block, scale, softcap)
        block_lse = log_sum_exp(scores, sink_logits)
        # exp(-inf - 0) is 0: a row that attends to nothing gives zeros, not NaN.
        weights = scores.sub_(block_lse.masked_fill(block_lse == float("-inf"), 0.0)).exp_()
        values = _keys(value, block, dtype)
        block_out = grouped(weights, key.shape[1]) @ values
        out[:, :, block.row : block.row_end] = block_out.view(b, h, block.row_end - block.row, -1)
        lse[:, :, block.row : block.row_end] = block_lse[..., 0]
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    out: Tensor,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by recomputing the weights of each block.

    With P the weights and dP = dO V^T: dS = P * (dP - rowsum(dO * O) + dLSE), the usual softmax gradient plus the
    term of the returned log-sum-exp. A softcap's own derivative is 1 - tanh^2.
    """
    b, h, _, _ = query.shape
    kv_heads = key.shape[1]
    dtype = accumulation_dtype(query.dtype)
    grad_query = torch.zeros_like(query)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=key.device)
    p = problem(query, key, key_mask, geometry)
    for block in blocks(p, h):
        rows = slice(block.row, block.row_end)
        keys, values = _keys(key, block, dtype), _keys(value, block, dtype)
        scores = _scores(query, keys, block, scale, softcap)
        steepness = slope(scores, scale, softcap)
        # The weights are normalised again from the scores: the returned lse is float32 and would limit float64.
        block_lse = log_sum_exp(scores, sink_logits)
        weights = scores.sub_(block_lse.masked_fill(block_lse == float("-inf"), 0.0)).exp_()
        d_out = grad_out[:, :, rows].to(dtype)
        delta = (d_out * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[:, :, rows, None].to(dtype)
        d_weights = grouped(d_out, kv_heads) @ values.transpose(2, 3)
        d_scores = weights * (d_weights.view_as(weights) - delta) * steepness
        stacked = grouped(d_scores, kv_heads)
        n_rows = block.row_end - block.row
        grad_query[:, :, rows] = (stacked @ keys).view(b, h, n_rows, -1)
        _accumulate(grad_key, stacked.transpose(2, 3) @ grouped(query[:, :, rows].to(dtype), kv_heads), block)
        _accumulate(grad_value, grouped(weights, kv_heads).transpose(2, 3) @ grouped(d_out, kv_heads), block)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _accumulate(total: Tensor, part: Tensor, block: Block) -> None:
    """Add a block's key gradients (B, Hkv, s + span, D) to where its keys came from."""
    count = 0
    if block.sinks is not None:
        count = block.sinks.shape[1]
        index = block.sinks[:, None, :, None].expand(-1, total.shape[1], -1, total.shape[3])
        total.scatter_add_(2, index, part[:, :, :count])
    total[:, :, block.key : block.key_end] += part[:, :, count:]
