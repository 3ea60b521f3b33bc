"""One layer of block-sparse attention at fixed densities: choosing blocks, attending to them, against dense attention.

Random tensors have no structure that a selection could find, so the lists are drawn: of a row of blocks the first
block, the row's own and the one before, and others at random, up to the density; the last row of blocks visits all. The
selection is timed apart, on the same tensors, and added. Which densities keep a model's quality is what
``python -m studies.run stacked`` measures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, free, note
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.timing import describe, interleaved
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists
from tmx_compile.operator.dynamic import attend as plain_attend

FULL: dict[str, Any] = {
    "lengths": (32768, 131072),
    "densities": (0.1, 0.25, 0.5, 1.0),
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "methods": (("pooled", 16), ("pooled", 128), ("antidiagonal", 16), ("sampled", 16), ("sampled", 32)),
    "blocks": (128, 64),
}
QUICK: dict[str, Any] = FULL | {
    "lengths": (300,),
    "densities": (0.5,),
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 16,
    "dtype": "float32",
    "methods": (("pooled", 16),),
    "blocks": (64,),
}
# Keys a step, warps, stages, most registers a thread may take, by block.
SHAPES: dict[int, list[tuple[int, int, int, int | None]]] = {
    128: [(128, 8, 2, None)],
    64: [(64, 4, 3, None), (64, 4, 2, None)],
}
TOLD = {
    "ms": "selection (select_ms) and attention (attend_ms) one after the other, medians",
    "attend_ms": "attention to drawn lists of this density, with the shapes of 'tuning', the fastest of those tried",
    "select_ms": "choosing the lists, by each method and stride; 'ms' has the first",
    "dense_ms": "F.scaled_dot_product_attention(is_causal=True) by its fastest backend",
    "density": "blocks visited over blocks of dense causal attention",
    "rate": "time that dense attention takes for its blocks over time for the visited ones, at one time a block",
    "rate_tflops": "floating-point operations of the visited blocks, whole ones, over attend_ms",
    "error": "largest absolute difference of 256 rows from plain PyTorch over the same lists",
}


def drawn(heads: int, rows: int, density: float, device: torch.device) -> Lists:
    """Lists of so many rows of blocks, as the module says, without padding."""
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(rows, device=device)
    weight = torch.rand(heads, rows, rows, device=device)
    weight.masked_fill_((column == row) | (column == row - 1) | (column == 0), 2.0).masked_fill_(column > row, -1.0)
    wanted = torch.clamp((row[:, 0] + 1) * density, min=min(3, rows)).round().minimum(row[:, 0] + 1)
    wanted[-1] = rows
    rank = weight.argsort(-1, descending=True).argsort(-1)
    chosen = rank < wanted[:, None]
    blocks = torch.where(chosen, column, column + rows).argsort(-1).to(torch.int16)
    counts = chosen.sum(-1, dtype=torch.int32)
    visited = torch.stack([counts.sum(dtype=torch.int64), (row + 1).sum() * heads])
    return Lists(blocks[None], counts[None], visited)


def names(quick: bool) -> list[str]:
    plan = QUICK if quick else FULL
    return [f"{n}/{block}" for n in reversed(plan["lengths"]) for block in plan["blocks"]]


def settings(quick: bool) -> dict[str, Any]:
    return {**(QUICK if quick else FULL), "figures": TOLD}


def measure(part: str, quick: bool) -> Records:
    plan = QUICK if quick else FULL
    n, block = map(int, part.split("/"))
    torch.manual_seed(n)
    sizes = [(plan["heads"], n), (plan["kv_heads"], n), (plan["kv_heads"], n)]
    dtype = getattr(torch, plan["dtype"])
    # In the memory that models leave: (B, N, H, D).
    query, key, value = (
        torch.randn(1, n, h, plan["head_dim"], device=device(), dtype=dtype).transpose(1, 2) for h, n in sizes
    )
    dense, _ = dense_variants(query, key, value)
    times = interleaved(dense, budget_s=0.5, least=3, most=10)
    backend = min(times, key=lambda name: times[name].median)
    chosen = _selections(query, key, block, plan["methods"])
    records: Records = []
    for density in plan["densities"]:
        note(f"stacked_layer: {n} tokens, blocks of {block}, density {density}")
        record = {"n": n, "model": "one layer", "triangle_layers": [], "dynamic_layers": [0], "block": block}
        record |= _layer(query, key, value, density, block, chosen)
        record |= {"dense_ms": times[backend].median, "dense_backend": backend}
        record["of_dense"] = record["ms"] / record["dense_ms"]
        record["rate"] = record["dense_ms"] * record["density"] / record["attend_ms"]
        records.append(record)
        note(str(record))
        free()
    return records


def _selections(query: Tensor, key: Tensor, block: int, methods: Any) -> dict[str, float]:
    """Milliseconds of choosing blocks, by method and stride."""
    # Here, and below: only this needs Triton.
    from tmx_compile.lowering.triton.dynamic.launch import select

    scale = query.shape[3] ** -0.5
    ways = {
        f"{method} {stride}": Selection(method, 0.9, block, min(stride, block), 8, 128) for method, stride in methods
    }
    return {name: _time(lambda way=way: select(query, key, None, way, scale)) for name, way in ways.items()}


def _layer(
    query: Tensor, key: Tensor, value: Tensor, density: float, block: int, chosen: dict[str, float]
) -> dict[str, Any]:
    from tmx_compile.lowering.triton.dynamic.launch import Tuning, attend

    scale = query.shape[3] ** -0.5
    lists = drawn(query.shape[1], -(-query.shape[2] // block), density, query.device)
    tried: dict[str, float] = {}
    shapes = {"/".join(map(str, shape)): Tuning(*shape) for shape in SHAPES[block]}
    for name, shape in shapes.items():
        try:
            tried[name] = _time(lambda s=shape: attend(query, key, value, None, lists, block, scale, shapes=s))
        except Exception as error:
            note(f"{name}: {describe(error)}")
    best = min(tried, key=tried.__getitem__)
    got = attend(query, key, value, None, lists, block, scale, shapes=shapes[best])
    first = next(iter(chosen.values()))
    visited, causal = lists.visited.tolist()
    operations = 4.0 * visited * block**2 * query.shape[3]
    return {
        "density": visited / causal,
        "ms": tried[best] + first,
        "attend_ms": tried[best],
        "rate_tflops": operations / tried[best] / 1e9,
        "select_ms": chosen,
        "tuning": best,
        "tried_ms": tried,
        "error": _error(query, key, value, lists, block, scale, got),
    }


def finish(records: Records) -> None:
    """Every record stands for itself."""


def _error(query: Tensor, key: Tensor, value: Tensor, lists: Lists, block: int, scale: float, got: Tensor) -> float:
    """Of two rows of blocks, of the first two heads."""
    worst = 0.0
    rows = lists.blocks.shape[2]
    for r in sorted({rows // 3, rows - 1}):
        part = slice(r * block, min(query.shape[2], (r + 1) * block))
        stop = part.stop
        of = Lists(lists.blocks[:, :2, r : r + 1], lists.counts[:, :2, r : r + 1], lists.visited)
        heads = query.shape[1] // key.shape[1]
        few = max(1, 2 // heads)
        want = plain_attend(
            query[:, :2, part].float(), key[:, :few, :stop].float(), value[:, :few, :stop].float(), None, of, block,
            scale,
        )  # fmt: skip
        worst = max(worst, float((want - got[:, :2, part].float()).abs().max()))
    return worst


def _time(run: Callable[[], Any]) -> float:
    """Median milliseconds."""
    return interleaved({"run": run}, budget_s=0.3, least=3, most=10)["run"].median


COLUMNS = ("n", "block", "density", "ms", "attend_ms", "dense_ms", "of_dense", "rate", "tuning", "error")
CASE = Case(
    "stacked_layer", "stacked.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True,
    quick_anywhere=False,
)  # fmt: skip
