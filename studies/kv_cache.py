"""What a cache whose triangle layers stream saves: bytes counted, resident memory, a 14B model by arithmetic.

No model runs: caches are filled with random keys and values of a prompt, then one decode step is made in every layer,
which is where the saving happens.
"""

from __future__ import annotations

import ctypes
import gc
import math
import warnings
from typing import Any

import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import Case, Measured, note
from studies.processes import resident_mib
from tmx_compile import TriangleMixConfig
from tmx_compile.integrations.transformers import StreamingCache

FULL: dict[str, Any] = {"tokens": 32768, "layers": 40, "kv_heads": 2, "head_dim": 32}
QUICK: dict[str, Any] = {"tokens": 1024, "layers": 4, "kv_heads": 1, "head_dim": 8}
GEOMETRY = {"num_sink_tokens": 8, "sliding_window_size": 512}
# Qwen3-14B: its key heads, head dimension and layers, in bfloat16.
LARGE = {"layers": 40, "kv_heads": 8, "head_dim": 128, "bytes": 2}
HELD = GEOMETRY["num_sink_tokens"] + GEOMETRY["sliding_window_size"] + 1


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    layers, tokens = plan["layers"], plan["tokens"]
    settings = {
        **plan,
        **GEOMETRY,
        "batch": 1,
        "dtype": "float32",
        "counted": "StreamingCache.memory_bytes() after the first decode step; dense: DynamicCache, storages counted",
        "resident": "resident size of the process with the cache less that before it, MiB",
        "saving": "1 - counted / dense",
        "arithmetic": "streaming layers / layers * (1 - (sinks + window + 1) / (tokens + 1))",
        "large": f"Qwen3-14B's cache by the same arithmetic: {LARGE}",
        "least_layers_for_50_and_75_percent": [least_layers(share, layers, tokens) for share in (0.5, 0.75)],
    }
    records = []
    for number in wanted(layers, tokens):
        note(f"kv_cache: {number} of {layers} layers")
        records.append(_one(number, plan))
    dense = records[0]
    for record in records:
        record["saving"] = 1 - record["counted_mib"] / dense["counted_mib"]
        record["resident_saving"] = 1 - record["resident_mib"] / max(dense["resident_mib"], 1e-9)
    return Measured(settings, records)


def saving(number: int, layers: int, tokens: int) -> float:
    """The share of the cache's memory that streaming in so many layers saves after the first decode step."""
    return number / layers * (1 - min(HELD, tokens + 1) / (tokens + 1))


def least_layers(share: float, layers: int, tokens: int) -> int | None:
    """The fewest layers whose streaming saves that share; None where all of them save less."""
    number = math.ceil(share * layers / (1 - min(HELD, tokens + 1) / (tokens + 1)) - 1e-9)
    return number if number <= layers else None


def wanted(layers: int, tokens: int) -> list[int]:
    """Streaming layers to show: none, 30% and 75%, the least for the promised savings, all."""
    least = [least_layers(share, layers, tokens) for share in (0.5, 0.75)]
    return sorted({0, layers * 3 // 10, layers * 3 // 4, layers, *(n for n in least if n is not None)})


def _one(number: int, plan: dict[str, Any]) -> dict[str, Any]:
    layers, tokens, heads, dim = (plan[name] for name in ("layers", "tokens", "kv_heads", "head_dim"))
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
    )
    model = Qwen3ForCausalLM(config)
    before = _resident_mib()
    if number == 0:
        cache: Any = DynamicCache(config=config)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = StreamingCache(model, TriangleMixConfig.deepest(number, num_layers=layers, **GEOMETRY))
    for rows in (tokens, 1):
        for layer in range(layers):
            cache.update(torch.randn(1, heads, rows, dim), torch.randn(1, heads, rows, dim), layer)
        if rows == tokens:
            prompt_mib = _resident_mib() - before
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    if any(layer.get_seq_length() != tokens + 1 for layer in cache.layers):
        raise RuntimeError("a layer has lost count of its tokens")
    return {
        "streaming_layers": number,
        "layers": layers,
        "counted_mib": sum(x.untyped_storage().nbytes() for x in held) / 2**20,
        "prompt_resident_mib": prompt_mib,
        "resident_mib": _resident_mib() - before,
        "arithmetic_saving": saving(number, layers, tokens),
        "large_gib": _large_gib(number, plan["tokens"]) if layers == LARGE["layers"] else None,
    }


def _large_gib(number: int, tokens: int) -> float:
    token = 2 * LARGE["kv_heads"] * LARGE["head_dim"] * LARGE["bytes"]
    return ((LARGE["layers"] - number) * (tokens + 1) + number * HELD) * token / 2**30


def _resident_mib() -> float:
    """Resident size after what was freed has gone back to the system."""
    gc.collect()
    # Without this the C library keeps freed memory, and a saving would not show.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
    return resident_mib()


COLUMNS = (
    "streaming_layers",
    "layers",
    "counted_mib",
    "saving",
    "arithmetic_saving",
    "prompt_resident_mib",
    "resident_mib",
    "resident_saving",
    "large_gib",
)
CASE = Case("kv_cache", "kv_cache.json", measure, COLUMNS)
