"""The tables of docs/floor.md: one layer against the least that its machine needs, on a GPU and on a CPU with AMX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tmx_compile.bench.floor import Shape
from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, percent, slashed, table, times
from tools.pages.results import load, origin

PAGE = "floor.md"
GPU, H200 = "floor.json", "floor_h200.json"
AMX, VLLM = "operator_cpu_amx.json", "operator_cpu_amx_vllm.json"
_PARTS = {
    "pairs": "pairs at the dense rate",
    "pace": "slower on each key",
    "tile": "edges, start, end",
    "sinks": "sinks",
    "last rows": "last rows",
}

_IN_VLLM = {
    "whole": "`blocked`",
    "plugin": "`blocked`, last rows by vLLM",
    "pages": "all by vLLM's kernel",
}
_FORMS = {"eager": "eager", "compiled": "compiled", "flex": "compiled", "avx512": "eager, AMX off"}


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its blocks from files in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or a result file lacks a field.
    """
    if not (results / GPU).is_file():
        return None
    gpu, h200, amx, vllm = (load(results / file) for file in (GPU, H200, AMX, VLLM))
    return filled(
        docs / PAGE,
        {
            "layer": f"{_layer(gpu)}\n\n<sub>{origin(gpu, GPU)}</sub>",
            "window": _window(gpu),
            "parts": _parts(gpu),
            "h200": f"{_layer(h200)}\n\n<sub>{origin(h200, H200)}</sub>",
            "h200_window": _window(h200),
            "amx": f"{_amx(amx)}\n\n<sub>{origin(amx, AMX)}</sub>",
            "amx_vllm": f"{_vllm(vllm)}\n\n<sub>{origin(vllm, VLLM)}</sub>",
        },
    )


def _of(result: Fields, what: str) -> list[Fields]:
    found = [r for r in result["records"] if r["what"] == what]
    return sorted(found, key=lambda r: (r["n"], r["lowering"] != "triton", r.get("geometry", [])[1:2]))


def _layer(result: Fields) -> str:
    """The whole call over its floor, and against the best dense kernel."""
    settings = result["settings"]
    best = max(_of(result, "dense"), key=lambda r: r["flops_per_s"])
    copied = max(r["copy_bytes_per_s"] for r in result["records"])
    rows = []
    for r in _of(result, "layer"):
        cells = [ms(r["ms"]), f"{ms(r['floor_ms'])} ({r['floor_by']})", times(r["over_floor"])]
        dense = f"{ms(r['dense_ms'])} (`{r['dense_backend']}`)"
        rows.append([f"{r['n']:,}", slashed(r["geometry"]), *cells, dense, times(r["speedup"])])
    return (
        f"Milliseconds, {settings['heads']}/{settings['kv_heads']} heads, head dim {settings['head_dim']}, "
        f"{settings['dtype']}, batch {settings['batch']}. For the floor: {best['flops_per_s'] / 1e12:.0f} TFLOP/s, of "
        f"`{best['lowering']}` at {best['n']:,} tokens, and {copied / 1e9:,.0f} GB/s.\n\n"
        + table(["tokens", "geometry", "our call", "floor", "over the floor", "best dense", "faster than dense"], rows)
    )


def _window(result: Fields) -> str:
    """Streaming rows, with sinks and without, against the window kernel."""
    bands = {(r["n"], r["geometry"][1]): r for r in _of(result, "band") if r["lowering"] == "triton"}
    rows = []
    for r in _of(result, "streaming"):
        sink, window, _ = r["geometry"]
        band = bands[r["n"], window]
        ours = [f"{ms(x['ms'])} ({times(x['ratio'])})" for x in (r, band)]
        rows.append([f"{r['n']:,}", f"{window:,}", ms(r["window_ms"]), str(sink), *ours])
    return table(["tokens", "window", "its window kernel", "sinks", "ours, with sinks", "ours, without"], rows)


def _parts(result: Fields) -> str:
    """What a call's time is made of, and the pace of both kernels."""
    rows = []
    for r in _of(result, "layer"):
        if r["parts_ms"]:
            parts = [f"{ms(r['parts_ms'][name])} ({percent(r['parts_ms'][name] / r['ms'])})" for name in _PARTS]
            rows.append([f"{r['n']:,}", slashed(r["geometry"]), ms(r["ms"]), *parts])
    n = max(result["settings"]["lengths"])
    said = []
    for r in (r for r in _of(result, "band") if r["n"] == n):
        name = "ours" if r["lowering"] == "triton" else "its"
        said.append(f"{name}, window {r['geometry'][1]:,}: {percent(r['pace_of_dense'])}, {ms(r['tile_ms'])} ms")
    copied = max(r["copy_bytes_per_s"] for r in result["records"])
    heads, kv_heads, dim, element = result["records"][0]["shape"]
    moved = Shape(n, 1, heads, kv_heads, dim, element).bytes / copied * 1e3
    return (
        table(["tokens", "geometry", "our call", *_PARTS.values()], rows)
        + f"\n\nAt {n:,} tokens, the rate on each further key over the dense rate, and the time of edges, start and "
        + "end: "
        + "; ".join(said)
        + f". Reading query, key and value and writing the result once takes {ms(moved)} ms at the rate of a copy."
    )


def _amx(result: Fields) -> str:
    """One layer on a CPU with AMX."""
    records = result["records"]
    rows = []
    for r in records:
        spent = r["account"]["attention_ms"] / sum(
            r["account"][f"{kind}_ms"] for kind in ("attention", "matmul", "other")
        )
        rows.append(
            [
                r["shape"], f"{r['n']:,}", slashed(r["geometry"]), f"`{r['lowering']}`, {_FORMS[r['form']]}",
                ms(r["dense_ms"]), f"{ms(r['ms'])} ({times(r['speedup'])})", times(r["over_floor"]),
                times(r["keys_over_mask"]),
                "-" if r["rate_of_dense"] is None else percent(r["rate_of_dense"]),
                percent(spent) if r["rate_of_dense"] is not None else "-",
            ]
        )  # fmt: skip
    head = ["model", "tokens", "geometry", "lowering", "dense", "ours", "over the floor"]
    amx = [r for r in records if r["form"] != "avx512"]
    copied = max(r["copy_bytes_per_s"] for r in records)
    return (
        f"Milliseconds, {result['settings']['dtype']}, all threads; in brackets, times faster than dense SDPA. For the "
        f"floor: {_matmul(amx)} of `torch.matmul`, {copied / 1e9:,.0f} GB/s. SDPA reaches "
        f"{percent(min(r['dense_of_matmul'] for r in amx))} to {percent(max(r['dense_of_matmul'] for r in amx))} of "
        "that rate.\n\n"
        + table([*head, "keys in blocks over mask", "rate in blocks over dense", "share in SDPA"], rows)
    )


def _vllm(result: Fields) -> str:
    """The same beside vLLM's own kernel."""
    records = result["records"]
    layers: dict[Any, dict[str, Fields]] = {}
    for r in sorted(records, key=lambda r: (r["shape"] != records[0]["shape"], r["n"])):
        layers.setdefault((r["shape"], r["n"], *r["geometry"]), {})[r["form"]] = r
    rows, shown = [], [name for name in _IN_VLLM if any(r["form"] == name for r in records)]
    for forms in layers.values():
        r = min(forms.values(), key=lambda x: x["ms"])
        cells = [f"{ms(x['ms'])} ({times(r['vllm_ms'] / x['ms'])})" for x in (forms[name] for name in shown)]
        dense = [ms(r["sdpa_ms"]), ms(r["vllm_ms"])]
        rows.append([r["shape"], f"{r['n']:,}", slashed(r["geometry"]), *dense, *cells, times(r["over_floor"])])
    rates = [r["vllm_of_matmul"] for r in records]
    return (
        f"Milliseconds, {result['settings']['dtype']}, {result['hardware']['threads']} threads; in brackets, times "
        f"faster than vLLM's dense kernel, which reaches {percent(min(rates))} to {percent(max(rates))} of the rate of "
        f"`torch.matmul` ({_matmul(records)}). Library: `{result['settings']['library']}`.\n\n"
        + table(
            [
                "model",
                "tokens",
                "geometry",
                "SDPA",
                "dense",
                *(_IN_VLLM[name] for name in shown),
                "best over the floor",
            ],
            rows,
        )
    )


def _matmul(records: list[Fields]) -> str:
    return f"{max(r['matmul_flops_per_s'] for r in records) / 1e12:.2f} TFLOP/s"
