"""Decode steps over a cache that stays split after a long prompt, beside one card that holds all of it.

A part of :mod:`studies.context_parallel`. A Transformers Llama of the same shape; the cache is drawn at random, as no
step's time depends on what it holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from benchmarks import common
from studies.context_timing import of_all, timed
from tmx_compile import TriangleMixConfig, tmx_backend

UNTIMED, TIMED = 8, 40


def study(plan: dict[str, Any], kind: str, mesh: DeviceMesh) -> Iterator[dict[str, Any]]:
    """Milliseconds of a step of one token, on the slowest process, and the peak of memory of each."""
    alone = [dist.new_group([rank]) for rank in range(mesh.size())][mesh.get_local_rank()]
    one = DeviceMesh.from_group(alone, kind)
    for name, of, sparse in (("context, dense", mesh, False), ("context", mesh, True), ("one", one, True)):
        times, memory, tokens = steps(plan, kind, of, sparse=sparse)
        item = {"variant": f"step, {name}", "n": plan["steps"], "ranks": of.size(), "new_tokens": tokens}
        yield item | {"ms": statistics.median(times), **memory}


def steps(
    plan: dict[str, Any], kind: str, mesh: DeviceMesh, *, sparse: bool
) -> tuple[list[float], dict[str, list[float]], int]:
    """The times of some steps, the peaks of memory, and how many tokens followed the prompt in the end."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from tmx_compile.integrations.transformers import SplitPrompt

    torch._dynamo.reset()
    common.free()
    dtype, heads, hidden = getattr(torch, plan["dtype"]), plan["heads"], plan["hidden"]
    shape = LlamaConfig(
        num_hidden_layers=plan["layers"],
        hidden_size=hidden,
        intermediate_size=plan["intermediate"],
        num_attention_heads=heads,
        num_key_value_heads=plan["kv_heads"],
        vocab_size=1024,
        max_position_embeddings=2 * plan["steps"],
    )
    torch.manual_seed(0)
    with torch.device(kind):
        model = LlamaForCausalLM(shape).to(dtype).eval()
    half = range(plan["layers"] // 2, plan["layers"]) if sparse else ()
    config = TriangleMixConfig(*plan["geometry"], triangle_layer_indices=half, min_seq_len=plan["min_seq_len"])
    backend = tmx_backend(config, **({"context_parallel": mesh} if mesh.size() > 1 else {}))
    compiled = torch.compile(model, backend=backend, dynamic=True)
    split = SplitPrompt(model, mesh, torch.zeros(1, plan["steps"], dtype=torch.int64, device=kind))
    cache, held = DynamicCache(), (1, plan["kv_heads"], plan["steps"] // mesh.size(), hidden // heads)
    for layer in range(plan["layers"]):
        cache.update(*(torch.randn(held, device=kind, dtype=dtype) for _ in range(2)), layer)
    token = torch.zeros(1, 1, dtype=torch.int64, device=kind)

    def step() -> None:
        with torch.no_grad():
            compiled(**split.step(token), past_key_values=cache)

    for _ in range(UNTIMED):
        step()
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = [max(timed(step, kind)) for _ in range(TIMED)]
    memory = {"memory_gib": of_all(torch.cuda.max_memory_allocated() / 2**30, kind)} if kind == "cuda" else {}
    return times, memory, split.new_tokens
