"""Time to first token of a whole model with dynamic layers beside triangle layers, against the best dense one.

Random weights attend alike to every key, so a layer that is to keep a share of the estimated attention visits about
that share of the blocks: the share sets the density, and the record has what was counted. Which densities keep a
model's quality is what ``python -m studies.run stacked`` measures.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import Case, Parts, Records, cold_compiles, device, free, note
from benchmarks.shapes import CAUSAL, MODELS, Prefill, build, check_layers
from benchmarks.ttft import timed
from tmx_compile import TriangleMixConfig, tmx_backend

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
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [320],
    "shares": [0.5],
    "layers": 4,
    "block": 16,
    "min_seq_len": 256,
    "dtype": "float32",
    "calls": [[320, 1]],
}


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    return ["dense-causal", "triangle", *(f"stacked-{share}" for share in _plan(quick)["shares"])]


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
        "of_dense": "over 'dense-causal' of the same length",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one variant, one for each length."""
    plan, place = _plan(quick), device()
    layers = plan["layers"]
    upper, lower = range(layers - layers // 2, layers), range(layers - layers // 2)
    model = build(MODEL, place, getattr(torch, plan["dtype"]), quick=quick, layers=layers)
    model.config._attn_implementation = CAUSAL if part == "dense-causal" else "sdpa"
    torch._dynamo.reset()
    dynamic = [*lower] if part.startswith("stacked") else []
    triangle = [] if part == "dense-causal" else [*upper]
    records: Records = []
    with cold_compiles():
        backend = None if not triangle else tmx_backend(_config(plan, triangle, dynamic, part), strict=True)
        compiled = torch.compile(model, backend=backend or "inductor")
        for n in plan["lengths"]:
            free()
            note(f"stacked_model: {part}, {n} tokens")
            prefill = Prefill(model, compiled, n, dynamic=True)
            found = timed(prefill, n, plan, place, first=n == plan["lengths"][0], graphs=False)
            check_layers(backend, triangle)
            check_layers(backend, dynamic, "dynamic")
            records.append(
                {
                    "n": n,
                    "model": MODEL.name,
                    "layers": layers,
                    "triangle_layers": triangle,
                    "dynamic_layers": dynamic,
                    "density": _density(backend),
                    **{key: found[key] for key in ("ms", "ms_all", "peak_gib", "compile_s")},
                }
            )
    del compiled, model
    torch._dynamo.reset()
    free()
    return records


def _config(plan: dict[str, Any], triangle: list[int], dynamic: list[int], part: str) -> TriangleMixConfig:
    more: dict[str, Any] = {}
    if dynamic:
        more = {"dynamic_layer_indices": dynamic, "dynamic_share": float(part.partition("-")[2])}
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
    """Each over the dense one of its length."""
    dense = {record["n"]: record["ms"] for record in records if record["part"] == "dense-causal"}
    for record in records:
        record["dense_ms"] = dense.get(record["n"])
        record["of_dense"] = None if record["dense_ms"] is None else record["ms"] / record["dense_ms"]


COLUMNS = ("part", "n", "density", "ms", "dense_ms", "of_dense", "peak_gib", "compile_s")
CASE = Case(
    "stacked_model", "stacked_model.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True
)
