"""The form of nanoGPT: blocks in a ModuleDict, one projection for query, key and value, ``is_causal=True``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.clients.common import CONFIG, LAYERS, TOKENS, VOCABULARY, Result, compared, gradients, main, prompt
from tmx_compile import tmx_backend

WIDTH, HEADS = 64, 4


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, -1)
        )
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), CausalSelfAttention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        embeddings = {"wte": nn.Embedding(VOCABULARY, WIDTH), "wpe": nn.Embedding(TOKENS, WIDTH)}
        self.transformer = nn.ModuleDict(embeddings | {"h": blocks})
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(x)


def train() -> Result:
    model = GPT()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    compiled = torch.compile(model, backend=backend)
    loss = lambda: F.cross_entropy(compiled(prompt())[0, :-1], prompt()[0, 1:])  # noqa: E731
    return compared(lambda: gradients(model, loss()), backend, [block.attn for block in model.transformer.h])


if __name__ == "__main__":
    main("torch", {"nanoGPT's form, training": train})
