"""A training step of eight layers in an 8B model's shape: half of them triangle layers, against all of them dense."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Case, Measured, Records, cold_compiles, device, free, note
from benchmarks.shapes import CAUSAL, MODELS, build, check_layers, lowerings, triangle
from tmx_compile import tmx_backend
from tmx_compile.bench.timing import describe, seconds
from tmx_compile.mask.geometry import Geometry

FULL: dict[str, Any] = {
    "lengths": (16384, 32768),
    "geometries": (None, (8, 512, 128), (4, 32, 64)),
    "layers": 8,
    "dtype": "bfloat16",
    "min_seq_len": 2048,
    "steps": 3,
}
QUICK: dict[str, Any] = {
    **FULL,
    "lengths": (320,),
    "geometries": (None, (4, 32, 64)),
    "layers": 2,
    "dtype": "float32",
    "min_seq_len": 256,
    "steps": 1,
}
COLUMNS = ("n", "geometry", "ms", "dense_ms", "speedup", "peak_gib", "lowerings", "failed")
TOLD = {
    "ms": "wall time of forward, backward and the end of the GPU's work, median of the steps after an untimed one",
    "dense_ms": "the same with F.scaled_dot_product_attention(is_causal=True) in every layer",
    "loss": "mean square of the last hidden states: no head, no optimizer, nothing checkpointed",
}


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    place = device()
    records: Records = []
    model: Any = build(MODELS["llama"], place, getattr(torch, plan["dtype"]), quick=quick, layers=plan["layers"])
    # The layers alone: logits of such a length would take more memory than all of them.
    body = model.model.train()
    with cold_compiles():
        for n in plan["lengths"]:
            for geometry in plan["geometries"]:
                note(f"training step: {n:,} tokens, {geometry or 'dense'}")
                records.append(_record(body, n, geometry, plan, place))
    for record in records:
        dense = next(x["ms"] for x in records if x["n"] == record["n"] and x["geometry"] is None)
        record["dense_ms"] = dense
        record["speedup"] = dense / record["ms"] if dense and record["ms"] else None
    settings = {**plan, "device": place.type, "triangle_layers": f"the deepest {plan['layers'] // 2}", "fields": TOLD}
    return Measured(settings, records)


def _record(
    body: nn.Module, n: int, geometry: tuple[int, int, int] | None, plan: dict[str, Any], place: torch.device
) -> dict[str, Any]:
    torch._dynamo.reset()
    free()
    layers = plan["layers"]
    wanted = range(layers // 2, layers)
    config: Any = body.config
    config._attn_implementation = CAUSAL if geometry is None else "sdpa"
    backend = None
    if geometry is not None:
        backend = tmx_backend(triangle(Geometry(*geometry), wanted, plan["min_seq_len"]), strict=True)
    compiled = torch.compile(body, backend=backend or "inductor", dynamic=False)
    ids = torch.randint(0, config.vocab_size, (1, n), generator=torch.Generator().manual_seed(n)).to(place)
    record: dict[str, Any] = {"n": n, "geometry": list(geometry) if geometry else None, "ms": None}
    try:
        run = _step(body, compiled, ids)
        run()
        check_layers(backend, wanted)
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)
        record["ms"] = 1e3 * statistics.median(seconds(run) for _ in range(plan["steps"]))
        if place.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(place) / 2**30
        record["lowerings"] = lowerings(backend)
    # A variant that fails says how, and the others are measured all the same.
    except Exception as error:
        record["failed"] = describe(error)
    return record


def _step(body: nn.Module, compiled: Any, ids: Tensor) -> Callable[[], None]:
    def run() -> None:
        body.zero_grad(set_to_none=True)
        hidden = compiled(input_ids=ids, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()

    return run


CASE = Case("training_step", "training_step.json", measure, COLUMNS, needs_cuda=True)
