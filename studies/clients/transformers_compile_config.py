"""Transformers: ``generate(compile_config=CompileConfig(backend=...))``, which copies the backend.

It compiles decode steps, and of a prompt its chunks where ``prefill_chunk_size`` is given: a whole prompt runs
uncompiled, and the backend says so. A chunk is judged as a prompt of its own.
"""

from __future__ import annotations

from typing import Any

from transformers import CompileConfig

from studies.clients.common import CONFIG, TOKENS, Result, attentions, compared, generated, main, qwen3
from tmx_compile import tmx_backend
from tmx_compile.integrations.transformers import register_attention


def compile_config(backend: Any) -> CompileConfig:
    found = CompileConfig(backend=backend, mode=None, fullgraph=False)
    # As on a GPU.
    found._compile_all_devices = True
    return found


def compiled(promised: bool = False, **settings: Any) -> Result:
    model = qwen3()
    backend = tmx_backend(CONFIG, model=model, assume_causal=promised)
    settings |= dict(compile_config=compile_config(backend), cache_implementation="static")
    return compared(lambda: generated(model, **settings), backend, attentions(model))


def switched() -> Result:
    """The prompt by the switch, and steps compiled by Inductor."""
    model = qwen3()
    attention = register_attention(CONFIG, strict=True)
    model.set_attn_implementation("tmx")
    settings = dict(compile_config=compile_config("inductor"), cache_implementation="static")
    return compared(lambda: generated(model, **settings), attention, attentions(model), switched=model)


WAYS = {
    "`CompileConfig`": compiled,
    "`CompileConfig`, `prefill_chunk_size`, `assume_causal`": lambda: compiled(True, prefill_chunk_size=TOKENS // 2),
    "`CompileConfig`, switched": switched,
}

if __name__ == "__main__":
    main("transformers", WAYS)
