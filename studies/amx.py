"""One triangle layer in bfloat16 on a CPU that multiplies by AMX, against dense SDPA and what the machine allows.

There dense attention is several times faster than without, so that it has to be shown that the triangle still pays.
Parts by form: ``eager``, the lowering's own calls one by one, as where nothing compiles; ``compiled``, by Inductor, by
whatever ``auto`` picks; ``flex``, by Inductor's template; ``avx512``, as ``eager`` without AMX, to show what it gives.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.account import account
from benchmarks.common import Case, Parts, Records, free, note
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench import reference
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Ceilings, Shape, attended_pairs, causal_pairs, copy_rate
from tmx_compile.bench.layer import Model, Plan, auto_lowering
from tmx_compile.bench.timing import Rounds, interleaved_on, seconds
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.blocked import rows_per_block
from tmx_compile.lowering.table import BLOCKED
from tmx_compile.mask.geometry import Geometry

CPU = torch.device("cpu")
GEOMETRIES = (Geometry(8, 512, 128), Geometry(4, 32, 64))
# Heads, key heads, head dim.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3.1-8B": (32, 8, 128)}
FULL: dict[str, Any] = {
    # The shorter one is the prompt of docs/vllm.md that lost to vLLM's own kernel.
    "lengths": [6000, 16384],
    "dtype": "bfloat16",
    "min_seq_len": 2048,
    "matmul": 4096,
    "rounds": [2.0, 3, 15],
}
QUICK: dict[str, Any] = FULL | {"lengths": [700], "min_seq_len": 256, "matmul": 256, "rounds": [0.0, 1, 1]}
_SAMPLED_ROWS = 64
WITHOUT_AMX = ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
"""Has to be in the environment of the parts ``avx512``: oneDNN reads it once."""

TOLD = {
    "floor_ms": "the larger of bytes / copy_bytes_per_s and attended pairs x 4 x heads x head_dim / matmul_flops_per_s",
    "matmul_flops_per_s": "torch.matmul of two square bfloat16 matrices, the best of ten, of all parts",
    "dense_of_matmul": "the rate of F.scaled_dot_product_attention(is_causal=True) over that of matmul",
    "keys_over_mask": "keys that blocked's blocks of streaming rows hold, over those that the rows attend to",
    "account": "milliseconds of operators in one further call, by torch.profiler: SDPA (attention), copies and masks",
    "rate_of_dense": "eager: pairs in all blocks a second within SDPA, over those of dense attention",
    "compile_s": "the first call, Inductor's compiles included",
    "auto": "the lowering that 'auto' picks on this machine",
}


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    # What needs no compile first: a C++ compile takes minutes on some machines.
    return [f"{form}/{name}" for form in ("eager", "compiled", "flex", "avx512") for name in SHAPES]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "device": "cpu",
        "batch": 1,
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "geometries": [list(x.counts) for x in GEOMETRIES],
        "fields": TOLD,
        "timing": "wall time of a call on all threads; dense and triangle in turns",
        "not_measured": "vLLM's own attention kernel",
    }


def has_amx() -> bool:
    """Whether this CPU multiplies tiles."""
    return bool(torch.cpu._is_amx_tile_supported())


def measure(part: str, quick: bool) -> Records:
    """The records of one form and shape.

    Raises:
        RuntimeError: a CPU without AMX, unless quick.
    """
    if not (quick or has_amx()):
        raise RuntimeError("amx needs a CPU with AMX, and this one has none")
    form, _, name = part.partition("/")
    variable, isa = WITHOUT_AMX
    if not quick and (os.environ.get(variable) == isa) != (form == "avx512"):
        raise RuntimeError(f"parts 'avx512' need {variable}={isa} in the environment, and no other part may have it")
    plan = _plan(quick)
    heads, kv_heads, dim = SHAPES[name]
    rates = {"copy_bytes_per_s": copy_rate(CPU), "matmul_flops_per_s": matmul_rate(plan["matmul"], plan["dtype"])}
    torch._dynamo.reset()
    layers = {geometry: _layer(form, geometry, plan) for geometry in GEOMETRIES}
    records: Records = []
    for n in plan["lengths"]:
        free()
        qkv = [
            torch.randn(1, n, count, dim, generator=torch.Generator().manual_seed(n)).transpose(1, 2)
            for count in (heads, kv_heads, kv_heads)
        ]
        qkv = [x.to(getattr(torch, plan["dtype"])) for x in qkv]
        for x in qkv:
            # One compile for all lengths, as a model has it.
            torch._dynamo.maybe_mark_dynamic(x, 2)
        shape = Shape(n, 1, heads, kv_heads, dim, qkv[0].element_size())
        runs: dict[Any, Callable[[], Tensor]] = dict(dense_variants(*qkv)[0])
        dense = list(runs)
        rows = reference.sampled_rows(n, list(GEOMETRIES), _SAMPLED_ROWS, CPU)
        first, errors = {}, {}
        for geometry, layer in layers.items():
            runs[geometry] = partial(_without_gradients, layer, *qkv)
            first[geometry] = seconds(runs[geometry])
            want = reference.attention_rows(*qkv, rows, geometry)
            errors[geometry] = reference.largest_error(runs[geometry](), rows, want)
            note(f"amx: {part}, {n:,} tokens, {geometry}: first call {first[geometry]:.1f} s")
        timings = interleaved_on(CPU, runs, Rounds(*plan["rounds"]))
        best = min(dense, key=lambda backend: timings[backend].median)
        for geometry in layers:
            found = account(runs[geometry], CPU)
            records.append(
                {
                    "form": form,
                    "shape": name,
                    "heads": [heads, kv_heads, dim],
                    "n": n,
                    "geometry": list(geometry.counts),
                    "lowering": "flex" if form == "flex" else "blocked",
                    "auto": auto_lowering(
                        Plan("cpu", (n,), (geometry,), (plan["dtype"],), heads, kv_heads, dim),
                        n, plan["dtype"], geometry,
                    ),
                    **timings[geometry].fields(),
                    "dense_ms": timings[best].median,
                    "dense_backend": best,
                    **rates,
                    "compile_s": first[geometry] if form in ("compiled", "flex") else None,
                    "error": errors[geometry],
                    "account": found,
                    "rate_of_dense": _rate_of_dense(shape, geometry, found, timings[best].median)
                    if form in ("eager", "avx512")
                    else None,
                }
            )  # fmt: skip
    return records


def matmul_rate(size: int, dtype: str) -> float:
    """Multiplications and additions a second of the best of ten square products."""
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(11):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _layer(form: str, geometry: Geometry, plan: dict[str, Any]) -> Callable[..., Tensor]:
    if form in ("eager", "avx512"):
        return partial(eagerly, geometry)
    config = TriangleMixConfig(*geometry.counts, triangle_layer_indices=[0], min_seq_len=plan["min_seq_len"] // 2)
    backend = tmx_backend(config, lowering="flex" if form == "flex" else "auto", strict=True)
    compiled: Callable[..., Tensor] = torch.compile(Model(), backend=backend)
    return compiled


def eagerly(geometry: Geometry, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The triangle by ``blocked``, call by call."""
    call = AttentionCall(query, key, value, None, geometry, query.shape[3] ** -0.5, needs_grad=False)
    return immediate(BLOCKED, call)


def _without_gradients(layer: Callable[..., Tensor], *qkv: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(*qkv)


def _pairs(n: int, geometry: Geometry) -> tuple[int, int, int]:
    """(row, key) pairs of one head: in blocks of streaming rows, attended to by these, of last rows with all keys."""
    size, streaming = rows_per_block(geometry.window), n - geometry.last
    held = streaming * ((-(-geometry.window // size) + 1) * size + geometry.sink)
    return held, attended_pairs(streaming, Geometry(geometry.sink, geometry.window, 0)), geometry.last * n


def _rate_of_dense(shape: Shape, geometry: Geometry, found: dict[str, Any], dense_ms: float) -> float:
    held, _, last = _pairs(shape.n, geometry)
    dense_rate = shape.flops(causal_pairs(shape.n)) / dense_ms
    return shape.flops(held + last) / float(found["attention_ms"]) / dense_rate


def finish(records: Records) -> None:
    """The floor by the best rates of all records, those without AMX apart, and what lies between it and the times."""
    for r in records:
        alike = [x for x in records if (x["form"] == "avx512") == (r["form"] == "avx512")]
        copied, multiplied = (max(x[rate] for x in alike) for rate in ("copy_bytes_per_s", "matmul_flops_per_s"))
        geometry, shape = Geometry(*r["geometry"]), Shape(r["n"], 1, *r["heads"], 2)
        held, attended, _ = _pairs(r["n"], geometry)
        r["floor_ms"], r["floor_by"] = Ceilings(copied, multiplied).floor(shape, geometry)
        r["over_floor"] = r["ms"] / r["floor_ms"]
        r["speedup"] = r["dense_ms"] / r["ms"]
        r["dense_of_matmul"] = shape.flops(causal_pairs(r["n"])) / r["dense_ms"] * 1e3 / multiplied
        r["keys_over_mask"] = held / attended


COLUMNS = (
    *("form", "shape", "n", "geometry", "lowering", "auto", "ms", "dense_ms", "speedup", "floor_ms", "over_floor"),
    *("dense_of_matmul", "keys_over_mask", "rate_of_dense", "error", "compile_s"),
)
CASE = Case("amx", "operator_cpu_amx.json", None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
