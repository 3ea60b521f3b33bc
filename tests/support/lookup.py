"""A language model whose three layers need different attention, by construction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

CONTENT = 16
# Of a token's vector: its content, whether it is the first or the second thing to look up, and room for results.
FIRST, SECOND, RESULT, WIDTH = CONTENT, CONTENT + 1, CONTENT + 2, CONTENT + 2 + 2 * CONTENT
WORDS = 40


class Lookup(nn.Module):
    """Token 0 is the first thing to look up and token 1 the second; every other one is noise.

    Layer 0 averages everything, with weights that differ a little: whatever is left out shows. Layer 1 carries what
    layer 0 gave the first marked token to all after it: the attention is on one key, far back. Layer 2 does so for the
    second marked token, and only the final rows are ever looked at. So layer 0 has to be dense, layer 1 gives away all
    blocks but those of one key, and layer 2 may be a triangle layer.
    """

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        words = torch.randn(WORDS, CONTENT, generator=draw)
        self.embed = nn.Parameter(torch.cat([words, torch.zeros(WORDS, WIDTH - CONTENT)], 1))
        with torch.no_grad():
            self.embed[0, FIRST] = self.embed[1, SECOND] = 1.0
        self.layers = nn.ModuleList([Layer(None, 0), Layer(FIRST, 1), Layer(SECOND, 2)])
        self.head = nn.Parameter(torch.randn(WORDS, CONTENT, generator=draw) * 4)

    def forward(self, input_ids):
        x = self.embed[input_ids]
        for layer in self.layers:
            x = layer(x)
        return CausalLMOutput(logits=x[..., RESULT + CONTENT :] @ self.head.T)


class Layer(nn.Module):
    """One head: weights by a marker (None: nearly even), from one part of the vector to another."""

    def __init__(self, marker, place):
        super().__init__()
        self.marker, self.place = marker, place

    def forward(self, x):
        content = x[..., :CONTENT]
        if self.marker is None:
            query, key = content * 0.05, content
        else:
            # Of 16 keys that are taken together one is marked: enough to find them by.
            key = F.pad(x[..., self.marker : self.marker + 1] * 400.0, (0, CONTENT - 1))
            query = F.pad(torch.ones_like(x[..., :1]), (0, CONTENT - 1))
        read = (content, x[..., RESULT : RESULT + CONTENT], x[..., RESULT : RESULT + CONTENT])[self.place]
        query, key, read = (part[:, None].contiguous() for part in (query, key, read))
        out = F.scaled_dot_product_attention(query, key, read, is_causal=True, scale=1.0)[:, 0]
        if self.place == 1:
            # The final rows must not read it here.
            return torch.cat([x[..., :RESULT], out, x[..., RESULT + CONTENT :]], -1)
        begin = RESULT if self.place == 0 else RESULT + CONTENT
        return torch.cat([x[..., :begin], out, x[..., begin + CONTENT :]], -1)


def prompts(count, tokens, first, second, seed=1):
    """(count, tokens) ids with the two marked tokens in place."""
    ids = torch.randint(2, WORDS, (count, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, first], ids[:, second] = 0, 1
    return ids
