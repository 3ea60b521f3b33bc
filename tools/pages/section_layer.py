"""The blocks on one attention layer, for the results of any device."""

from __future__ import annotations

import statistics
from typing import Any

from tools.pages.markdown import Fields, mib, ms, slashed, table, times


def section(result: Fields) -> str:
    """Dense attention and every lowering, by length and geometry."""
    settings, records = result["settings"], result["records"]
    names = [*settings["lowerings"], *settings["peers"]]
    found = {(r["dtype"], tuple(r["geometry"]), r["n"], r["lowering"]): r for r in records}
    groups = list(dict.fromkeys((r["dtype"], tuple(r["geometry"])) for r in records))
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in settings["dense_flops_per_s"].items())
    several = len(settings["dtypes"]) > 1
    # A page has room for so many rows; the picture shows what is in between.
    lengths = dict.fromkeys((min(settings["lengths"]), max(settings["lengths"]))) if several else settings["lengths"]
    rows = []
    for dtype, geometry in groups:
        for n in lengths:
            of = {name: found.get((dtype, geometry, n, name)) for name in names}
            own = [r for r in of.values() if r]
            if own:
                best = min(own, key=lambda r: r["ms"])
                head = [f"{n:,}", slashed(geometry), *([dtype] if several else []), _dense(best)]
                rows.append([*head, *(_cell(r) for r in of.values()), _times_of(best["over_floor"])])
    head = ["tokens", "geometry", *(["dtype"] if several else []), "dense", *(f"`{name}`" for name in names)]
    out = [
        f"{settings['heads']} heads, {settings['kv_heads']} key heads, head dim {settings['head_dim']}, "
        f"{' and '.join(settings['dtypes'])}. For the floor: {settings['copy_bytes_per_s'] / 1e9:,.0f} GB/s, {rates}.",
        table([*head, "fastest, x floor"], rows),
        _rest(settings, found, names),
    ]
    return "\n\n".join(text for text in (*out, _small_windows(settings, found, groups)) if text)


def million(result: Fields) -> str:
    """The same measurements at a length where dense attention is out of the question."""
    settings = result["settings"]
    longest = max(settings["lengths"])
    rows = [
        [slashed(r["geometry"]), f"`{r['lowering']}`", ms(r["ms"]), _times_of(r["over_floor"]), mib(r["extra_bytes"])]
        for r in result["records"]
        if r["n"] == longest
    ]
    return (
        f"{longest:,} tokens, {' and '.join(settings['dtypes'])}, the same heads; dense was not run.\n\n"
        + table(["geometry", "lowering", "ms", "x floor", "extra memory, MiB"], rows)
        + _left_out(settings)
    )


def peer(result: Fields) -> str:
    """A sentence on others' kernels for the same mask, timed beside ours at the largest length."""
    settings, records = result["settings"], result["records"]
    (name,) = settings["peers"]
    n = max(settings["lengths"])
    of = {(r["lowering"], slashed(r["geometry"])): r["ms"] for r in records if r["n"] == n}
    faster = [f"{times(its / of['triton', case])} ({case})" for (who, case), its in of.items() if who == name]
    return (
        f"The authors' kernel, `{name}`, was measured beside an earlier `triton`: at {n:,} tokens that is "
        f"{', '.join(faster)} as fast."
    )


def _cell(record: Fields | None) -> str:
    if record is None:
        return "-"
    return f"{ms(record['ms'])} ({_times_of(record['speedup'])})" + ("" if record["timed"] != "call" else " *")


def _dense(record: Fields) -> str:
    return "-" if record["dense_ms"] is None else ms(record["dense_ms"])


def _times_of(value: float | None) -> str:
    return "-" if value is None else times(value)


def _small_windows(settings: Fields, found: dict[Any, Fields], groups: list[Any]) -> str:
    """Why the GPU kernel is further from the floor where that is the bytes; nothing without such a measurement."""
    n = max(settings["dense_lengths"])
    ours = [r for dtype, geometry in groups if (r := found.get((dtype, geometry, n, "triton"))) is not None]

    def said(kind: str) -> str:
        of = [r for r in ours if r["floor_by"] == kind]
        return " and ".join(f"{times(r['over_floor'])} the floor for {slashed(r['geometry'])}" for r in of)

    if not said("bytes") or not said("pairs"):
        return ""
    return (
        f"`triton` takes {said('pairs')}, but {said('bytes')}, where the floor is the bytes: a tile of a small window "
        "has little to compute while it waits for its first keys."
    )


def _rest(settings: Fields, found: dict[Any, Fields], names: list[str]) -> str:
    """What is not in the table: compile times, memory where it is told (on CUDA), errors."""
    spread = statistics.median(r["ms_max"] / r["ms_min"] for r in found.values())
    n = max(settings["lengths"])
    told = []
    for name in names:
        of = [r for r in found.values() if r["lowering"] == name]
        extra = [r["extra_bytes"] for r in of if r["n"] == n and r["extra_bytes"] is not None]
        if extra:
            told.append(f"`{name}` {mib(max(extra))}")
    memory = f" MiB beyond inputs and result at {n:,} tokens: {', '.join(told)}." if told else ""
    compiled = max(r["compile_s"] for r in found.values())
    return (
        f"The slowest round took {spread:.2f} times the fastest (median); the longest compile {compiled:.1f} s. "
        f"Largest error: {max(r['error'] for r in found.values()):.1e}.{memory}{_left_out(settings)}"
    )


def _left_out(settings: Fields) -> str:
    """What was asked for and could not be measured, with the reason."""
    lines = [f"- {name}: {reason}" for name, reason in settings["left_out"].items()]
    return "\n\nLeft out, or timed as a plain call:\n\n" + "\n".join(lines) if lines else ""


def training(result: Fields) -> str:
    """Forward and backward together, a line a length, each geometry's time and how many times faster than dense."""
    records = result["records"]
    geometries = list(dict.fromkeys(slashed(r["geometry"]) for r in records))
    lengths = [r["n"] for r in records if slashed(r["geometry"]) == geometries[0]]
    shown = [n for n in lengths if n in (lengths[0], 32768, lengths[-1])]
    rows = []
    for n in shown:
        here = [r for r in records if r["n"] == n]
        rows.append([f"{n:,}", f"{here[0]['dense_ms']:.3g}", *(f"{r['ms']:.3g} ({r['speedup']:.3g}x)" for r in here)])
    return table(["tokens", "dense", *geometries], rows)


def training_step(result: Fields) -> str:
    """A sentence on steps of several layers: times and how many times faster than with every layer dense."""
    settings = result["settings"]
    times: dict[str, list[str]] = {}
    for r in result["records"]:
        if r["geometry"] is not None:
            told = f"{r['ms']:.0f} ms at {r['n']:,} ({r['speedup']:.2f}x)"
            times.setdefault(slashed(r["geometry"]), []).append(told)
    ways = "; ".join(f"{geometry}: {', '.join(told)}" for geometry, told in times.items())
    sparse = settings["triangle_layers"]
    return f"A step of {settings['layers']} layers in Llama-3.1-8B's shape, {sparse} sparse: {ways}."
