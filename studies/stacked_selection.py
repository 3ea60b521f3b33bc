"""What choosing blocks costs, without attention to them: by method, group and length, over dense attention.

On tensors without structure, which changes nothing but how many blocks are kept. Parts by a length compare the methods;
``tiles`` parts the shapes of the program that looks at sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, free, note
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.timing import Rounds, Timing, describe, interleaved, interleaved_on
from tmx_compile.lowering import fa4
from tmx_compile.mask.selection import Selection

FULL: dict[str, Any] = {
    "lengths": (32768, 131072),
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "share": 0.95,
    # Method, group, block.
    "ways": (
        *(("sampled", group, 128) for group in (16, 32, 64, 128)),
        *(("pooled", group, 128) for group in (16, 128)),
        ("antidiagonal", 16, 128),
        *((method, 16, 64) for method in ("sampled", "pooled", "antidiagonal")),
    ),
    "tiles": (
        (128, 8, 2, 8), (128, 8, 3, 8), (128, 8, 2, 4), (128, 8, 2, 16), (128, 4, 2, 8), (64, 4, 2, 8), (64, 4, 3, 8),
        (256, 8, 2, 8),
    ),
    "tile_ways": (("sampled", 16, 128), ("sampled", 32, 128)),
}  # fmt: skip
TOLD = {
    "ms": "the GPU's time, by events around the replay of a CUDA graph, its cache cold: no wait for the host",
    "call_ms": "wall time of a single call until the GPU has finished: with what the host takes to launch it",
    "how": "'graph', or 'call' where the call could not be captured: then ms is between events around it",
    "dense_ms": "the fastest dense causal attention of the same run, as ms, of SDPA's backends and FlashAttention-4",
    "sdpa_ms": "the same of SDPA's backends alone",
    "tile": "sampled rows, warps, stages, blocks of keys of a program; none: as the package takes it",
    "density": "of the blocks that were chosen: random tensors, so it says nothing of a model",
}


def names(quick: bool) -> list[str]:
    return [f"{form}{n}" for form in ("", "tiles-") for n in FULL["lengths"]]


def settings(quick: bool) -> dict[str, Any]:
    return {**FULL, "figures": TOLD}


def measure(part: str, quick: bool) -> Records:
    from tmx_compile.lowering.triton.dynamic.launch import Tile, select

    form, _, length = part.rpartition("-")
    n = int(length)
    torch.manual_seed(n)
    query, key, value = (
        torch.randn(1, n, heads, FULL["head_dim"], device=device(), dtype=getattr(torch, FULL["dtype"])).transpose(1, 2)
        for heads in (FULL["heads"], FULL["kv_heads"], FULL["kv_heads"])
    )
    dense = _dense(query, key, value)
    backend = min(dense, key=lambda name: dense[name].median)
    sdpa = min(time.median for name, time in dense.items() if name != "fa4")
    records: Records = []
    for method, group, block in FULL["tile_ways" if form else "ways"]:
        selection = Selection(method, FULL["share"], block, group, 8, 128)
        for tile in FULL["tiles"] if form else (None,):
            shape = None if tile is None else Tile(*tile)
            # Bound now: the timing calls it after the loop has gone on.
            runs = {"": lambda s=selection, t=shape: select(query, key, None, s, FULL["head_dim"] ** -0.5, tile=t)}
            record = {"n": n, "block": block, "method": method, "group": group, "tile": tile}
            try:
                visited, causal = runs[""]().visited.tolist()
                own = interleaved_on(device(), runs, Rounds(0.3, 5, 20))[""]
                called = interleaved(runs, budget_s=0.3, least=5, most=20)[""]
            except Exception as error:
                # A shape that does not fit this GPU.
                note(f"stacked_selection: {record}: {describe(error)}")
                continue
            record |= {"ms": own.median, "how": own.how, "call_ms": called.median, "density": visited / causal}
            record |= {"dense_ms": dense[backend].median, "dense_backend": backend, "sdpa_ms": sdpa}
            record["of_dense"] = record["ms"] / record["dense_ms"]
            record["call_of_dense"] = record["call_ms"] / record["dense_ms"]
            records.append(record)
            note(f"stacked_selection: {record}")
    free()
    return records


def _dense(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Timing]:
    runs: dict[str, Callable[[], Any]] = dict(dense_variants(query, key, value)[0])
    if fa4.missing(query.device) is None:
        runs["fa4"] = lambda: fa4.by_sequences(query, key, value, None, query.shape[3] ** -0.5)
    return interleaved_on(device(), runs, Rounds(1.0, 3, 10))


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = (
    "n",
    "block",
    "method",
    "group",
    "tile",
    "ms",
    "call_ms",
    "dense_ms",
    "of_dense",
    "call_of_dense",
    "how",
    "density",
)
CASE = Case(
    "stacked_selection", "stacked_selection.json", None, COLUMNS, Parts(names, settings, measure, finish),
    needs_cuda=True, quick_anywhere=False,
)  # fmt: skip
