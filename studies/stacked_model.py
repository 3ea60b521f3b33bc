"""Time to first token of a whole model with dynamic layers beside triangle layers, against the best dense one.

Random weights attend alike to every key, so a layer that is to keep a share of the estimated attention visits about
that share of the blocks: the share sets the density, and the record has what was counted. Which densities keep a
model's quality is what ``python -m studies.run stacked`` measures.

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

from benchmarks.common import Case, Parts, Records, cold_compiles, device, free, note
from benchmarks.shapes import CAUSAL, MODELS, Prefill, build, check_layers
from benchmarks.ttft import timed
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.bench.layer_times import AttentionShape, LayerTime, measure_times
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.mask import Geometry

GEOMETRY = (8, 512, 128)
MODEL = MODELS["llama"]
FULL: dict[str, Any] = {
    "lengths": [32768, 65536, 131072],
    "shares": [0.25, 0.5],
    "layers": 32,
    "block": 128,
    "min_seq_len": 2048,
    "dtype": "bfloat16",
    # (up to this many tokens, timed calls)
    "calls": [[32768, 5], [65536, 3], [131072, 2]],
    "switch_calls": [[32768, 3], [65536, 2], [131072, 1]],
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [320],
    "shares": [0.5],
    "layers": 4,
    "block": 16,
    "min_seq_len": 256,
    "dtype": "float32",
    "calls": [[320, 1]],
    "switch_calls": [[320, 1]],
}


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def _variants(plan: dict[str, Any]) -> list[str]:
    return ["dense-causal", "triangle", *(f"stacked-{share}" for share in plan["shares"])]


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
        "method": "pooled, groups of 16",
        "dense-causal": "the best that dense can be: FlashAttention-4 where it is installed, else SDPA's "
        "is_causal=True; no mask",
        "triangle": "the deeper half of the layers; the others as the model has them",
        "stacked": "the deeper half triangle layers, the others dynamic ones that keep this share of the estimate",
        "density": "blocks that the dynamic layers visited over those of dense causal attention, counted",
        "timing": "wall time until the device has finished, median of the calls after an untimed one",
        "of_dense": "over 'dense-causal' of the same length and form",
        "form": "compiled: the whole model by torch.compile; switch: attention by an implementation of Transformers, "
        "MLPs and norms compiled one by one",
        "saved_ms": "the dense time less this one; told_ms: the same as advise() adds it up, from the times of one "
        "dense and one triangle layer in the same run and the stored prices of dynamic layers",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one compiled variant, one for each length; or of all variants at one length."""
    plan, place = _plan(quick), device()
    if part.startswith("switch"):
        return _switched(int(part.partition("-")[2]), plan, quick)
    model = _model("compiled", quick)
    model.config._attn_implementation = CAUSAL if part == "dense-causal" else "sdpa"
    torch._dynamo.reset()
    triangle, dynamic = _layers(plan, part)
    records: Records = []
    with cold_compiles():
        backend = None if not triangle else tmx_backend(_config(plan, part), strict=True)
        compiled = torch.compile(model, backend=backend or "inductor")
        for n in plan["lengths"]:
            free()
            note(f"stacked_model: {part}, {n} tokens")
            prefill = Prefill(model, compiled, n, dynamic=True)
            found = timed(prefill, n, plan, place, first=n == plan["lengths"][0], graphs=False)
            check_layers(backend, triangle)
            check_layers(backend, dynamic, "dynamic")
            records.append(_record(plan, n, part, "compiled", backend, found))
    del compiled
    torch._dynamo.reset()
    free()
    return records


def _switched(n: int, plan: dict[str, Any], quick: bool) -> Records:
    """All variants at one length, without compiling the model."""
    model: Any = _model("switch", quick)
    plan = plan | {"calls": plan["switch_calls"]}
    layer = _layer_time(n, plan)
    records: Records = []
    for variant in _variants(plan):
        free()
        attention = None
        if variant == "dense-causal":
            model.set_attn_implementation(CAUSAL)
        else:
            attention = register_attention(_config(plan, variant), name=f"study_{variant}", strict=True)
            model.set_attn_implementation(attention.name)
        prefill = Prefill(model, model, n, dynamic=False)
        found = timed(prefill, n, plan, device(), first=False, graphs=False)
        if attention is not None:
            check_layers(attention, _layers(plan, variant)[0])
            check_layers(attention, _layers(plan, variant)[1], "dynamic")
        record = _record(plan, n, variant, "switch", attention, found)
        records.append(record | {"told_ms": _told(record, layer, plan)})
        note(json.dumps(records[-1]))
    return records


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


def _layer_time(n: int, plan: dict[str, Any]) -> LayerTime:
    """One dense and one triangle layer of the model's shape, as ``advise`` times them."""
    shape = AttentionShape(MODEL.heads, MODEL.kv_heads, MODEL.head_dim, MODEL.head_dim)
    where = {"dtype": plan["dtype"], "device": device().type, "seconds": 1.0}
    (found,) = measure_times(shape, [Geometry(*GEOMETRY)], tokens=n, note=note, **where)
    return found


def _told(record: dict[str, Any], layer: LayerTime, plan: dict[str, Any]) -> float | None:
    """What all layers save together as ``advise`` adds it up, milliseconds; None without a price."""
    found = [layer.saved_ms for _ in record["triangle_layers"]]
    for _ in record["dynamic_layers"]:
        share = DynamicTimes.measured().of_dense(record["n"], "pooled", plan["block"], record["density"])
        if share is None:
            return None
        found.append(layer.dense_ms * (1 - share))
    return math.fsum(found)


def _config(plan: dict[str, Any], variant: str) -> TriangleMixConfig:
    triangle, dynamic = _layers(plan, variant)
    more: dict[str, Any] = {}
    if dynamic:
        more = {"dynamic_layer_indices": dynamic, "dynamic_share": float(variant.partition("-")[2])}
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


COLUMNS = ("form", "variant", "n", "density", "ms", "dense_ms", "of_dense", "saved_ms", "told_ms", "peak_gib")
CASE = Case(
    "stacked_model", "stacked_model.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True
)
