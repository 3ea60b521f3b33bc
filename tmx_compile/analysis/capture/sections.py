"""What the Middle section of one attention call contributes to a number that the model computes.

Let P be the probabilities of dense causal attention, L the number (a logit), and multiply every P[i, j] by a variable
that is 1. The method's authors (TriangleMix, arXiv 2507.21526v1) choose layers by the derivative of L with respect to
these multipliers, averaged over the Middle section. The multipliers stand behind the softmax: nothing is normalised
again. By the chain rule the derivative at (i, j) is ``P[i, j] * dP[i, j]`` with ``dP = dO V^T``.

Sparse attention does normalise again: a row without its Middle section puts that weight on the other keys. With the
multiplier in front of the normalisation the derivative is ``P[i, j] * (dP[i, j] - sum_k P[i, k] dP[i, k])``, which is
the gradient of the score. Both are here, each as a signed sum (the derivative with respect to one gate on the whole
section) and as a sum of absolute values (which nothing can cancel).

Everything is computed while the gradient passes the attention anyway, one block of rows at a time, so memory is O(N).
The signed sums also follow from two results and their log-sum-exps (:func:`middle_output`), for a forward pass alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.block_sparse import BlockSparse, BlockSparseTriton
from tmx_compile.lowering.triton.lowering import attend as triton_attention
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.operator import documents, kernel, triangle_attention
from tmx_compile.report import Rejected

Piece = tuple[int, Geometry]
"""Rows up to an end, and the geometry of the prompt that ends there."""

MEASURES = ("signed", "absolute", "renormalized", "renormalized_absolute")
"""The sums over the Middle section, in the order of :attr:`SectionSums.sums`."""

# Scores of a block: half of what the operator's own passes take, for there are more tensors of that size here.
SCORE_BUDGET = 1 << 21


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call: what :func:`tmx_compile.operator.triangle_attention` takes, without the geometry.

    query (B, H, Sq, D), key (B, Hkv, Skv, D), value (B, Hkv, Skv, Dv), key_mask (B, Skv) or None, sink_logits (H,) or
    None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    key_mask: Tensor | None
    scale: float
    reach: int | None
    sink_logits: Tensor | None = None
    softcap: float | None = None

    def dense(self) -> Tensor:
        """Causal attention with padding, no section left out: (B, H, Sq, Dv)."""
        plain = self.key_mask is None and self.reach is None and self.sink_logits is None and self.softcap is None
        if plain and self.query.shape[2] == self.key.shape[2]:
            return F.scaled_dot_product_attention(
                self.query, self.key, self.value, is_causal=True, scale=self.scale, enable_gqa=True
            )
        return self.triangle(Geometry(0, 0, ALL_ROWS))[0]

    def triangle(self, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """Triangle attention, and its log-sum-exp (B, H, Sq)."""
        sink, window, last = geometry.counts
        return triangle_attention(
            self.query,
            self.key,
            self.value,
            self.key_mask,
            sink=sink,
            window=window,
            last=last,
            scale=self.scale,
            reach=self.reach,
            sink_logits=self.sink_logits,
            softcap=self.softcap,
        )

    def sparse(self, geometry: Geometry) -> Tensor:
        """Triangle attention alone, (B, H, Sq, Dv), by the purpose-built kernel where there is a GPU for it."""
        if self.query.is_cuda:
            operands = (self.query, self.key, self.value, self.key_mask)
            call = AttentionCall(*operands, replace(geometry, reach=self.reach), self.scale, False)
            out = triton_attention(replace(call, sink_logits=self.sink_logits, softcap=self.softcap))
            if isinstance(out, Tensor):
                return out
        return self.triangle(geometry)[0]

    @property
    def against_dynamic(self) -> str:
        """Why blocks cannot be chosen here, or nothing."""
        if self.reach is not None:
            return "a sliding window of its own"
        return "sinks or a soft cap" if self.sink_logits is not None or self.softcap is not None else ""

    def chosen(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Attention over blocks that are chosen here, (B, H, Sq, Dv), and (2,) the blocks visited and all of them."""
        lowering = BlockSparseTriton(selection) if self.query.is_cuda else BlockSparse(selection)
        dense = Geometry(0, 0, ALL_ROWS)
        call = AttentionCall(self.query, self.key, self.value, self.key_mask, dense, self.scale, False)
        if isinstance(lowering.supports(call), Rejected):
            lowering = BlockSparse(selection)
        return lowering.attend(call)

    def in_pieces(self, pieces: Sequence[Piece]) -> Tensor:
        """Triangle attention, piece by piece: (B, H, Sq, Dv). Every row is a key of its own call (Sq = Skv).

        The rows up to a piece's end are the queries of a prompt that ends there, over all keys before it: a turn of a
        conversation, or decode steps.

        Raises:
            ValueError: ends that do not rise to the number of rows.
        """
        ends = [end for end, _ in pieces]
        if ends != sorted({*ends}) or ends[0] < 1 or ends[-1] != self.query.shape[2]:
            raise ValueError(f"pieces must end at rising rows up to {self.query.shape[2]}, got ends {ends}")
        outs, begin = [], 0
        for end, geometry in pieces:
            part = replace(
                self,
                query=self.query[:, :, begin:end],
                key=self.key[:, :, :end],
                value=self.value[:, :, :end],
                key_mask=None if self.key_mask is None else self.key_mask[:, :end],
            )
            outs.append(part.sparse(geometry))
            begin = end
        return torch.cat(outs, 2)


@dataclass(frozen=True)
class SectionSums:
    """Sums over the Middle section of one call.

    Attributes:
        sums: (4, B, H) float64, one plane for each of :data:`MEASURES`.
        cells: (B,) int64, how many (row, key) pairs the section has in each sequence.
    """

    sums: Tensor
    cells: Tensor


def middle_output(inputs: AttentionInputs, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """What the Middle section adds to the attention output, from two log-sum-exps.

    Dense attention is ``exp(lse_t - lse) * triangle + middle``, so the difference is the Middle section's part. The
    derivative of a number with respect to a gate on the section is the product of its gradient ``dO`` with this,
    summed; with normalisation the product with ``middle - share * dense``.

    Returns:
        middle: (B, H, Sq, Dv), the sum of P[i, j] v[j] over the section, in the inputs' dtype.
        share: (B, H, Sq) float32, the sum of P[i, j] over the section.
    """
    dense, lse = inputs.triangle(Geometry(0, 0, ALL_ROWS))
    triangle, triangle_lse = inputs.triangle(geometry)
    # A row that attends to nothing has -inf on both sides.
    kept = torch.where(lse == float("-inf"), 1.0, (triangle_lse - lse).exp())
    middle, share = dense - kept[..., None].to(dense.dtype) * triangle, 1 - kept
    if inputs.key_mask is None or inputs.key_mask.dtype != torch.bool:
        return middle, share
    # Rows behind the last valid key are padding, and no part of a prompt.
    problem = kernel.problem(inputs.query, inputs.key, inputs.key_mask, replace(geometry, reach=inputs.reach))
    position = torch.arange(dense.shape[2], device=dense.device) + problem.offset
    inside = (position < problem.end[:, None])[:, None]
    return middle * inside[..., None], share * inside


class RecordMiddle(torch.autograd.Function):
    """Dense attention whose backward also sums what the Middle section contributes, and hands that to ``record``."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        geometry: Geometry,
        scale: float,
        reach: int | None,
        sink_logits: Tensor | None,
        softcap: float | None,
        record: Callable[[SectionSums], None],
    ) -> Tensor:
        """``gate``: any tensor that requires a gradient, so that backward comes here in the first layer too."""
        out = AttentionInputs(query, key, value, key_mask, scale, reach, sink_logits, softcap).dense()
        ctx.save_for_backward(query, key, value, key_mask, out, sink_logits)
        ctx.geometry, ctx.rest, ctx.record = geometry, (scale, reach, softcap), record
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value (nobody asks for the sinks'); the sums go to ``record``."""
        query, key, value, key_mask, out, sink_logits = ctx.saved_tensors
        scale, reach, softcap = ctx.rest
        inputs = AttentionInputs(query, key, value, key_mask, scale, reach, sink_logits, softcap)
        wanted = any(ctx.needs_input_grad[1:4])
        sums, passed = middle_sums(inputs, ctx.geometry, out, grads[0], gradients=wanted)
        ctx.record(sums)
        gate = torch.zeros((), device=query.device) if ctx.needs_input_grad[0] else None
        return (gate, *passed, None, None, None, None, None, None, None)


def middle_sums(
    inputs: AttentionInputs, geometry: Geometry, out: Tensor, grad_out: Tensor, *, gradients: bool = True
) -> tuple[SectionSums, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Sums over the Middle section, and what dense attention passes back.

    Args:
        inputs: the call.
        geometry: it says where the section is.
        out: (B, H, Sq, Dv), the result of dense attention.
        grad_out: the gradient of a number with respect to ``out``.
        gradients: whether to compute the second result; (None, None, None) otherwise.

    Returns:
        The sums, and the gradients of query, key and value in their shapes and dtypes.
    """
    q, k, v = inputs.query, inputs.key, inputs.value
    batch, heads = q.shape[:2]
    dtype = kernel.accumulation_dtype(q.dtype)
    sums = torch.zeros(len(MEASURES), batch, heads, dtype=torch.float64, device=q.device)
    cells = torch.zeros(batch, dtype=torch.int64, device=q.device)
    total = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v)] if gradients else None
    # The caller's autocast would round the float32 products.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        # Converted once, not once per block.
        converted = [x.to(dtype) for x in (q, k, v, grad_out)]
        delta = (converted[3] * out.to(dtype)).sum(-1, keepdim=True)
        tensors = _Tensors(converted[0], converted[1], converted[2], converted[3], delta)
        for part in _parts(inputs, geometry):
            _accumulate(tensors, inputs, part, sums, cells, total)
    found = SectionSums(sums, cells)
    if total is None:
        return found, (None, None, None)
    return found, (total[0].to(q.dtype), total[1].to(k.dtype), total[2].to(v.dtype))


@dataclass(frozen=True)
class _Part:
    """Rows of some sequences with the keys that they may attend: the unit that is computed at once.

    ``allowed`` and ``middle`` are (B', rows, keys) bool, the cells of dense attention and of its Middle section.
    """

    sequences: slice
    rows: slice
    keys: slice
    allowed: Tensor
    middle: Tensor


def _parts(inputs: AttentionInputs, geometry: Geometry) -> Iterator[_Part]:
    """All rows in blocks; packed documents are problems of their own."""
    everything = slice(None)
    if inputs.key_mask is None or inputs.key_mask.dtype == torch.bool:
        yield from _blocks(inputs, inputs.query, inputs.key, inputs.key_mask, geometry, (everything, 0, 0, None))
        return
    for document in documents.split(inputs.key_mask, inputs.query.shape[2]):
        s, rows, keys = document.sequence, document.rows, document.keys
        where = (s, rows.start, keys.start, document.own)
        yield from _blocks(inputs, inputs.query[s, :, rows], inputs.key[s, :, keys], document.valid, geometry, where)


def _blocks(
    inputs: AttentionInputs,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    geometry: Geometry,
    where: tuple[slice, int, int, Tensor | None],
) -> Iterator[_Part]:
    """Blocks of rows of one problem that begins at a row and a key of the call; ``own`` are the rows that belong."""
    sequences, first_row, first_key, own = where
    # Dense by its window too, because blocks of last rows alone are short.
    dense = kernel.problem(query, key, key_mask, Geometry(0, key.shape[2], ALL_ROWS, inputs.reach))
    triangle = kernel.problem(query, key, key_mask, replace(geometry, reach=inputs.reach))
    for block in kernel.blocks(dense, query.shape[1], SCORE_BUDGET):
        position = torch.arange(block.row, block.row_end, device=query.device)[None, :, None] + dense.offset
        places = torch.arange(block.key, block.key_end, device=query.device)[None, None, :]
        # Rows behind the last valid key are padding, and no part of a prompt.
        allowed = block.allowed & (position < dense.end[:, None, None])
        if own is not None:
            allowed &= own[None, block.row : block.row_end, None]
        yield _Part(
            sequences,
            slice(first_row + block.row, first_row + block.row_end),
            slice(first_key + block.key, first_key + block.key_end),
            allowed,
            allowed & ~kernel.attended(triangle, position, places),
        )


@dataclass(frozen=True)
class _Tensors:
    """The tensors of a call in the dtype that is computed in; ``delta`` (B, H, Sq, 1) is the row sum of dO * O."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    delta: Tensor


def _accumulate(
    tensors: _Tensors, inputs: AttentionInputs, part: _Part, sums: Tensor, cells: Tensor, total: list[Tensor] | None
) -> None:
    """Add one part's sums and gradients to the totals, in place."""
    s, rows, keys = part.sequences, part.rows, part.keys
    k, v = tensors.key[s, :, keys], tensors.value[s, :, keys]
    kv_heads = k.shape[1]
    q, d_out = (kernel.grouped(x[s, :, rows], kv_heads) for x in (tensors.query, tensors.grad_out))
    delta = tensors.delta[s, :, rows]
    cell_shape = (*delta.shape[:3], k.shape[2])
    scores = kernel.capped((q @ k.transpose(2, 3)).view(cell_shape), inputs.scale, inputs.softcap)
    scores.masked_fill_(~part.allowed[:, None], float("-inf"))
    slope = kernel.slope(scores, inputs.scale, inputs.softcap)
    lse = kernel.log_sum_exp(scores, inputs.sink_logits)
    # exp(-inf - 0) is 0: a row that attends to nothing contributes nothing.
    weights = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_()
    grad_weights = (d_out @ v.transpose(2, 3)).view(cell_shape)
    if total is not None:
        total[2][s, :, keys] += kernel.grouped(weights, kv_heads).transpose(2, 3) @ d_out
    plain = grad_weights.mul_(weights)
    grad_scores = weights.mul_(-delta).add_(plain)
    cells[s] += part.middle.sum((1, 2))
    if bool(part.middle.any()):
        outside = ~part.middle[:, None]
        for place, x in ((0, plain), (2, grad_scores)):
            # Not in place: the gradients need the cells outside the section too.
            inside = x.masked_fill(outside, 0.0)
            sums[place, s] += inside.sum(-1).sum(-1, dtype=torch.float64)
            sums[place + 1, s] += inside.abs_().sum(-1).sum(-1, dtype=torch.float64)
    if total is not None:
        stacked = kernel.grouped(grad_scores.mul_(slope), kv_heads)
        total[0][s, :, rows] += (stacked @ k).view(*delta.shape[:3], -1)
        total[1][s, :, keys] += stacked.transpose(2, 3) @ q
