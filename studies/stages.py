"""Where the GPU kernel's time goes: one call with a stage removed, and with the last rows in a launch of their own.

Small windows are furthest from the floor, so that the stages are told for those and for the paper's serving geometry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Case, Measured
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import Ceilings, Shape, attended_pairs, causal_pairs, copy_rate
from tmx_compile.bench.timing import Rounds, interleaved_on
from tmx_compile.mask.geometry import Geometry

LENGTHS = (32768, 131072)
GEOMETRIES = (Geometry(4, 32, 64), Geometry(8, 512, 128))
HEADS, KV_HEADS, DIM = 32, 8, 128
COLUMNS = ("n", "geometry", "variant", "ms", "over_floor", "of_whole")

TOLD = {
    "whole": "the lowering as it is",
    "without last rows": "last = 0: only the streaming tiles",
    "one key a row": "no sinks, a window of 0, no last rows: reading queries, writing results, starting tiles",
    "last rows alone": "as many queries as there are last rows, against all keys",
    "last rows alone, hopper": "the same by the Hopper kernel",
    "apart": "streaming tiles, then last rows by the Hopper kernel, one stream",
    "apart, two streams": "the same at once, on two streams",
    "hopper": "everything by the Hopper kernel",
    "general": "everything by the general kernel, tiles of 64 rows",
    "general, 128 rows": "everything by the general kernel, tiles of 128 rows",
    "copy": "copying query to a result: the bytes of query and result alone",
}


def measure(quick: bool) -> Measured:
    device = common.device()
    rounds = Rounds(0.1, 2, 3) if quick else Rounds(3.0, 7, 30)
    lengths = (640,) if quick else LENGTHS
    dtype = torch.bfloat16
    copied = copy_rate(device)
    found: list[tuple[int, Any, dict[str, Any]]] = []
    flops = 0.0
    for n in lengths:
        query, key, value = _operands(n, device, dtype)
        shape = Shape(n, 1, HEADS, KV_HEADS, DIM, 2)
        dense = interleaved_on(device, dense_variants(query, key, value)[0], rounds)
        best = min(t.median for t in dense.values())
        flops = shape.flops(causal_pairs(n)) / best * 1e3
        for geometry in GEOMETRIES:
            times = interleaved_on(device, variants(query, key, value, geometry), rounds)
            found.append((n, geometry, times))
    ceilings = Ceilings(copied, flops)
    records = []
    for n, geometry, times in found:
        floor, floor_by = ceilings.floor(Shape(n, 1, HEADS, KV_HEADS, DIM, 2), geometry)
        for name, timing in times.items():
            records.append(
                {
                    "n": n,
                    "geometry": list(geometry.counts),
                    "lowering": "triton",
                    "variant": name,
                    **timing.fields(),
                    "floor_ms": floor,
                    "floor_by": floor_by,
                    "over_floor": timing.median / floor,
                    "of_whole": timing.median / times["whole"].median,
                    "attended_pairs": attended_pairs(n, geometry),
                    "timed": timing.how,
                }
            )
    settings = {
        "device": device.type,
        "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "dtype": "bfloat16", "lengths": list(lengths),
        "variants": TOLD, "copy_bytes_per_s": copied, "dense_flops_per_s": flops,
    }  # fmt: skip
    return Measured(settings, records)


def _operands(n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(n)
    shapes = [(1, n, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (
        torch.randn(s, generator=generator, device=device, dtype=dtype).transpose(1, 2) for s in shapes
    )
    return query, key, value


def variants(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> dict[str, Callable[[], Any]]:
    """What to time, by the names of :data:`TOLD`; the Hopper kernel's only where it can run."""
    from tmx_compile.lowering.triton import launch, tuning
    from tmx_compile.lowering.triton.prepared import kind

    scale = DIM**-0.5
    rows = query[:, :, -geometry.last :]

    def general(q: Tensor, within: Geometry, shapes: tuning.Tuning | None = None) -> Callable[[], Any]:
        return lambda: launch.attend(q, key, value, None, None, within, scale, shapes=shapes)

    found: dict[str, Callable[[], Any]] = {
        "whole": general(query, geometry),
        "without last rows": general(query, replace(geometry, last=0)),
        "one key a row": general(query, Geometry(0, 0, 0)),
        "last rows alone": general(rows, geometry),
        "general": general(query, geometry, tuning.SMALL),
        "general, 128 rows": general(query, geometry, tuning.LARGE),
        "copy": lambda: query.clone(),
    }
    hopper = launch.HOPPER
    if hopper is not None and hopper.takes(kind(query), kind(key), kind(value)):
        streaming = found["without last rows"]
        whole, last = (
            hopper.forward(kind(x), kind(key), kind(value), None, geometry, scale, None) for x in (query, rows)
        )

        def alone() -> Any:
            return last(rows, key, value, None, None)

        def apart() -> Any:
            return streaming(), alone()

        side = torch.cuda.Stream()

        def two_streams() -> Any:
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                beside = alone()
            out = streaming()
            here.wait_stream(side)
            return out, beside

        found["hopper"] = lambda: whole(query, key, value, None, None)
        found["last rows alone, hopper"] = alone
        found["apart"] = apart
        found["apart, two streams"] = two_streams
    return found


CASE = Case("stages", "stages.json", measure, COLUMNS, needs_cuda=True, quick_anywhere=False)
