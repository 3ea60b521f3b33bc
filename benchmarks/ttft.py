"""Time to first token of whole models on one GPU: dense against triangle layers, and where the time goes.

A part is one compiled variant of one model (``llama/triangle-8-512-128+mask``): each is compiled once, for all lengths.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.account import account, floor_limit
from benchmarks.common import Case, Parts, Records, cold_compiles, device, free, note
from benchmarks.shapes import CAUSAL, MODELS, Prefill, build, check_layers, lowerings, triangle
from tmx_compile import tmx_backend
from tmx_compile.bench.floor import Shape, copy_rate
from tmx_compile.bench.timing import describe, seconds
from tmx_compile.mask.geometry import Geometry

FULL: dict[str, Any] = {
    "lengths": [4096, 32768, 65536, 131072],
    "masked_lengths": [32768, 131072],
    "graph_lengths": [4096, 32768],
    "account_at": 131072,
    "min_seq_len": 2048,
    "dtype": "bfloat16",
    # (up to this many tokens, timed calls)
    "calls": [[4096, 7], [32768, 4], [131072, 2]],
}
QUICK: dict[str, Any] = {
    **FULL,
    "lengths": [320, 512],
    "masked_lengths": [320],
    "graph_lengths": [320],
    "account_at": 512,
    "min_seq_len": 256,
    "dtype": "float32",
    "calls": [[512, 1]],
}


@dataclass(frozen=True)
class Variant:
    """How a model is run. Without a geometry it is dense: ``causal`` by SDPA's is_causal, else as it is written."""

    geometry: Geometry | None = None
    causal: bool = False
    mask: bool = False
    graphs: bool = False
    accounted: bool = False

    @property
    def name(self) -> str:
        geometry = "" if self.geometry is None else f"triangle-{self.geometry.slug}"
        base = geometry or ("dense-causal" if self.causal else "dense")
        return base + ("+mask" if self.mask else "") + ("+graphs" if self.graphs else "")


WIDE, NARROW = Geometry(8, 512, 128), Geometry(4, 32, 64)
# The most telling first, for when time runs out.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(causal=True, accounted=True),
        Variant(WIDE, accounted=True),
        Variant(WIDE, mask=True),
        Variant(),
        Variant(mask=True),
        Variant(NARROW, accounted=True),
        Variant(NARROW, mask=True),
        Variant(causal=True, graphs=True),
        Variant(WIDE, graphs=True),
    )
}


def names(quick: bool) -> list[str]:
    return [f"{model}/{variant}" for model in MODELS for variant in VARIANTS]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "device": device().type,
        "batch": 1,
        "models": {
            key: {"name": shape.name, "layers": shape.layers, "triangle_layers": f"the deepest {shape.sparse}"}
            for key, shape in MODELS.items()
        },
        "weights": "random, standard deviation 0.02",
        "call": "model(input_ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1), with mask also "
        "attention_mask of ones",
        "dense": "Hugging Face's attn_implementation='sdpa' under torch.compile(backend='inductor'), the mask as its "
        "code builds it",
        "dense-causal": "the same by FlashAttention-4 where versions have it, else by SDPA's is_causal=True, and no "
        "mask: the best that dense can be, right without padding only",
        "triangle": "torch.compile(backend=tmx_backend(config, strict=True)) of the unchanged model",
        "graphs": "mode='reduce-overhead'",
        "shapes": "dynamic length",
        "timing": "wall time until the GPU has finished, median of the calls at a length after an untimed one (graphs: "
        "three)",
        "compile_s": "the first call less the median, at a variant's first length; compile caches off, and an "
        "empty cache folder for every part",
        "compilations": "graphs compiled so far, at this and all lengths before",
        "memory": "peak of torch's allocator, weights included",
        "account": "torch.profiler, kernel time by class of one further call",
        "reduction": "against the fastest dense variant of the same model, tokens and use of CUDA graphs",
        "limit": "the time if the triangle layers cost only the floor: best dense less its attention in those layers, "
        "plus their floor",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one part, one for each length."""
    plan, place = _plan(quick), device()
    key, _, variant_name = part.partition("/")
    shape, variant = MODELS[key], VARIANTS[variant_name]
    model = _MODEL.get(key, place, plan["dtype"], quick)
    model.config._attn_implementation = CAUSAL if variant.causal else "sdpa"
    layers = model.config.num_hidden_layers
    sparse = shape.sparse * layers // shape.layers
    lengths = plan["graph_lengths" if variant.graphs else "masked_lengths" if variant.mask else "lengths"]
    torch._dynamo.reset()
    base = {
        "model": shape.name,
        "variant": variant.name,
        "geometry": list(variant.geometry.counts) if variant.geometry else None,
        "triangle_layers": sparse if variant.geometry else 0,
        "layers": layers,
        "mask": variant.mask,
        "graphs": variant.graphs,
    }
    records: Records = []
    with cold_compiles(), torch._dynamo.config.patch(recompile_limit=64):
        wanted = range(layers - sparse, layers)
        config = triangle(variant.geometry, wanted, plan["min_seq_len"]) if variant.geometry else None
        backend = None if config is None else tmx_backend(config, strict=True)
        mode: Any = {"mode": "reduce-overhead"} if variant.graphs else {}
        compiled = torch.compile(model, backend=backend or "inductor", **mode)
        before = counters["stats"]["unique_graphs"]
        for tokens in lengths:
            free()
            record = {**base, "tokens": tokens, **EMPTY}
            try:
                prefill = Prefill(model, compiled, tokens, mask=variant.mask, dynamic=True, graphs=variant.graphs)
                record |= timed(prefill, tokens, plan, place, first=tokens == lengths[0], graphs=variant.graphs)
                check_layers(backend, wanted)
                note(f"{part}, {tokens:,} tokens: {record['ms']:.1f} ms; seconds to compile: {record['compile_s']}")
                if variant.accounted and tokens == plan["account_at"]:
                    record["account"] = {**account(prefill, place), "copy_bytes_per_s": copy_rate(place)}
            # A length that fails says how, and the others are measured all the same.
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
                    record["oom"] = True
                else:
                    record["failed"] = describe(error)
                note(f"{part}, {tokens:,} tokens: {describe(error)}")
            prefill = None
            compiled_graphs = counters["stats"]["unique_graphs"] - before
            records.append(record | {"compilations": compiled_graphs, "lowerings": lowerings(backend)})
    del compiled
    torch._dynamo.reset()
    free()
    return records


EMPTY = dict.fromkeys(("ms", "peak_gib", "compile_s", "failed", "account")) | {"ms_all": [], "oom": False}


def timed(
    prefill: Prefill, tokens: int, plan: dict[str, Any], device: torch.device, *, first: bool, graphs: bool
) -> dict[str, Any]:
    """Time one length: an untimed call, then as many timed ones as the plan has for it."""
    first_s = seconds(prefill)
    # A CUDA graph is recorded in the second call, and replayed from the third on.
    for _ in range(2 if graphs else 0):
        prefill()
    calls = next(calls for up_to, calls in plan["calls"] if tokens <= up_to)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    logits: list[torch.Tensor] = []
    taken = [seconds(lambda: logits.__setitem__(slice(None), [prefill()])) for _ in range(calls)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    if not bool(logits[0].isfinite().all()):
        raise RuntimeError("the prefill gave logits that are not finite")
    median = statistics.median(taken)
    return {
        "ms": 1e3 * median,
        "ms_all": [1e3 * s for s in taken],
        "peak_gib": peak,
        "compile_s": first_s - median if first else None,
    }


class _Model:
    """The model of the last part. It is let go before the next is made: two might not fit."""

    def __init__(self) -> None:
        self._key: tuple[str, bool] | None = None
        self._model: nn.Module | None = None

    def get(self, key: str, device: torch.device, dtype: str, quick: bool) -> nn.Module:
        if self._key != (key, quick) or self._model is None:
            self._model = None
            free()
            start = time.perf_counter()
            self._model = build(MODELS[key], device, getattr(torch, dtype), quick=quick)
            self._key = (key, quick)
            note(f"{key}: built in {time.perf_counter() - start:.0f} s")
        return self._model


_MODEL = _Model()


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def finish(records: Records) -> None:
    """Reductions against the fastest dense variant, and the limit that arithmetic sets."""
    for record in records:
        same = [r for r in records if all(r[k] == record[k] for k in ("model", "tokens", "graphs")) and r["ms"]]
        dense = min((r for r in same if r["geometry"] is None), key=lambda r: r["ms"], default=None)
        record["dense_ms"] = dense["ms"] if dense else None
        record["best_dense"] = dense["variant"] if dense else None
        record["reduction"] = 1 - record["ms"] / dense["ms"] if dense and record["ms"] else None
        record["limit_ms"] = record["limit_reduction"] = None
        accounted = next((r for r in same if r["variant"] == "dense-causal" and r["account"]), None)
        if record["geometry"] is None or dense is None or accounted is None or record["graphs"]:
            continue
        shape = next(shape for shape in MODELS.values() if shape.name == record["model"])
        record["limit_ms"] = floor_limit(
            accounted["ms"],
            accounted["account"]["attention_ms"],
            accounted["account"]["copy_bytes_per_s"],
            Shape(record["tokens"], 1, shape.heads, shape.kv_heads, shape.head_dim, 2),
            record["layers"],
            record["triangle_layers"],
            Geometry(*record["geometry"]),
        )
        record["limit_reduction"] = 1 - record["limit_ms"] / dense["ms"]


COLUMNS = (
    *("model", "tokens", "variant", "ms", "reduction", "limit_reduction", "peak_gib"),
    *("compile_s", "compilations", "oom", "failed", "lowerings"),
)
CASE = Case("ttft", "ttft.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True)
