"""One attention layer in SmolLM2's shapes: dense causal SDPA against each lowering, through the whole backend."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import Case, Measured, Timing, cold_compiles, interleaved, note, seconds, speedup
from tmx_compile import TriangleMixConfig, tmx_backend, triangle_attention
from tmx_compile.plan import Grid, block_plan, pair_count
from tmx_compile.plan.mask import dense_section, triangle

HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
LOWERINGS = ("flex", "blocked", "operator")
BLOCK = 64
# Beyond this the (N, N) oracle takes longer than everything that it checks.
ORACLE_UP_TO = 4096

FULL: dict[str, Any] = {
    "lengths": [4096, 8192, 16384],
    "geometries": [[4, 32, 64], [8, 512, 128]],
    "dtypes": ["float32", "bfloat16"],
    "budget_s": 8.0,
    "least_rounds": 5,
    "most_rounds": 11,
}
QUICK: dict[str, Any] = {
    **FULL,
    "lengths": [320],
    "geometries": [[4, 32, 64]],
    "dtypes": ["float32"],
    "budget_s": 0.0,
    "least_rounds": 2,
}

Geometry = tuple[int, int, int]


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


class Model(nn.Module):
    """One attention call whose recorded path has a layer index."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention()])

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layers[0](query, key, value)


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    settings = {
        **plan,
        "batch": 1,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "lowerings": list(LOWERINGS),
        "block": BLOCK,
        "dense": "F.scaled_dot_product_attention(is_causal=True, enable_gqa=True) under backend='inductor'",
        "shapes": "static",
        "error": f"largest absolute difference: from dense-mask attention in float64 for n <= {ORACLE_UP_TO}, above "
        "that from the operator's eager kernel in float64",
    }
    records = []
    with torch.no_grad(), cold_compiles(), torch._dynamo.config.patch(recompile_limit=64):
        for dtype in plan["dtypes"]:
            for n in plan["lengths"]:
                note(f"operator: {dtype}, {n} tokens")
                records += _at(n, dtype, [tuple(g) for g in plan["geometries"]], plan)
    return Measured(settings, records)


def _at(n: int, dtype: str, geometries: list[Geometry], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """All variants at one length and dtype, timed against each other."""
    torch._dynamo.reset()
    gc.collect()
    generator = torch.Generator().manual_seed(n)
    query, key, value = (
        torch.randn(1, heads, n, HEAD_DIM, generator=generator).to(getattr(torch, dtype))
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    variants: dict[str, Callable[[], Tensor]] = {}
    first: dict[str, float] = {}

    def add(name: str, backend: Any) -> None:
        compiled = torch.compile(Model(), backend=backend, dynamic=False)
        variants[name] = lambda: compiled(query, key, value)
        first[name] = seconds(variants[name])

    add("dense", "inductor")
    for geometry in geometries:
        for lowering in LOWERINGS:
            backend = tmx_backend(_config(geometry), lowering=lowering)
            add(_name(geometry, lowering), backend)
            (site,) = backend.report
            if (site.decision, site.lowering) != ("triangle", lowering):
                raise RuntimeError(f"asked for {lowering}, got {site}")

    errors: dict[str, float] = {}
    for geometry in geometries:
        expected = _oracle(query, key, value, geometry)
        for lowering in LOWERINGS:
            name = _name(geometry, lowering)
            errors[name] = float((variants[name]().double() - expected).abs().max())

    limits = {"least": plan["least_rounds"], "most": plan["most_rounds"], "budget_s": plan["budget_s"]}
    timings = interleaved(variants, **limits)
    return [
        _record(n, dtype, geometry, lowering, timings, first, errors[_name(geometry, lowering)])
        for geometry in geometries
        for lowering in LOWERINGS
    ]


def _record(
    n: int,
    dtype: str,
    geometry: Geometry,
    lowering: str,
    timings: dict[str, Timing],
    first: dict[str, float],
    error: float,
) -> dict[str, Any]:
    name = _name(geometry, lowering)
    grid = Grid(n, n)
    attended, causal = pair_count(triangle(*geometry), grid), pair_count(dense_section(), grid)
    return {
        "n": n,
        "geometry": list(geometry),
        "dtype": dtype,
        "lowering": lowering,
        **timings[name].fields(),
        **timings["dense"].fields("dense_"),
        "speedup": speedup(timings["dense"], timings[name]),
        "attended_pairs": attended,
        "block_pairs": block_plan(triangle(*geometry), grid, BLOCK, BLOCK).touched_pairs(),
        "causal_pairs": causal,
        "ideal_speedup": causal / attended,
        "error": error,
        "compile_s": first[name] - timings[name].median / 1e3,
        "dense_compile_s": first["dense"] - timings["dense"].median / 1e3,
    }


def _name(geometry: Geometry, lowering: str) -> str:
    return f"{geometry} {lowering}"


def _config(geometry: Geometry) -> TriangleMixConfig:
    sink, window, last = geometry
    return TriangleMixConfig(
        num_sink_tokens=sink,
        sliding_window_size=window,
        num_last_tokens=last,
        triangle_layer_indices=[0],
        min_seq_len=256,
    )


def _oracle(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Tensor:
    """Float64 attention (1, H, N, D): with the mask written out where it fits, else by the operator."""
    sink, window, last = geometry
    n = query.shape[2]
    query, key, value = query.double(), key.double(), value.double()
    if n > ORACLE_UP_TO:
        return triangle_attention(query, key, value, sink=sink, window=window, last=last)[0]
    row, column = torch.arange(n)[:, None], torch.arange(n)[None, :]
    attend = (column <= row) & ((column < sink) | (row - column <= window) | (row >= n - last))
    out = torch.empty_like(query)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        scores = query[0, head] @ key[0, group].T * HEAD_DIM**-0.5
        out[0, head] = torch.softmax(scores.masked_fill_(~attend, float("-inf")), -1) @ value[0, group]
    return out


COLUMNS = (
    "dtype",
    "n",
    "geometry",
    "lowering",
    "ms",
    "ms_min",
    "ms_max",
    "dense_ms",
    "speedup",
    "ideal_speedup",
    "error",
    "compile_s",
)
CASE = Case("operator", "cpu_operator.json", measure, COLUMNS)
