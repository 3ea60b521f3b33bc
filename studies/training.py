"""One attention layer in training, forward and backward together: dense by its best SDPA backend against the triangle.

In an 8B model's shapes; the triangle through the whole backend, as a compiled model has it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Case, Measured, Records, cold_compiles, note
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.floor import attended_pairs, causal_pairs
from tmx_compile.bench.layer import MIN_SEQ_LEN, Model
from tmx_compile.bench.timing import Rounds, Timing, describe, interleaved_on
from tmx_compile.mask.geometry import Geometry

FULL: dict[str, Any] = {
    "lengths": (4096, 8192, 16384, 32768, 65536, 131072),
    "geometries": (Geometry(4, 32, 64), Geometry(8, 512, 128)),
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "rounds": Rounds(3.0, 5, 30),
}
QUICK: dict[str, Any] = {
    "lengths": (260,),
    "geometries": (Geometry(4, 32, 64),),
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "dtype": "float32",
    "rounds": Rounds(0.0, 1, 1),
}
LOWERING = "triton"
COLUMNS = (
    "n",
    "geometry",
    "lowering",
    "ms",
    "dense_ms",
    "dense_backend",
    "speedup",
    "forward_ms",
    "backward_ms",
    "error",
    "timed",
)
TOLD = {
    "ms": "forward and backward of the compiled layer, torch.autograd.grad of query, key and value, median",
    "dense_ms": "the same of F.scaled_dot_product_attention(is_causal=True) by its fastest backend",
    "forward_ms": "the operator's forward alone, with the log-sum-exp that the backward needs",
    "backward_ms": "the operator's backward alone",
    "error": "largest relative difference (norm over norm) of a gradient from the operator's plain PyTorch backward",
    "timed": "graph: time on the GPU of a CUDA graph of the call, second-level cache flushed before; call: of a plain "
    "call between events where it cannot be captured; wall: wall time, on a CPU",
}


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    device = common.device()
    left_out: dict[str, str] = {}
    records: Records = []
    with cold_compiles():
        for n in plan["lengths"]:
            note(f"training: {n:,} tokens")
            records += _at(n, plan, device, left_out)
    settings = {
        **{name: value for name, value in plan.items() if name != "rounds"},
        "geometries": [geometry.counts for geometry in plan["geometries"]],
        "device": device.type,
        "batch": 1,
        "budget_s": plan["rounds"].budget_s,
        "least_rounds": plan["rounds"].least,
        "most_rounds": plan["rounds"].most,
        "fields": TOLD,
        "left_out": left_out,
    }
    return Measured(settings, records)


def _at(n: int, plan: dict[str, Any], device: torch.device, left_out: dict[str, str]) -> Records:
    """The records of one length."""
    gc.collect()
    torch._dynamo.reset()
    query, key, value, grad_out = operands(n, plan, device)
    leaves = (query, key, value)
    runs: dict[Any, Callable[[], Any]] = {}
    for name, attempt in _dense(*leaves).items():
        try:
            runs["dense", name] = _checked(_both(attempt, leaves, grad_out))
        # A backend without a backward for these shapes: the others are the baseline.
        except Exception as error:
            left_out[f"dense {name}, n = {n}"] = describe(error)
    errors: dict[Any, float] = {}
    for geometry in plan["geometries"]:
        whole = _both(compiled_layer(leaves, geometry), leaves, grad_out)
        errors[geometry] = _error(whole(), leaves, grad_out, geometry)
        runs["both", geometry] = whole
        runs["forward", geometry], runs["backward", geometry] = stages(leaves, grad_out, geometry)
    timings = interleaved_on(device, runs, plan["rounds"])
    left_out |= {f"CUDA graph of {kind[0]} {kind[1]}, n = {n}": t.why for kind, t in timings.items() if t.why}
    dense = {name: timings[kind, name] for kind, name in timings if kind == "dense"}
    best = min(dense, key=lambda name: dense[name].median, default=None)
    return [_record(n, geometry, timings, errors[geometry], best) for geometry in plan["geometries"]]


def operands(n: int, plan: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key and value that want gradients, and the result's gradient, (1, heads, n, dim) each."""
    generator = torch.Generator(device).manual_seed(n)
    query, key, value, grad_out = (
        torch.randn(
            1, n, heads, plan["head_dim"], generator=generator, device=device, dtype=getattr(torch, plan["dtype"])
        ).transpose(1, 2)
        for heads in (plan["heads"], plan["kv_heads"], plan["kv_heads"], plan["heads"])
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad_out


def _dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense attention by the backends that take grouped queries: flash and cuDNN on CUDA."""
    found, _ = dense_variants(query, key, value)
    return {name: run for name, run in found.items() if name in ("flash", "cudnn")}


def _both(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad_out: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), leaves, grad_out)


def _checked(run: Callable[[], Any]) -> Callable[[], Any]:
    run()
    return run


def compiled_layer(leaves: tuple[Tensor, ...], geometry: Geometry) -> Callable[[], Tensor]:
    """The layer with the triangle, compiled for this length."""
    config = TriangleMixConfig(*geometry.counts, triangle_layer_indices=[0], min_seq_len=MIN_SEQ_LEN)
    backend = tmx_backend(config, lowering=LOWERING, strict=True)
    layer = torch.compile(Model(), backend=backend, dynamic=False)
    return lambda: layer(*leaves)


def stages(
    leaves: tuple[Tensor, ...], grad_out: Tensor, geometry: Geometry
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The operator's forward and its backward, each alone."""
    inputs = [x.detach() for x in leaves]
    scale = inputs[0].shape[3] ** -0.5
    saved = torch.ops.tmx.triangle_attention_triton_training(*inputs, None, None, *geometry.counts, scale)

    def forward() -> Any:
        return torch.ops.tmx.triangle_attention_triton_training(*inputs, None, None, *geometry.counts, scale)

    def backward() -> Any:
        return torch.ops.tmx.triangle_attention_triton_backward(
            grad_out, None, *inputs, None, None, *saved, *geometry.counts, scale
        )

    return forward, backward


def _error(got: Any, leaves: tuple[Tensor, ...], grad_out: Tensor, geometry: Geometry) -> float:
    """How far the gradients are from those of the operator in plain PyTorch."""
    inputs = [x.detach() for x in leaves]
    scale = inputs[0].shape[3] ** -0.5
    out, _ = torch.ops.tmx.triangle_attention(*inputs, None, *geometry.counts, scale)
    want = torch.ops.tmx.triangle_attention_backward(grad_out, None, *inputs, None, out, *geometry.counts, scale)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True))


def _record(n: int, geometry: Geometry, timings: dict[Any, Timing], error: float, best: str | None) -> dict[str, Any]:
    both = timings["both", geometry]
    dense_ms = None if best is None else timings["dense", best].median
    return {
        "n": n,
        "geometry": list(geometry.counts),
        "lowering": LOWERING,
        **both.fields(),
        "dense_ms": dense_ms,
        "dense_backend": best,
        "speedup": None if dense_ms is None else dense_ms / both.median,
        "ideal_speedup": causal_pairs(n) / attended_pairs(n, geometry),
        "forward_ms": timings["forward", geometry].median,
        "backward_ms": timings["backward", geometry].median,
        "error": error,
        "timed": both.how,
    }


CASE = Case("training", "training.json", measure, COLUMNS, needs_cuda=True, quick_anywhere=False)
