"""Time to first token of a whole model with dynamic layers beside triangle layers, against the best dense one.

Random weights have no structure that a selection could find: the share sets the density, and the shares are found by
trying, so that the layers visit what is asked for. The record has what was counted. Which densities keep a model's
quality is what ``python -m studies.run stacked`` and ``stacked_frontier`` measure.

Parts by the name of a variant are whole compiled models. Those that begin with ``switch`` take all variants at one
length on one model that is not compiled but for its MLPs and norms: minutes less, and nearly as fast. They also check
what ``advise`` would have told, from times of single layers.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.common import Case, Parts, Records, cold_compiles, device, free, note
from benchmarks.shapes import CAUSAL, MODELS, Prefill, build, check_layers
from benchmarks.ttft import timed
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.bench.layer_times import AttentionShape, measure_times
from tmx_compile.bench.timing import Rounds, interleaved_on
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.lowering import fa4
from tmx_compile.lowering.fa4_lists import kernel_of
from tmx_compile.mask import Geometry
from tmx_compile.mask.selection import Selection

GEOMETRY = (8, 512, 128)
MODEL = MODELS["llama"]
FULL: dict[str, Any] = {
    "lengths": [32768, 65536, 131072],
    "compiled_lengths": [32768, 131072],
    "densities": [0.25, 0.5],
    "layers": 32,
    "block": 128,
    "min_seq_len": 2048,
    "dtype": "bfloat16",
    # (up to this many tokens, timed calls)
    "calls": [[32768, 2], [131072, 1]],
    "switch_calls": [[32768, 3], [65536, 2], [131072, 1]],
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [320],
    "compiled_lengths": [320],
    "densities": [0.5],
    "layers": 4,
    "block": 16,
    "min_seq_len": 256,
    "dtype": "float32",
    "calls": [[320, 1]],
    "switch_calls": [[320, 1]],
}
FIRST = {0.25: 0.34, 0.5: 0.6}
"""The shares to be tried first: what rows and keys drawn at random, with scores of deviation 1.6, need."""
NEAR = 0.01
"""How far a density may be from the one asked for."""


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def _variants(plan: dict[str, Any]) -> list[str]:
    return ["dense-causal", "triangle", *(f"stacked-{density}" for density in plan["densities"])]


def names(quick: bool) -> list[str]:
    plan = _plan(quick)
    # What is to be reached first.
    return _variants(plan) + [
        f"switch-{n}" for n in sorted(plan["lengths"], key=lambda n: (n != max(plan["lengths"]), n))
    ]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "geometry": list(GEOMETRY),
        "model": MODEL.name,
        "weights": "random, standard deviation 0.02",
        "method": f"{Selection.method}, groups of {Selection.stride}",
        "kernel": "over lists: FlashAttention-4 where it is installed, else the package's own",
        "dense-causal": "the best that dense can be: FlashAttention-4 where it is installed, else SDPA's "
        "is_causal=True; no mask",
        "triangle": "the deeper half of the layers; the others as the model has them",
        "stacked": "the deeper half triangle layers, the others dynamic ones that visit about this density",
        "share": "of the estimate that the dynamic layers keep; found by trying, at the same length (switch) or at the "
        "shortest (compiled)",
        "density": "blocks that the dynamic layers visited over those of dense causal attention, counted",
        "timing": "wall time until the device has finished, median of the calls after an untimed one",
        "of_dense": "over 'dense-causal' of the same length and form",
        "form": "compiled: the whole model by torch.compile; switch: attention by an implementation of Transformers, "
        "MLPs and norms compiled one by one",
        "saved_ms": "the dense time less this one; told_ms: the same as advise() adds it up, from layer_ms and the "
        "stored prices of dynamic layers",
        "graphs": "compiled so far, at this and all lengths before",
        "layer_ms": "one dense layer by SDPA, by what 'dense-causal' has, and one triangle layer, timed alone in the "
        "same run",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one compiled variant, one for each length; or of all variants at one length."""
    plan, place = _plan(quick), device()
    if part.startswith("switch"):
        return _switched(int(part.partition("-")[2]), plan, quick)
    model = _model("compiled", quick)
    share = None if not part.startswith("stacked") else _share(model, min(plan["lengths"]), part, plan)
    model.config._attn_implementation = CAUSAL if part == "dense-causal" else "sdpa"
    torch._dynamo.reset()
    triangle, dynamic = _layers(plan, part)
    records: Records = []
    before = counters["stats"]["unique_graphs"]
    with cold_compiles():
        backend = None if not triangle else tmx_backend(_config(plan, part, share), strict=True)
        compiled = torch.compile(model, backend=backend or "inductor")
        for n in plan["compiled_lengths"]:
            free()
            note(f"stacked_model: {part}, {n} tokens")
            prefill = Prefill(model, compiled, n, dynamic=True)
            found = timed(prefill, n, plan, place, first=n == plan["compiled_lengths"][0], graphs=False)
            check_layers(backend, triangle)
            check_layers(backend, dynamic, "dynamic")
            graphs = counters["stats"]["unique_graphs"] - before
            records.append(_record(plan, n, part, "compiled", backend, found) | {"share": share, "graphs": graphs})
    del compiled
    torch._dynamo.reset()
    free()
    return records


def _switched(n: int, plan: dict[str, Any], quick: bool) -> Records:
    """All variants at one length, without compiling the model."""
    model: Any = _model("switch", quick)
    plan = plan | {"calls": plan["switch_calls"]}
    layer = _layer_ms(n, plan)
    records: Records = []
    for variant in _variants(plan):
        free()
        attention, share = None, None
        if variant == "dense-causal":
            model.set_attn_implementation(CAUSAL)
        else:
            if variant.startswith("stacked"):
                share = _share(model, n, variant, plan)
            attention = _switch_to(model, plan, variant, share)
        prefill = Prefill(model, model, n, dynamic=False)
        found = timed(prefill, n, plan, device(), first=False, graphs=False)
        if attention is not None:
            check_layers(attention, _layers(plan, variant)[0])
            check_layers(attention, _layers(plan, variant)[1], "dynamic")
        record = _record(plan, n, variant, "switch", attention, found)
        records.append(record | {"share": share, "layer_ms": layer, "kernel": kernel_of(plan["block"])})
        note(json.dumps(records[-1]))
    return records


def _switch_to(model: Any, plan: dict[str, Any], variant: str, share: float | None) -> Any:
    attention = register_attention(_config(plan, variant, share), name=f"study_{variant}", strict=True)
    model.set_attn_implementation(attention.name)
    return attention


_FOUND: dict[tuple[str, int], float] = {}


def _share(model: Any, n: int, variant: str, plan: dict[str, Any]) -> float:
    """The share at which the dynamic layers visit about the variant's density: regula falsi from a first guess.

    The shortest length is tried first, where a try takes a second.
    """
    density = float(variant.partition("-")[2])
    if (variant, n) in _FOUND:
        return _FOUND[variant, n]
    shortest = min(plan["lengths"])
    share = FIRST[density] if n == shortest else _share(model, shortest, variant, plan)
    prefill = Prefill(model, model, n, dynamic=False)
    points = [(0.0, 0.0), (1.0, 1.0)]
    for _ in range(4 if n == shortest else 2):
        attention = _switch_to(model, plan, variant, share)
        prefill()
        found = _density(attention)
        assert found is not None
        note(f"stacked_model: {n} tokens, share {share:.4f}: density {found:.4f}")
        if abs(found - density) <= NEAR:
            break
        points = sorted([*points, (found, share)])
        place = next(i for i, (x, _) in enumerate(points) if x > density)
        (low, a), (high, b) = points[place - 1 : place + 1]
        share = a + (b - a) * (density - low) / (high - low)
    return _FOUND.setdefault((variant, n), share)


@functools.lru_cache(maxsize=1)
def _model(form: str, quick: bool) -> Any:
    plan = _plan(quick)
    model: Any = build(MODEL, device(), getattr(torch, plan["dtype"]), quick=quick, layers=plan["layers"])
    if form == "switch":
        for layer in model.model.layers:
            for piece in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                piece.compile(dynamic=True)
    return model


def _layers(plan: dict[str, Any], variant: str) -> tuple[list[int], list[int]]:
    """Triangle and dynamic layers."""
    layers = plan["layers"]
    triangle = [] if variant == "dense-causal" else [*range(layers - layers // 2, layers)]
    return triangle, [*range(layers - layers // 2)] if variant.startswith("stacked") else []


def _record(plan: dict[str, Any], n: int, variant: str, form: str, told: Any, found: dict[str, Any]) -> dict[str, Any]:
    triangle, dynamic = _layers(plan, variant)
    return {
        "variant": variant,
        "form": form,
        "n": n,
        "model": MODEL.name,
        "layers": plan["layers"],
        "triangle_layers": triangle,
        "dynamic_layers": dynamic,
        "density": _density(told),
        **{key: found[key] for key in ("ms", "ms_all", "peak_gib", "compile_s")},
    }


def _layer_ms(n: int, plan: dict[str, Any]) -> list[float]:
    """One layer of the model's shape, dense and triangle as ``advise`` times them, and as the dense variant has it."""
    shape = AttentionShape(MODEL.heads, MODEL.kv_heads, MODEL.head_dim, MODEL.head_dim)
    where = {"dtype": plan["dtype"], "device": device().type, "seconds": 1.0}
    (found,) = measure_times(shape, [Geometry(*GEOMETRY)], tokens=n, note=note, **where)
    best = found.dense_ms
    if fa4.missing(device()) is None:
        query, key, value = (
            torch.randn(1, n, heads, MODEL.head_dim, device=device(), dtype=getattr(torch, plan["dtype"]))
            for heads in (MODEL.heads, MODEL.kv_heads, MODEL.kv_heads)
        )
        operands = [x.transpose(1, 2) for x in (query, key, value)]
        run = {"fa4": lambda: fa4.by_sequences(*operands, None, MODEL.head_dim**-0.5)}
        best = interleaved_on(device(), run, Rounds(0.5, 3, 10))["fa4"].median
    return [found.dense_ms, best, found.triangle_ms]


def _told(record: dict[str, Any]) -> float | None:
    """What all layers save together as ``advise`` adds it up, milliseconds; None without a price."""
    sdpa_ms, dense_ms, triangle_ms = record["layer_ms"]
    found = [dense_ms - triangle_ms for _ in record["triangle_layers"]]
    for _ in record["dynamic_layers"]:
        way = Selection.method, Selection.stride, FULL["block"], record["density"]
        share = DynamicTimes.measured().of_dense(record["n"], *way, record.get("kernel", "triton"))
        if share is None:
            return None
        found.append(dense_ms - sdpa_ms * share)
    return math.fsum(found)


def _config(plan: dict[str, Any], variant: str, share: float | None) -> TriangleMixConfig:
    triangle, dynamic = _layers(plan, variant)
    more: dict[str, Any] = {}
    if dynamic:
        more = {"dynamic_layer_indices": dynamic, "dynamic_share": share}
    return TriangleMixConfig(
        *GEOMETRY,
        triangle_layer_indices=triangle,
        min_seq_len=plan["min_seq_len"],
        dynamic_block=plan["block"],
        **more,
    )


def _density(backend: Any) -> float | None:
    """Of the last call, the mean over the dynamic layers; None: there are none."""
    sites = [] if backend is None else [site for site in backend.report if site.decision == "dynamic"]
    found = [density for site in sites if (density := backend.report.density(site)) is not None]
    return sum(found) / len(found) if found else None


def finish(records: Records) -> None:
    """Each over the dense one of its length and form."""
    dense = {(x["n"], x["form"]): x["ms"] for x in records if x["variant"] == "dense-causal"}
    for record in records:
        before = record["dense_ms"] = dense.get((record["n"], record["form"]))
        record["of_dense"] = None if before is None else record["ms"] / before
        record["saved_ms"] = None if before is None else before - record["ms"]
        record["told_ms"] = _told(record) if record.get("layer_ms") else None


COLUMNS = ("form", "variant", "n", "density", "ms", "dense_ms", "of_dense", "saved_ms", "told_ms", "peak_gib")
CASE = Case(
    "stacked_model", "stacked_model.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True
)
