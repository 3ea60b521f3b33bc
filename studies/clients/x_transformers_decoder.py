"""x-transformers: a decoder with rotary positions, by ``attn_flash`` and by its own matrix products.

Its attention and feed-forward layers stand in one list: attention has the numbers 0, 2, 4, and so on.
"""

from __future__ import annotations

import dataclasses

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.x_transformers import Attention

from studies.clients.common import CONFIG, LAYERS, TOKENS, VOCABULARY, Result, compared, gradients, main, prompt
from tmx_compile import tmx_backend

EVERY_OTHER = dataclasses.replace(CONFIG, triangle_layer_indices=[2, 4])


def decoder(flash: bool) -> AutoregressiveWrapper:
    layers = Decoder(dim=64, depth=LAYERS, heads=4, attn_dim_head=16, rotary_pos_emb=True, attn_flash=flash)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=TOKENS, attn_layers=layers))


def train(flash: bool) -> Result:
    torch.manual_seed(0)
    model = decoder(flash)
    backend = tmx_backend(EVERY_OTHER, model=model, strict=True)
    model.compile(backend=backend)
    call, modules = (lambda: gradients(model, model(prompt()))), attentions(model)
    selected = {"selected": sorted(EVERY_OTHER.layers())}
    if flash:
        return selected | compared(call, backend, modules)
    # The oracle replaces a function that the other form does not call: it runs on the same weights.
    twin = decoder(True)
    twin.load_state_dict(model.state_dict())
    oracle = lambda: gradients(twin, twin(prompt()))  # noqa: E731
    return selected | compared(call, backend, attentions(twin), oracle=oracle)


def attentions(model: AutoregressiveWrapper) -> dict[int, torch.nn.Module]:
    found = [module for module in model.modules() if isinstance(module, Attention)]
    return {2 * i: module for i, module in enumerate(found)}


if __name__ == "__main__":
    main("x-transformers", {"`attn_flash=True`": lambda: train(True), "`attn_flash=False`": lambda: train(False)})
