"""litgpt: its ``GPT`` in training, and generating into its cache.

With a cache the rows' positions come in as data, which only ``assume_causal`` lets through; every call checks them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from litgpt import GPT, Config

from studies.clients.common import CONFIG, LAYERS, TOKENS, VOCABULARY, Result, compared, gradients, main, prompt
from tmx_compile import tmx_backend


def tiny() -> GPT:
    model = GPT(
        Config(
            block_size=512,
            n_layer=LAYERS,
            n_embd=64,
            n_head=4,
            n_query_groups=2,
            padded_vocab_size=VOCABULARY,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=96,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
        )
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def train() -> Result:
    model = tiny()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    loss = lambda: F.cross_entropy(model(prompt())[0, :-1], prompt()[0, 1:])  # noqa: E731
    return compared(lambda: gradients(model, loss()), backend, [block.attn for block in model.transformer.h])


@torch.no_grad()
def cached() -> Result:
    model = tiny().eval()
    model.set_kv_cache(batch_size=1, device=torch.device("cpu"))
    backend = tmx_backend(CONFIG, model=model, assume_causal=True, strict=True)
    model.compile(backend=backend)

    def generate() -> torch.Tensor:
        first = model(prompt(), torch.arange(TOKENS), input_pos_maxp1=TOKENS)[0, -1:]
        second = model(first.argmax(-1)[None], torch.tensor([TOKENS]), input_pos_maxp1=TOKENS + 1)[0]
        return torch.cat([first, second])

    return compared(generate, backend, [block.attn for block in model.transformer.h])


if __name__ == "__main__":
    main("litgpt", {"training": train, "with its cache, `assume_causal`": cached})
