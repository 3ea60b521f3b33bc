"""Attention of one layer in bfloat16 on a CPU with AMX: vLLM's own kernel, dense SDPA and the triangle, in turns.

    VLLM_CPU_LIBRARY=FOLDER/_C.abi3.so python -m studies.run amx_vllm

The kernel is called without vLLM, from the library of vLLM's CPU build. That fits the PyTorch that it was built for:
the one of ``vllm-cpu`` 0.26.0 fits torch 2.11, of 0.32.0 torch 2.13. It needs libnuma. The result file has the name of
its folder, which should therefore tell its version. Without the library nothing is measured, nor in the quick form.

Forms: ``whole``, the triangle as this package computes it, eagerly. The others are for a prompt of vLLM in one step,
where last rows are its kernel's, from its pages: ``plugin``, streaming rows by this package; ``pages``, these too by
vLLM's kernel, from pages of their own, which are written in that time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, free, note
from studies import amx
from tmx_compile.bench import reference
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Shape, causal_pairs, copy_rate
from tmx_compile.bench.timing import Rounds, interleaved_on, seconds
from tmx_compile.integrations.vllm.pages import stream
from tmx_compile.lowering.chunk import Part
from tmx_compile.lowering.scoring import Scoring
from tmx_compile.lowering.table import BLOCKED
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

LIBRARY = "VLLM_CPU_LIBRARY"
"""The environment variable with the path of the library, ``vllm/_C.abi3.so`` of an installed ``vllm-cpu``."""
CPU = torch.device("cpu")
BLOCK = 128  # tokens of a block, vLLM's default on a CPU
FORMS = ("whole", "plugin", "pages")
DENSE = Geometry(0, 0, ALL_ROWS)
GEOMETRIES = (*amx.GEOMETRIES, Geometry(8, 256, 128))
FULL: dict[str, Any] = amx.FULL | {"lengths": [6000, 16384, 3000, 2048]}
QUICK: dict[str, Any] = FULL | {"lengths": [700], "matmul": 256, "rounds": [0.0, 1, 1]}
_SAMPLED_ROWS = 64
_MOST_OFF = 0.05
_BLOCKS: dict[str, Any] = {"k_scale": 1.0, "v_scale": 1.0, "kv_cache_dtype": "auto"}

TOLD = {name: amx.TOLD[name] for name in ("floor_ms", "matmul_flops_per_s", "keys_over_mask")} | {
    "vllm_ms": "vLLM's kernel, dense, from pages that hold keys and values already",
    "sdpa_ms": "F.scaled_dot_product_attention(is_causal=True)",
    "dense_ms": "the smaller of both, of dense_backend",
    "speedup": "dense_ms / ms",
    "window_ms": "vLLM's kernel with the window alone, no sinks and no last rows: what a kernel takes for such work",
    "cache_ms": "writing keys and values to the pages, the least of three; in no other time",
    "plan_ms": "vLLM's plan of a step, made once for all layers, the least of three; in no other time",
    "error, vllm_error, sdpa_error, window_error": "largest difference of sampled rows from float64",
    "vllm_of_matmul": "the rate of vLLM's kernel over that of matmul",
    "dense_of_matmul": "likewise, of dense_ms",
}


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    return list(amx.SHAPES)


def settings(quick: bool) -> dict[str, Any]:
    """Raises ValueError where there is no library."""
    library = _library()
    return {
        **_plan(quick),
        "device": "cpu",
        "batch": 1,
        "shapes": {name: list(shape) for name, shape in amx.SHAPES.items()},
        "geometries": [list(x.counts) for x in GEOMETRIES],
        "library": "/".join(library.parts[-2:]),
        "library_bytes": library.stat().st_size,
        "isa": isa_here(),
        "block": BLOCK,
        "fields": TOLD,
        "timing": "wall time of a call on all threads; all in turns",
    }


def _library() -> Path:
    named = os.environ.get(LIBRARY, "")
    if not named:
        raise ValueError(f"amx_vllm needs {LIBRARY}, the path of vllm/_C.abi3.so of vLLM's CPU build")
    path = Path(named).absolute()
    if not path.is_file():
        raise ValueError(f"{LIBRARY}={named!r} is no file")
    return path


def isa_here() -> str:
    """Which of its kernels vLLM takes on this x86, for bfloat16 and blocks of 128 tokens."""
    return "amx" if amx.has_amx() else "vec"


def load() -> Any:
    """The operators of vLLM's library.

    Raises:
        ValueError: no library is named, or it does not fit this PyTorch.
    """
    library = _library()
    try:
        torch.ops.load_library(library)
    except OSError as error:
        why = error.__cause__ or error
        raise ValueError(f"{LIBRARY}={str(library)!r} does not load with torch {torch.__version__}: {why}") from error
    if amx.has_amx():
        # The system's leave to use tiles, which other threads inherit.
        torch.cpu._init_amx()
    return torch.ops._C


class Pages:
    """One layer's tensors as vLLM's projections leave them, and its keys and values in vLLM's pages.

    Args:
        kernels: vLLM's operators.
        query: (n, H, D).
        key: (n, Hkv, D).
        value: like ``key``.
        isa: which of vLLM's kernels.
    """

    def __init__(self, kernels: Any, query: Tensor, key: Tensor, value: Tensor, isa: str) -> None:
        self.kernels, self.query, self.key, self.value, self.isa = kernels, query, key, value, isa
        self.n = query.shape[0]
        self.out = torch.empty_like(query)
        blocks = -(-self.n // BLOCK)
        self.table = torch.randperm(blocks, dtype=torch.int32, generator=torch.Generator().manual_seed(self.n))[None]
        cache = torch.zeros(blocks, key.shape[1], 2 * BLOCK, key.shape[2], dtype=key.dtype)
        self.halves = cache.chunk(2, dim=2)
        place = torch.arange(self.n)
        self.slots = self.table[0].long()[place // BLOCK] * BLOCK + place % BLOCK

    def write(self) -> None:
        """Put keys and values into the pages."""
        self.kernels.cpu_attn_reshape_and_cache(
            self.key, self.value, *self.halves, self.slots, self.isa, *_BLOCKS.values()
        )

    def plan(self, rows: int, window: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """What the kernel asks for the last ``rows`` rows: where they start, how long the prompt is, its own plan."""
        starts, lengths = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([self.n], dtype=torch.int32)
        _, heads, dim = self.query.shape
        plan = self.kernels.get_scheduler_metadata(
            1, heads, self.key.shape[1], dim, lengths, self.query.dtype, starts, True, window, self.isa, True, None
        )
        return starts, lengths, plan

    def attend(self, rows: int, plan: tuple[Tensor, Tensor, Tensor], window: int = -1) -> Tensor:
        """The last ``rows`` rows by vLLM, over all keys or ``window`` of them; returns the output (1, H, n, D)."""
        starts, lengths, made = plan
        last = slice(self.n - rows, self.n)
        self.kernels.cpu_attention_with_kv_cache(
            self.query[last], *self.halves, self.out[last], starts, lengths, self.query.shape[2] ** -0.5, True, None,
            window, self.table, 0.0, made, None, None, *_BLOCKS.values(),
        )  # fmt: skip
        return self.out.transpose(0, 1)[None]

    def triangle(self, geometry: Geometry, plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Streaming rows by the kernel too; ``plan`` is that of the last rows."""
        rows = slice(0, self.n - geometry.last)
        q, k, v, out = (x[rows] for x in (self.query, self.key, self.value, self.out))
        stream(self.kernels, q, k, v, geometry, self.query.shape[2] ** -0.5, self.isa, out)
        return self.attend(geometry.last, plan)

    def blocked(self, geometry: Geometry, plan: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Streaming rows by this package; ``plan`` is that of the last rows."""
        rows = slice(0, self.n - geometry.last)
        q, k, v, out = (x[rows].transpose(0, 1)[None] for x in (self.query, self.key, self.value, self.out))
        scale = self.query.shape[2] ** -0.5
        out.copy_(Part(replace(geometry, last=0), Scoring(scale), BLOCKED.name).attend(q, k, v, None, 0))
        return self.attend(geometry.last, plan)


def measure(part: str, quick: bool) -> Records:
    """The records of one shape.

    Raises:
        RuntimeError: a CPU without AMX, unless quick; or vLLM's kernel computed something else than dense attention.
        ValueError: no library.
    """
    if not (quick or amx.has_amx()):
        raise RuntimeError("amx_vllm needs a CPU with AMX, and this one has none")
    return compared(load(), part, _plan(quick))


def compared(kernels: Any, name: str, plan: dict[str, Any]) -> Records:
    """The records of a shape, with vLLM's operators."""
    heads, kv_heads, dim = amx.SHAPES[name]
    rates = {"copy_bytes_per_s": copy_rate(CPU), "matmul_flops_per_s": amx.matmul_rate(plan["matmul"], plan["dtype"])}
    records: Records = []
    for n in plan["lengths"]:
        free()
        made = torch.Generator().manual_seed(n)
        tokens = [
            torch.randn(n, count, dim, generator=made).to(getattr(torch, plan["dtype"]))
            for count in (heads, kv_heads, kv_heads)
        ]
        qkv = [x.transpose(0, 1)[None] for x in tokens]
        pages = Pages(kernels, *tokens, isa_here())
        once = {
            "cache_ms": 1e3 * min(seconds(pages.write) for _ in range(3)),
            "plan_ms": 1e3 * min(seconds(partial(pages.plan, n)) for _ in range(3)),
        }
        runs: dict[Any, Callable[[], Tensor]] = {"vllm": partial(pages.attend, n, pages.plan(n))}
        runs["sdpa"] = dense_variants(*qkv)[0]["flash"]
        for geometry in GEOMETRIES:
            runs["whole", geometry] = partial(amx.eagerly, geometry, *qkv)
            last = pages.plan(geometry.last)
            runs["plugin", geometry] = partial(pages.blocked, geometry, last)
            runs["pages", geometry] = partial(pages.triangle, geometry, last)
            # vLLM counts the row's own key.
            keys = geometry.window + 1
            runs["window", band(geometry)] = partial(pages.attend, n, pages.plan(n, keys), keys)
        errors = _errors(runs, qkv, n)
        if not errors["vllm"] <= _MOST_OFF:
            raise RuntimeError(f"amx_vllm: vLLM's kernel is off dense attention by {errors['vllm']:.3g}, {n} tokens")
        timings = interleaved_on(CPU, runs, Rounds(*plan["rounds"]))
        dense_ms = {backend: timings[backend].median for backend in ("vllm", "sdpa")}
        best = min(dense_ms, key=dense_ms.__getitem__)
        note(f"amx_vllm: {name}, {n:,} tokens: vLLM {dense_ms['vllm']:.1f} ms, SDPA {dense_ms['sdpa']:.1f} ms")
        records += [
            {
                "form": form,
                "shape": name,
                "heads": [heads, kv_heads, dim],
                "n": n,
                "geometry": list(geometry.counts),
                "lowering": "vllm" if form == "pages" else BLOCKED.name,
                **timings[form, geometry].fields(),
                "dense_ms": dense_ms[best],
                "dense_backend": best,
                "vllm_ms": dense_ms["vllm"],
                "vllm_ms_min": timings["vllm"].min,
                "sdpa_ms": dense_ms["sdpa"],
                "window_ms": timings["window", band(geometry)].median,
                **once,
                **rates,
                "error": errors[form, geometry],
                "vllm_error": errors["vllm"],
                "sdpa_error": errors["sdpa"],
                "window_error": errors["window", band(geometry)],
            }
            for geometry in GEOMETRIES
            for form in FORMS
        ]
    return records


def band(geometry: Geometry) -> Geometry:
    """The window alone."""
    return Geometry(0, geometry.window, 0)


def _errors(runs: dict[Any, Callable[[], Tensor]], qkv: list[Tensor], n: int) -> dict[Any, float]:
    rows = reference.sampled_rows(n, list(GEOMETRIES), _SAMPLED_ROWS, CPU)
    of = {what: what[1] if isinstance(what, tuple) else DENSE for what in runs}
    want = {geometry: reference.attention_rows(*qkv, rows, geometry) for geometry in set(of.values())}
    return {what: reference.largest_error(run(), rows, want[of[what]]) for what, run in runs.items()}


def finish(records: Records) -> None:
    """The floor, as in :func:`studies.amx.finish`, and what rate vLLM's kernel reaches."""
    amx.finish(records)
    multiplied = max((r["matmul_flops_per_s"] for r in records), default=0.0)
    for r in records:
        computed = Shape(r["n"], 1, *r["heads"], 2).flops(causal_pairs(r["n"]))
        r["vllm_of_matmul"] = computed / r["vllm_ms"] * 1e3 / multiplied


COLUMNS = (
    *(
        "form",
        "shape",
        "n",
        "geometry",
        "lowering",
        "ms",
        "vllm_ms",
        "sdpa_ms",
        "dense_backend",
        "speedup",
        "window_ms",
    ),
    *("floor_ms", "over_floor", "vllm_of_matmul", "keys_over_mask", "cache_ms", "plan_ms", "error", "vllm_error"),
)
CASE = Case(
    "amx_vllm", "operator_cpu_amx_vllm.json", None, COLUMNS, Parts(names, settings, measure, finish), on_request=True
)
