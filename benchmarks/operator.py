"""One attention layer: dense causal SDPA against each lowering, through the whole backend.

On a CPU in SmolLM2-135M's shapes, on CUDA in those of an 8B model.
"""

from __future__ import annotations

from typing import Any

from benchmarks.common import Case, Measured, cold_compiles, device, note
from benchmarks.peers import peers
from tmx_compile.bench import layer
from tmx_compile.bench.timing import Rounds
from tmx_compile.mask.geometry import Geometry

CPU: dict[str, Any] = {
    "device": "cpu",
    "lengths": (4096, 8192, 16384),
    "geometries": (Geometry(4, 32, 64), Geometry(8, 512, 128)),
    "dtypes": ("float32", "bfloat16"),
    "heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
    "rounds": Rounds(6.0, 5, 11),
}
CUDA: dict[str, Any] = {
    "device": "cuda",
    "lengths": (4096, 32768, 131072),
    "geometries": (Geometry(4, 32, 64), Geometry(8, 512, 128), Geometry(64, 1024, 128)),
    "dtypes": ("bfloat16",),
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dynamic": True,
    "all_rows_up_to": 32768,
    "rounds": Rounds(4.0, 7, 30),
}
QUICK: dict[str, Any] = {"lengths": (320,), "geometries": (Geometry(4, 32, 64),), "rounds": Rounds(0.0, 2, 2)}


def plan(quick: bool, device: str) -> layer.Plan:
    """What is measured on a device."""
    settings = CUDA if device == "cuda" else CPU
    if quick:
        settings = {**settings, **QUICK, "dtypes": settings["dtypes"][:1]}
    return layer.Plan(**settings)


def measure(quick: bool) -> Measured:
    with cold_compiles():
        return layer.measure(plan(quick, device().type), peers(), note)


def file() -> str:
    return f"operator_{device().type}.json"


CASE = Case("operator", file, measure, layer.COLUMNS)
