"""Attention maps written out, as an oracle: gates on the Middle section of every layer and head of a real model."""

from __future__ import annotations

import contextlib
import copy
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import attended


def middle_mask(n, geometry, key_mask=None):
    """(B, N, N) bool: dense attention's cells that triangle attention leaves out, cell by cell from the definition."""
    return attended(n, n, key_mask, 0, 0, n) & ~attended(n, n, key_mask, *geometry)


class Decoder(nn.Module):
    """A small decoder in float64 throughout: Hugging Face's go through float32, which finite differences would show."""

    def __init__(self, layers=2, heads=4, kv_heads=2, dim=16, vocabulary=128, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        width = heads * dim
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(DecoderLayer(heads, kv_heads, dim) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary)
        with torch.no_grad():
            # What attention adds must show in the logits.
            for parameter in self.parameters():
                parameter.mul_(2)
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class DecoderLayer(nn.Module):
    def __init__(self, heads, kv_heads, dim):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        width = heads * dim
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, (heads + 2 * kv_heads) * dim)
        self.out, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        both = self.project(self.norm(x)).unflatten(-1, (-1, self.dim)).transpose(1, 2)
        q, k, v = both.split((self.heads, self.kv_heads, self.kv_heads), 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + torch.tanh(self.mlp(x))


class GatedModel:
    """A model in float64 whose attention probabilities are multiplied by gates, before or after normalisation.

    Nothing of the package takes part: ``scaled_dot_product_attention`` is replaced by the formula.
    """

    def __init__(self, model, n, *, renormalized, key_mask=None):
        self.model = copy.deepcopy(model).double()
        self.renormalized = renormalized
        self.mask = attended(n, n, key_mask, 0, 0, n)
        self.gates = {}
        self.layer = 0
        self.layers = len(getattr(model, "model", model).layers)

    def attention(self, query, key, value, *_, scale=None, **__):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        alive = self.mask.any(-1)[:, None, :, None]
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~self.mask[:, None], float("-inf")).masked_fill(~alive, 0.0)
        gate = self.gates.get(self.layer, 1.0)
        self.layer += 1
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        if self.renormalized:
            weights = weights * gate
            weights = weights / weights.sum(-1, keepdim=True)
        else:
            weights = weights / weights.sum(-1, keepdim=True) * gate
        return (weights * alive) @ value

    @contextlib.contextmanager
    def _replaced(self):
        self.layer = 0
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", self.attention):
            yield

    def logits(self, ids, gates=None, **inputs):
        """(B, N, V) with the gates of each layer, (B or 1, H or 1, N, N)."""
        self.gates = gates or {}
        with self._replaced():
            found = self.model(ids, **inputs)
        assert self.layer == self.layers
        return getattr(found, "logits", found)


def one_gate(value, middle, heads, head=None):
    """(1, H, N, N): ``value`` on the Middle section of one head or of all, 1 elsewhere."""
    gate = torch.ones(1, heads, *middle.shape[-2:], dtype=torch.float64)
    chosen = slice(None) if head is None else slice(head, head + 1)
    gate[:, chosen] += middle * (value - 1)
    return gate
