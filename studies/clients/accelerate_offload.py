"""accelerate: weights on the CPU's side of a device map or on disk, brought by hooks in every module.

A hook breaks the graph inside attention: compiled, it runs in pieces; switched, it compiles nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import compile_regions

from studies.clients.common import CONFIG, Result, attentions, compared, main, prompt, qwen3
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention


@torch.no_grad()
def switched(place: Callable[[Any, str], Any]) -> Result:
    attention = register_attention(CONFIG, strict=True)
    model = qwen3()
    model.set_attn_implementation("tmx")
    with tempfile.TemporaryDirectory() as folder:
        placed = place(model, folder)
        call = lambda: placed(prompt()).logits  # noqa: E731
        return compared(call, attention, attentions(placed), switched=placed)


def mapped(model: Any, folder: str) -> Any:
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@torch.no_grad()
def compiled() -> Result:
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    model.compile(backend=backend)
    return compared(lambda: model(prompt()).logits, backend, attentions(model))


@torch.no_grad()
def regions() -> Result:
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model, strict=True)
    whole = compile_regions(model, backend=backend)
    return compared(lambda: whole(prompt(), use_cache=False).logits, backend, attentions(model))


if __name__ == "__main__":
    on_cpu = lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu"))  # noqa: E731
    on_disk = lambda model, folder: disk_offload(model, folder, execution_device=torch.device("cpu"))  # noqa: E731
    ways = {"`cpu_offload`": on_cpu, "`disk_offload`": on_disk, "`device_map` with a disk": mapped}
    every = {f"{way}, switched": lambda place=place: switched(place) for way, place in ways.items()}
    main("accelerate", every | {"`cpu_offload`, compiled": compiled, "`compile_regions`": regions})
