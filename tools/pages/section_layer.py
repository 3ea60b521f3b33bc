"""The page's section on one attention layer, for the results of any device."""

from __future__ import annotations

import statistics
from typing import Any

from tools.pages.markdown import Fields, mib, ms, slashed, table, times


def section(result: Fields, picture: str) -> str:
    settings, records = result["settings"], result["records"]
    names = [*settings["lowerings"], *settings["peers"]]
    found = {(r["dtype"], tuple(r["geometry"]), r["n"], r["lowering"]): r for r in records}
    groups = list(dict.fromkeys((r["dtype"], tuple(r["geometry"])) for r in records))
    rates = ", ".join(f"{rate / 1e12:.3g} in {dtype}" for dtype, rate in settings["dense_flops_per_s"].items())
    out = [
        f"Causal attention with batch {settings['batch']}, {settings['heads']} heads, {settings['kv_heads']} key heads "
        f"and head dim {settings['head_dim']}. Dense is the fastest backend of `F.scaled_dot_product_attention` that "
        f"this machine has, named beside its time. Milliseconds; *times* are {settings['timing']}. Each lowering's "
        "time is followed by how many times faster than dense, and how many times the floor, it is.\n\nThe **floor** "
        f"is {settings['floor']}. Here: {settings['copy_bytes_per_s'] / 1e9:,.0f} GB/s copied, dense TFLOP/s {rates}.",
        f"![Time against tokens]({picture})",
    ]
    for dtype, geometry in groups:
        rows = []
        for n in settings["lengths"]:
            of = {name: found.get((dtype, geometry, n, name)) for name in names}
            known = next((r for r in of.values() if r), None)
            if known is None:
                continue
            rows.append([f"{n:,}", _dense(known), _floor(known), *(_cell(r) for r in of.values())])
        head = ["tokens", "dense", "floor", *(f"`{name}`" for name in names)]
        out.append(f"### {dtype}, sinks / window / last rows {slashed(geometry)}\n\n{table(head, rows)}")
    out.append(_limits(settings, found, groups, names) + _small_windows(settings, found, groups))
    out.append(_rest(settings, found, names))
    return "\n\n".join(out)


def million(result: Fields) -> str:
    """The same measurements at a length where dense attention is out of the question."""
    settings = result["settings"]
    rows = [
        [
            f"{r['n']:,}",
            slashed(r["geometry"]),
            f"`{r['lowering']}`",
            ms(r["ms"]),
            _times_of(r["over_floor"]),
            mib(r["extra_bytes"]),
            f"{r['error']:.1e}",
            _times_of(r["speedup"]),
        ]
        for r in result["records"]
    ]
    head = ["tokens", "geometry", "lowering", "ms", "x floor", "extra memory, MiB", "largest error", "over dense"]
    longest = max(settings["lengths"])
    return (
        f"One layer, {', '.join(settings['dtypes'])}, {settings['heads']} heads, {settings['kv_heads']} key heads, "
        f"head dim {settings['head_dim']}. Extra memory is what one call takes beyond query, key, value and result. "
        f"Error: {settings['error']}. Dense is not run at {longest:,} tokens.\n\n{table(head, rows)}"
        + _left_out(settings)
    )


def stages(result: Fields) -> str:
    """One call taken apart, at the largest length."""
    settings, records = result["settings"], result["records"]
    n = max(settings["lengths"])
    geometries = list(dict.fromkeys(tuple(r["geometry"]) for r in records))
    found = {(tuple(r["geometry"]), r["variant"]): r for r in records if r["n"] == n}
    rows = [
        [name, what, *(f"{ms(r['ms'])} ({times(r['over_floor'])})" for g in geometries for r in [found[g, name]])]
        for name, what in settings["variants"].items()
        if all((g, name) in found for g in geometries)
    ]
    head = ["variant", "what", *(f"{slashed(g)}, ms (x floor)" for g in geometries)]
    small = min(geometries, key=lambda g: found[g, "whole"]["floor_ms"])
    of = {name: found[small, name] for name in settings["variants"] if (small, name) in found}
    text = (
        f"{n:,} tokens, {settings['dtype']}, {settings['heads']} heads, {settings['kv_heads']} key heads, head dim "
        f"{settings['head_dim']}. Times and floor as above.\n\n{table(head, rows)}\n\n**What limits it.** At "
        f"{slashed(small)} the walk over the window costs nothing: with one key a row the streaming tiles take "
        f"{ms(of['one key a row']['ms'])} ms, with all of theirs {ms(of['without last rows']['ms'])} ms. Copying the "
        f"query to the result, which every kernel must at least do, takes {times(of['copy']['over_floor'])} the floor "
        f"by itself. The last rows add {ms(of['whole']['ms'] - of['without last rows']['ms'])} ms; they are products, "
        "and could run beside the tiles, which are copies, but their programs hold slots that the tiles need."
    )
    if "apart" not in of:
        return text
    return (
        f"{text} In a launch of their own by the Hopper kernel they take {ms(of['last rows alone, hopper']['ms'])} ms, "
        f"the whole then {ms(of['apart']['ms'])} ms ({times(of['apart']['over_floor'])} the floor): this is what would "
        "bring that geometry closer. It is not done yet; for the larger window it gains nothing."
    )


def _cell(record: Fields | None) -> str:
    if record is None:
        return "-"
    facts = [_times_of(record["speedup"]), f"{_times_of(record['over_floor'])} floor"]
    return f"{ms(record['ms'])} ({', '.join(facts)})" + ("" if record["timed"] != "call" else " *")


def _dense(record: Fields) -> str:
    return "-" if record["dense_ms"] is None else f"{ms(record['dense_ms'])} ({record['dense_backend']})"


def _floor(record: Fields) -> str:
    return "-" if record["floor_ms"] is None else f"{ms(record['floor_ms'])} ({record['floor_by']})"


def _times_of(value: float | None) -> str:
    return "-" if value is None else times(value)


def _limits(settings: Fields, found: dict[Any, Fields], groups: list[Any], names: list[str]) -> str:
    n = max(settings["dense_lengths"])
    per_pair = 4 * settings["head_dim"] * settings["heads"] * settings["batch"]
    rows = []
    for dtype, geometry in groups:
        own = [found[key] for name in names if (key := (dtype, geometry, n, name)) in found]
        best = min(own, key=lambda r: r["ms"])
        dense_rate = best["causal_pairs"] * per_pair / best["dense_ms"] / 1e6
        rate = best["attended_pairs"] * per_pair / best["ms"] / 1e6
        in_blocks = best["causal_pairs"] / best["block_pairs"]
        rows.append(
            f"{dtype} | {slashed(geometry)} | `{best['lowering']}` | {times(best['speedup'])} | "
            f"{times(best['ideal_speedup'])} | {times(in_blocks)} | {times(best['over_floor'])} | {best['floor_by']} | "
            f"{dense_rate:,.0f} | {rate:,.0f}"
        )
    head = ["dtype", "geometry", "fastest", "over dense", "pairs", "pairs in blocks", "x floor", "floor by"]
    return (
        f"### What limits it\n\nAt {n:,} tokens, the fastest of each row. *Pairs* is the ratio of (row, key) pairs, "
        f"causal to attended: the speed-up if time were pairs. *Pairs in blocks* counts the {settings['block']} x "
        f"{settings['block']} blocks that the mask touches, which a tiled kernel computes whole. *Floor by* says which "
        "of its two terms the floor is. A GFLOP/s figure counts the multiplications and additions of causal pairs "
        "(dense) or attended pairs (triangle) alone, so whatever is computed beyond them lowers it.\n\n"
        + table([*head, "dense GFLOP/s", "its GFLOP/s"], rows)
    )


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
        f"\n\n**Small windows are bound by latency.** `triton` takes {said('pairs')}, but {said('bytes')}, where the "
        "floor is the bytes. A tile of a small window walks so few blocks of keys that there is little to compute "
        "while it waits for the first; and the programs of the last rows, which walk all keys, hold slots of the "
        "multiprocessors that streaming tiles would use."
    )


def _rest(settings: Fields, found: dict[Any, Fields], names: list[str]) -> str:
    spread = statistics.median(r["ms_max"] / r["ms_min"] for r in found.values())
    n = max(settings["lengths"])
    rows = []
    for name in names:
        of = [r for r in found.values() if r["lowering"] == name]
        if not of:
            continue
        compiled = max(r["compile_s"] for r in of)
        errors = [max((r["error"] for r in of if r["dtype"] == dtype), default=None) for dtype in settings["dtypes"]]
        extra = [r["extra_bytes"] for r in of if r["n"] == n and r["extra_bytes"] is not None]
        rows.append(
            [
                f"`{name}`",
                f"{compiled:.1f}",
                mib(max(extra)) if extra else "-",
                *("-" if e is None else f"{e:.1e}" for e in errors),
            ]
        )
    head = ["lowering", "longest compile, s", f"extra memory at {n:,} tokens, MiB"]
    return (
        f"The slowest round took {spread:.2f} times the fastest (median over all records). Shapes are "
        f"{settings['shapes']}. Extra memory is what one call takes beyond query, key, value and result (told on CUDA "
        f"only). Error: {settings['error']}.\n\n"
        + table([*head, *(f"largest error, {dtype}" for dtype in settings["dtypes"])], rows)
        + _left_out(settings)
    )


def _left_out(settings: Fields) -> str:
    """What was asked for and could not be measured, with the reason."""
    lines = [f"- {name}: {reason}" for name, reason in settings["left_out"].items()]
    return "\n\nLeft out, or timed as a plain call:\n\n" + "\n".join(lines) if lines else ""
