"""One triangle layer on a GPU against its floor, where the floor knows the best dense kernel, and what lies between.

Our whole call, and our streaming rows beside FlashAttention-4's window kernel. A sweep over windows tells how fast a
kernel gets through keys once a tile runs, and what a tile costs beside: what stops a call short of its floor.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, free, note
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Ceilings, Shape, attended_pairs, causal_pairs, copy_rate
from tmx_compile.bench.timing import Rounds, describe, interleaved_on
from tmx_compile.lowering import fa4
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.table import BLOCKED, FA4, TRITON
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

GEOMETRIES = (Geometry(4, 32, 64), Geometry(8, 512, 128), Geometry(64, 1024, 128))
DENSE = Geometry(0, 0, ALL_ROWS)
FULL: dict[str, Any] = {
    # The best dense rate first: the floor needs it.
    "lengths": [131072, 32768, 4096],
    # With the rows of a tile they fill whole blocks of keys. From the third on the line through them is told.
    "sweep": [0, 96, 224, 480, 992, 2016],
    "sweep_from": 16384,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "rounds": [2.0, 7, 30],
}
QUICK: dict[str, Any] = FULL | {"lengths": [700, 300], "sweep": [0, 16, 32, 48, 64, 96], "sweep_from": 600} | {
    "heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "rounds": [0.0, 1, 1],
}  # fmt: skip
FA4_WINDOW = "fa4 window"
TOLD = {
    "what": "dense; layer: the whole call; streaming: without last rows; band: without sinks too; sweep: more bands",
    "floor_ms": "the larger of bytes / copy_bytes_per_s and attended pairs x 4 x heads x head_dim / flops_per_s",
    "flops_per_s": "the best dense kernel's in this run, at any length",
    "window_ms": "FlashAttention-4's window kernel with the same window, without sinks",
    "ratio": "window_ms / ms: above 1, ours is faster",
    "speedup": "dense_ms / ms, of the fastest dense kernel at this length",
    "key_ms": "one more key for every row: the slope from the third longest window of the sweep to the longest",
    "pace_of_dense": "what those pairs take at flops_per_s, over key_ms",
    "tile_ms": "ms less key_ms for each key of a row: edges of tiles, their start and their end",
    "parts_ms": "of a layer's ms: the band's pairs at flops_per_s; pace, what they take longer by key_ms; tile, the "
    "band's tile_ms; sinks, streaming less band; last rows, layer less streaming",
}


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    return [str(n) for n in _plan(quick)["lengths"]]


def settings(quick: bool) -> dict[str, Any]:
    where = device()
    return {
        **_plan(quick),
        "device": where.type,
        "batch": 1,
        "geometries": [list(x.counts) for x in GEOMETRIES],
        "fa4": fa4.missing(where) or "installed",
        "fields": TOLD,
        "timing": "on a GPU the time of a CUDA graph, second-level cache flushed; variants in turns, dense ones apart",
    }


def measure(part: str, quick: bool) -> Records:
    """The records of one length."""
    n, plan, place = int(part), _plan(quick), device()
    free()
    rounds = Rounds(*plan["rounds"])
    generator = torch.Generator(place).manual_seed(n)
    query, key, value = (
        torch.randn(
            1, n, heads, plan["head_dim"], generator=generator, device=place, dtype=getattr(torch, plan["dtype"])
        ).transpose(1, 2)
        for heads in (plan["heads"], plan["kv_heads"], plan["kv_heads"])
    )
    shape = [plan["heads"], plan["kv_heads"], plan["head_dim"], query.element_size()]
    made = {"n": n, "shape": shape, "copy_bytes_per_s": copy_rate(place)}
    records: Records = []
    for name, timing in interleaved_on(place, _dense(query, key, value), rounds).items():
        records.append({"what": "dense", **made, "lowering": name, **timing.fields(), "timed": timing.how})
    gc.collect()
    bands, windows = _sparse(query, key, value, plan)
    errors: dict[int, float] = {}
    for window, run in windows.items():
        try:
            errors[window] = float((run() - bands["band", Geometry(0, window, 0)]()).abs().max())
        # Another release of the package: what is ours is measured all the same.
        except Exception as error:
            note(f"floor: {FA4_WINDOW} {window}: {describe(error)}")
    windows = {window: windows[window] for window in errors}
    runs: dict[Any, Callable[[], Tensor]] = {**bands, **{(FA4_WINDOW, w): run for w, run in windows.items()}}
    timings = interleaved_on(place, runs, rounds)
    swept = set(_sweep(n, plan))
    for (what, geometry), timing in timings.items():
        if what == FA4_WINDOW:
            continue
        window = timings.get((FA4_WINDOW, geometry.window))
        record = {"what": what, **made, "geometry": list(geometry.counts), "lowering": _lowering(place).name}
        record |= {**timing.fields(), "timed": timing.how}
        if what != "layer":
            record |= {"window_ms": None if window is None else window.median}
        records.append(record)
        if what == "band" and window is not None:
            other = {"lowering": FA4_WINDOW, **window.fields(), "timed": window.how, "error": errors[geometry.window]}
            records.append(record | other)
    # A window of the sweep is a band as well; it is told once.
    for record in records:
        if record["what"] == "band" and record["geometry"][1] in swept:
            record["what"] = "sweep"
    return records


def _lowering(place: torch.device) -> Any:
    return TRITON if place.type == "cuda" else BLOCKED


def _run(lowering: Any, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Callable[[], Tensor]:
    call = AttentionCall(query, key, value, None, geometry, query.shape[3] ** -0.5, needs_grad=False)
    return partial(immediate, lowering, call)


def _dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every dense kernel that is there; those that are far behind are not timed at length."""
    runs, _ = dense_variants(query, key, value)
    if query.device.type != "cuda":
        return runs
    if fa4.missing(query.device) is None:
        runs["fa4"] = _run(FA4, query, key, value, DENSE)
    runs["triton"] = _run(TRITON, query, key, value, DENSE)
    return {name: run for name, run in runs.items() if name not in ("efficient", "flash")}


def _sweep(n: int, plan: dict[str, Any]) -> Sequence[int]:
    return plan["sweep"] if n >= plan["sweep_from"] else ()


def _sparse(
    query: Tensor, key: Tensor, value: Tensor, plan: dict[str, Any]
) -> tuple[dict[tuple[str, Geometry], Callable[[], Tensor]], dict[int, Callable[[], Tensor]]]:
    """Our calls, by what they are and their mask; FlashAttention-4's window kernel by its window."""
    ours = {}
    for geometry in GEOMETRIES:
        streaming = replace(geometry, last=0)
        for what, mask in (("layer", geometry), ("streaming", streaming), ("band", replace(streaming, sink=0))):
            ours[what, mask] = _run(_lowering(query.device), query, key, value, mask)
    for window in _sweep(query.shape[2], plan):
        mask = Geometry(0, window, 0)
        ours["band", mask] = _run(_lowering(query.device), query, key, value, mask)
    if fa4.missing(query.device) is not None:
        return ours, {}
    windows = [mask.window for what, mask in ours if what == "band"]
    return ours, {window: partial(window_by_fa4, query, key, value, window) for window in windows}


def window_by_fa4(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """FlashAttention-4: each row among its own key and the ``window`` before it. (B, h, N, D) in and out."""
    dense, _ = fa4.functions()
    scale = query.shape[3] ** -0.5
    out = dense(*fa4.by_tokens(query, key, value), softmax_scale=scale, causal=True, window_size=(window, 0))
    return fa4.result_of(out).transpose(1, 2)


def finish(records: Records) -> None:
    """Floors by the best dense rate of all records, ratios, and what lies between a layer and its floor."""
    dense = [r for r in records if r["what"] == "dense"]
    for r in dense:
        r["flops_per_s"] = _shape(r).flops(causal_pairs(r["n"])) / r["ms"] * 1e3
    best = max(r["flops_per_s"] for r in dense)
    ceilings = Ceilings(max(r["copy_bytes_per_s"] for r in records), best)
    for r in (x for x in records if x["what"] != "dense"):
        r["floor_ms"], r["floor_by"] = ceilings.floor(_shape(r), Geometry(*r["geometry"]))
        r["over_floor"] = r["ms"] / r["floor_ms"]
        fastest = min((x for x in dense if x["n"] == r["n"]), key=lambda x: x["ms"])
        r |= {"dense_ms": fastest["ms"], "dense_backend": fastest["lowering"], "speedup": fastest["ms"] / r["ms"]}
        if r.get("window_ms"):
            r["ratio"] = r["window_ms"] / r["ms"]
        key_ms = _slope(records, r)
        if r["what"] in ("band", "sweep") and key_ms is not None:
            r |= {"key_ms": key_ms, "pace_of_dense": _shape(r).flops(r["n"]) / best * 1e3 / key_ms}
            r["tile_ms"] = r["ms"] - key_ms * (r["geometry"][1] + 1)
    for r in (x for x in records if x["what"] == "layer"):
        r["parts_ms"] = _parts(records, r, best)


def _shape(record: dict[str, Any]) -> Shape:
    heads, kv_heads, dim, element = record["shape"]
    return Shape(record["n"], 1, heads, kv_heads, dim, element)


def _slope(records: Records, like: dict[str, Any]) -> float | None:
    """Milliseconds for one more key a row by one kernel at one length; None without a sweep."""
    of = [r for r in records if (r["what"], r["n"], r["lowering"]) == ("sweep", like["n"], like["lowering"])]
    points = sorted((r["geometry"][1], r["ms"]) for r in of)[-3:]
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0]) if len(points) > 1 else None


def _parts(records: Records, layer: dict[str, Any], flops_per_s: float) -> dict[str, float] | None:
    """What a layer's milliseconds are made of; None without a sweep."""
    sink, window, _ = layer["geometry"]
    of = [r for r in records if (r["n"], r["lowering"]) == (layer["n"], layer["lowering"]) and r["what"] != "dense"]
    streaming, band = (next(r for r in of if r["geometry"] == [s, window, 0]) for s in (sink, 0))
    if "tile_ms" not in band:
        return None
    pairs = _shape(layer).flops(attended_pairs(layer["n"], Geometry(0, window, 0))) / flops_per_s * 1e3
    return {
        "pairs": pairs,
        "pace": band["ms"] - band["tile_ms"] - pairs,
        "tile": band["tile_ms"],
        "sinks": streaming["ms"] - band["ms"],
        "last rows": layer["ms"] - streaming["ms"],
    }


COLUMNS = (
    *("what", "n", "geometry", "lowering", "ms", "floor_ms", "over_floor", "window_ms", "ratio"),
    *("dense_ms", "speedup", "pace_of_dense", "timed"),
)
CASE = Case("floor", "floor.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True)
