"""The form of gpt-fast: a cache in buffers, and rows of a causal buffer picked by positions that come in as data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.clients.common import CONFIG, LAYERS, TOKENS, VOCABULARY, Result, compared, main, prompt
from tmx_compile import tmx_backend

WIDTH, HEADS, LENGTH = 64, 4, 320


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("k_cache", torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS))
        self.register_buffer("v_cache", torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS))

    def forward(self, x: Tensor, mask: Tensor, input_pos: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.wqkv(x).chunk(3, -1))
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        y = F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("causal_mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.causal_mask[None, None, input_pos]
        x = self.tok_embeddings(ids) + self.positions(input_pos)
        for layer in self.layers:
            x = x + layer(self.norm(x), mask, input_pos)
        return self.output(self.norm(x))


@torch.no_grad()
def generate() -> Result:
    model = Transformer().eval()
    backend = tmx_backend(CONFIG, model=model, assume_causal=True, strict=True)
    prefill = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)

    def steps() -> Tensor:
        first = prefill(prompt(), torch.arange(TOKENS))[0, -1:]
        return torch.cat([first, model(first.argmax(-1)[None], torch.tensor([TOKENS]))[0]])

    return compared(steps, backend, list(model.layers))


if __name__ == "__main__":
    main("torch", {"gpt-fast's form, `assume_causal`": generate})
