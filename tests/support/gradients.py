"""Gradients of the operator by its definition, a chunk of rows at a time: for any dtype, on any device."""

import torch

from tests.support.oracle import rule


def reference(case, tensors, grad_out, grad_lse=None, dtype=torch.float64, step=512):
    """The gradients of query, key and value for those of out and lse, computed in ``dtype``.

    The mask is written out for ``step`` rows at a time, so that 8,192 tokens fit.
    """
    query, key, value, key_mask = tensors
    leaves = [x.detach().to(dtype).requires_grad_() for x in (query, key, value)]
    totals = [torch.zeros_like(x) for x in leaves]
    device, kv_len = query.device, case.kv_len
    valid = torch.ones(case.batch, kv_len, dtype=torch.bool, device=device) if key_mask is None else key_mask
    place = torch.arange(kv_len, device=device)
    start = torch.where(valid, place, kv_len).amin(1)[:, None, None]
    end = torch.where(valid, place + 1, 0).amax(1)[:, None, None]
    for first in range(0, case.q_len, step):
        rows = slice(first, min(first + step, case.q_len))
        position = torch.arange(rows.start, rows.stop, device=device)[:, None] + kv_len - case.q_len
        mask = (rule(position, place, start, end, *case.geometry, case.reach) & valid[:, None])[:, None]
        q, k, v = leaves
        k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
        scores = (q[:, :, rows] @ k.mT * case.scale).masked_fill(~mask, float("-inf"))
        alive = mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~alive, 0.0)
        loss = (torch.softmax(scores, -1) * alive @ v * grad_out[:, :, rows].to(dtype)).sum()
        if grad_lse is not None:
            loss = loss + (torch.logsumexp(scores, -1) * alive[..., 0] * grad_lse[:, :, rows].to(dtype)).sum()
        for total, part in zip(totals, torch.autograd.grad(loss, leaves), strict=True):
            total += part
    return totals


def worst_errors(got, want):
    """The largest difference in each gradient, relative to the largest number in it (or to 1, where that is less)."""
    return [float((a.to(b) - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in zip(got, want, strict=True)]
