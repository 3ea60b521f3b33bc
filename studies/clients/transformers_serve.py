"""Transformers' server, in this process and asked by OpenAI's client: its command takes none but its own attention."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from openai import APIConnectionError, OpenAI
from torch import Tensor
from transformers.cli.serve import Serve

from studies.clients.common import CONFIG, Result, attentions, compared, generated, main, qwen3, text, tokenizer
from tmx_compile.integrations.transformers import TriangleAttention, register_attention

STEPS = 4


def served(switch: Callable[[TriangleAttention, Any], None], **settings: Any) -> Result:
    """``switch``: of the model that the server has loaded, before the first request."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    attention = register_attention(CONFIG, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        qwen3().save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        server = Serve(folder, device="cpu", host="127.0.0.1", port=port, non_blocking=True, **settings)
        try:
            (loaded,) = server._model_manager.loaded_models.values()
            switch(attention, loaded.model)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            return answered(client, folder, loaded.model, attention)
        finally:
            server.kill_server()


def answered(client: OpenAI, name: str, model: Any, attention: TriangleAttention) -> Result:
    """The logits behind an answer against the oracle's, and its words against those of ``generate``, switched too."""
    steps: list[Tensor] = []
    words: list[str] = []

    def ask() -> Tensor:
        hook = model.lm_head.register_forward_hook(lambda module, given, logits: steps.append(logits[0, -1]))
        words.append(completion(client, name))
        hook.remove()
        return torch.stack(steps)

    found = compared(ask, attention, attentions(model), switched=model, oracle=lambda: generated(model))
    model.set_attn_implementation(attention.name)
    alone = tokenizer().decode(generated(model).argmax(-1), skip_special_tokens=True)
    if words != [alone]:
        raise AssertionError(f"the server answered {words[0]!r}, and generate in one's own process {alone!r}")
    return found


def completion(client: OpenAI, name: str) -> str:
    """The words that follow the prompt, from a server that may still be starting."""
    for _ in range(600):
        try:
            given = client.completions.create(model=name, prompt=text()[0], max_tokens=STEPS, temperature=0)
        except APIConnectionError:
            time.sleep(0.1)
        else:
            return given.choices[0].text
    raise TimeoutError("the server does not answer")


# Else its cache takes most of the memory there is.
SMALL = dict(cb_num_blocks=32, cb_max_batch_tokens=512)

WAYS = {
    "its server, switched": partial(served, lambda attention, model: model.set_attn_implementation(attention.name)),
    "its server, continuous batching, switched": partial(
        served, TriangleAttention.batch_continuously, continuous_batching=True, cb_use_cuda_graph=False, **SMALL
    ),
}

if __name__ == "__main__":
    main("transformers", WAYS)
