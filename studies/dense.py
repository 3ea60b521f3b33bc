"""The layers that stay dense, on a GPU: FlashAttention-4 and our own kernel against the best SDPA backend, with a mask.

The mask of a prompt without padding must cost nothing: a key mask tensor is there, and every key is valid.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Case, Measured, Records, note
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.timing import Rounds, describe, interleaved_on
from tmx_compile.lowering.base import AttentionCall, Lowering, immediate
from tmx_compile.lowering.table import FA4, TRITON
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import ALL_ROWS
from tmx_compile.report import Rejected

FULL: dict[str, Any] = {
    "lengths": (2048, 4096, 8192, 32768, 131072),
    "head_dims": (64, 128),
    "heads": 32,
    "kv_heads": 8,
    "dtype": "bfloat16",
    "rounds": Rounds(1.0, 5, 30),
}
QUICK: dict[str, Any] = {**FULL, "lengths": (300,), "rounds": Rounds(0.0, 1, 1)}
# Hidden keys at the start, as a share of the prompt; None: no mask at all.
PADDING = {"no mask": None, "a mask, nothing padded": 0.0, "a fifth padded": 0.2}
COLUMNS = ("n", "head_dim", "padding", "lowering", "ms", "dense_ms", "dense_backend", "over_dense", "error")
TOLD = {
    "ms": "one call of the lowering in inference, with what it makes of the mask, median",
    "dense_ms": "F.scaled_dot_product_attention(is_causal=True) without a mask by its fastest backend",
    "over_dense": "ms / dense_ms",
    "error": "largest difference from the fastest SDPA backend in the valid rows, without padding",
}


def measure(quick: bool) -> Measured:
    plan = QUICK if quick else FULL
    device = common.device()
    left_out: dict[str, str] = {}
    records: Records = []
    for head_dim in plan["head_dims"]:
        for n in plan["lengths"]:
            note(f"dense: {n:,} tokens, head dim {head_dim}")
            records += _at(n, head_dim, plan, device, left_out)
    settings = {
        **{name: value for name, value in plan.items() if name != "rounds"},
        "device": device.type,
        "batch": 1,
        "budget_s": plan["rounds"].budget_s,
        "fields": TOLD,
        "left_out": left_out,
    }
    return Measured(settings, records)


def _at(n: int, head_dim: int, plan: dict[str, Any], device: torch.device, left_out: dict[str, str]) -> Records:
    """The records of one length and head dim, timed in turns."""
    gc.collect()
    query, key, value = (
        torch.randn(1, n, heads, head_dim, device=device, dtype=getattr(torch, plan["dtype"])).transpose(1, 2)
        for heads in (plan["heads"], plan["kv_heads"], plan["kv_heads"])
    )
    found, _ = dense_variants(query, key, value)
    runs: dict[Any, Callable[[], Any]] = {("sdpa", name): run for name, run in found.items()}
    want = next(iter(found.values()))()
    errors: dict[Any, float | None] = {}
    for padding, share in PADDING.items():
        key_mask = None if share is None else (torch.arange(n, device=device) >= int(share * n))[None]
        for lowering in (FA4, TRITON):
            run = _run(lowering, query, key, value, key_mask)
            if isinstance(run, Rejected):
                left_out[lowering.name] = run.detail
                continue
            try:
                got = run()
            except Exception as error:
                left_out[f"{lowering.name}, {padding}, n = {n}, head dim {head_dim}"] = describe(error)
                continue
            errors[lowering.name, padding] = None if share else float((got - want).abs().max())
            runs[lowering.name, padding] = run
    timings = interleaved_on(device, runs, plan["rounds"])
    dense = {name: timings[kind, name].median for kind, name in runs if kind == "sdpa"}
    best = min(dense, key=lambda name: dense[name])
    return [
        {
            "n": n,
            "head_dim": head_dim,
            "padding": padding,
            "lowering": name,
            **timings[name, padding].fields(),
            "dense_ms": dense[best],
            "dense_backend": best,
            "over_dense": timings[name, padding].median / dense[best],
            "error": error,
            "timed": timings[name, padding].how,
        }
        for (name, padding), error in errors.items()
    ]


def _run(
    lowering: Lowering, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> Callable[[], Tensor] | Rejected:
    scale = query.shape[3] ** -0.5
    call = AttentionCall(query, key, value, key_mask, Geometry(0, 0, ALL_ROWS), scale, needs_grad=False)
    answer = lowering.supports(call)
    return answer if isinstance(answer, Rejected) else lambda: immediate(lowering, call)


CASE = Case("dense", "dense.json", measure, COLUMNS, needs_cuda=True, quick_anywhere=False)
