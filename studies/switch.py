"""Time to first token without compiling: Transformers' ``sdpa`` against ``register_attention``, on one GPU."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.common import Case, Measured, note
from benchmarks.shapes import MODELS, build
from tmx_compile import TriangleMixConfig
from tmx_compile.bench.timing import describe, seconds

GEOMETRY = {"num_sink_tokens": 8, "sliding_window_size": 512, "num_last_tokens": 128}
FULL: dict[str, Any] = {"tokens": [32768, 131072], "calls": 3, "min_seq_len": 2048, "dtype": "bfloat16"}
QUICK: dict[str, Any] = {"tokens": [320], "calls": 1, "min_seq_len": 256, "dtype": "float32"}
# Tokens of padding on the left: a single one makes ``sdpa`` write out its mask.
PADDING = {"none": 0, "left": 1}


def measure(quick: bool) -> Measured:
    from tmx_compile.integrations.transformers import register_attention

    plan = QUICK if quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = MODELS["llama"]
    model = build(shape, device, getattr(torch, plan["dtype"]), quick=quick)
    layers = model.config.num_hidden_layers
    sparse = shape.sparse * layers // shape.layers
    config = TriangleMixConfig.deepest(sparse, num_layers=layers, min_seq_len=plan["min_seq_len"], **GEOMETRY)
    attention = register_attention(config, name="tmx_bench_switch", strict=True)
    records = []
    for tokens in plan["tokens"]:
        for padding, hidden in PADDING.items():
            dense = None
            for name in ("sdpa", attention.name):
                model.set_attn_implementation(name)
                record = {"tokens": tokens, "padding": padding, "attention": "sdpa" if name == "sdpa" else "tmx"}
                record |= _timed(model, tokens, hidden, plan["calls"], device)
                dense = record["ms"] if name == "sdpa" else dense
                record["reduction"] = 1 - record["ms"] / dense if dense and record["ms"] else None
                records.append(record)
    found = {site.layer for site in attention.report.triangle()}
    if len(found) != sparse:
        raise RuntimeError(f"wanted {sparse} triangle layers, got {sorted(map(str, found))}")
    settings = {
        **plan,
        **GEOMETRY,
        "device": device.type,
        "model": f"{shape.name}'s configuration, random weights, not compiled",
        "batch": 1,
        "triangle_layers": f"the deepest {sparse} of {layers}",
        "lowerings": sorted({site.lowering for site in attention.report.triangle()}),
        "call": "model(input_ids, use_cache=True, logits_to_keep=1), with left padding also an attention_mask that "
        "hides one token",
        "timing": "wall time until the GPU has finished, median of the calls after an untimed one",
        "memory": "peak of torch's allocator, weights included",
        "reduction": "against sdpa at the same length and padding",
    }
    return Measured(settings, records)


def _timed(model: nn.Module, tokens: int, hidden: int, calls: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=generator).to(device)
    mask = None if hidden == 0 else (torch.arange(tokens, device=device) >= hidden).long()[None]

    def prefill() -> None:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)

    empty: dict[str, Any] = {"ms": None, "ms_all": [], "peak_gib": None, "failed": None}
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        prefill()
        taken = [1e3 * seconds(prefill) for _ in range(calls)]
    # What fails (for want of memory, say) says how, and the others are measured all the same.
    except Exception as error:
        note(f"switch, {tokens:,} tokens: {describe(error)}")
        return {**empty, "failed": describe(error)}
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {**empty, "ms": statistics.median(taken), "ms_all": taken, "peak_gib": peak}


COLUMNS = ("tokens", "padding", "attention", "ms", "reduction", "peak_gib", "failed")
CASE = Case("switch", "switch.json", measure, COLUMNS, needs_cuda=True)
