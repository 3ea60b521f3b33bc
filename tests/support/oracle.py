"""The float64 oracle of the operator, and the one formula of its mask that the tests have."""

from __future__ import annotations

import torch

from tmx_compile.operator import ALL_ROWS


def rule(position, key, start, end, sink, window, last, reach=None):
    """Whether the row at ``position`` attends to ``key``, of the valid keys from ``start`` to ``end``; they broadcast.

    ``last`` of ``ALL_ROWS`` holds for the rows behind the last valid key too.
    """
    near = (key < start + sink) | (position - key <= window)
    final = (position >= end - last) & ((position < end) | (last >= ALL_ROWS))
    seen = (key <= position) & (near | final)
    return seen if reach is None else seen & (position - key <= reach)


def attended(q_len, kv_len, key_mask, sink, window, last, reach=None):
    """(B, Sq, Skv) bool: which keys each row attends to. The definition, one cell at a time, is in test_oracle.py."""
    mask = torch.zeros(1 if key_mask is None else key_mask.shape[0], q_len, kv_len, dtype=torch.bool)
    key = torch.arange(kv_len)
    position = torch.arange(kv_len - q_len, kv_len)[:, None]
    for b in range(mask.shape[0]):
        for valid, own in parts(kv_len, None if key_mask is None else key_mask[b]):
            start, end = valid.nonzero()[0].item(), valid.nonzero()[-1].item() + 1
            mask[b] |= rule(position, key, start, end, sink, window, last, reach) & valid & own[position]
    return mask


def parts(kv_len, key_mask):
    """What one sequence consists of: (keys to attend to, positions of the rows that do), each (Skv,) bool.

    ``key_mask`` is None, bool, or int64 with document numbers: 0 is no document, a negative number a hidden key.
    """
    every = torch.ones(kv_len, dtype=torch.bool)
    if key_mask is None:
        found = [(every, every)]
    elif key_mask.dtype == torch.bool:
        found = [(key_mask, every)]
    else:
        found = [(key_mask == n, key_mask.abs() == n) for n in key_mask.unique().tolist() if n > 0]
    return [(valid, own) for valid, own in found if valid.any()]


def oracle(q, k, v, key_mask, sink, window, last, scale, reach=None, sink_logits=None, softcap=None):
    """out and lse in float64 with the mask written out; differentiable. A learned sink is one more key of value 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    mask = attended(q.shape[2], k.shape[2], key_mask, sink, window, last, reach)[:, None]
    scores = q.double() @ k.transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sink_logits is not None:
        column = sink_logits.double()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
        return torch.softmax(scores, -1)[..., :-1] @ v, torch.logsumexp(scores, -1)
    alive = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    return weights @ v, torch.logsumexp(scores, -1)


def under_mask(query, key, mask):
    """Attention in float64 under a bool mask that broadcasts; the values are the keys, and a row without keys is 0."""
    scores = (query.double() @ key.double().mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ key.double()


def tolerance(dtype):
    """Absolute error allowed against float64, for inputs of unit variance."""
    return {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
