"""The tables of docs/ascend.md: what triangle attention costs on paper."""

from __future__ import annotations

import json
from pathlib import Path

from studies import ascend_cost
from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table
from tools.pages.results import today

PAGE = "ascend.md"
BLOCK = "ascend_cost"


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its block from the file in ``results``; None where nothing was computed.

    Raises:
        ValueError: the page is missing or lacks the marks, or the result file lacks a field.
    """
    file = results / ascend_cost.FILE
    if not file.is_file():
        return None
    result = Fields(json.loads(file.read_text(encoding="utf-8")), file.name)
    return filled(docs / PAGE, {BLOCK: section(result)})


def section(result: Fields) -> str:
    """Everything between the marks."""
    settings = Fields(result["settings"], "settings")
    records = [Fields(item, f"record {i}") for i, item in enumerate(result["records"])]
    tilings, chips = list(settings["tilings"]), list(settings["chips"])
    layer = settings["layer"]
    return "\n\n".join(
        [
            f"`{today(result['command'])}`, `benchmarks/results/{ascend_cost.FILE}`; batch {layer['batch']}, "
            f"{layer['heads']} heads, {layer['kv_heads']} key heads, head dim {layer['dim']}, 16-bit numbers. Floors "
            f"on a {chips[-1]}, blocks `{tilings[0]}`:",
            _main([r for r in records if (r["tiling"], r["chip"]) == (tilings[0], chips[-1])]),
            _chips(settings),
            _check(result, settings, tilings[0]),
            _port(records, settings, tilings),
        ]
    )


def _main(records: list[Fields]) -> str:
    """The shortest and the longest length: in between nothing turns round."""
    lengths = [r["n"] for r in records]
    rows = []
    for n in dict.fromkeys((min(lengths), max(lengths))):
        for geometry in dict.fromkeys(tuple(r["geometry"]) for r in records):
            of = {r["form"]: r for r in records if (r["n"], tuple(r["geometry"])) == (n, geometry)}
            if geometry:
                rows.append([f"{n:,}", slashed(geometry), *(_floor(of[form]) for form in ascend_cost.FORMS)])
            else:
                rows.append([f"{n:,}", "dense", *(ms(r["floor_ms"]) for r in of.values()), ""])
    return table(["tokens", "sinks / window / last", *(f"{form}, ms" for form in ascend_cost.FORMS)], rows)


def _floor(record: Fields) -> str:
    return f"{ms(record['floor_ms'])} ({record['reduction']:+.1%})"


def _chips(settings: Fields) -> str:
    """What the chips of the file are taken to do, and who says so."""
    told = []
    for name, chip in settings["chips"].items():
        rates = chip["rates"]
        told.append(
            f"- {name}: {chip['cube_cores']} cube and {chip['vector_cores']} vector cores, "
            f"{rates['cube'] / 1e12:.0f} TFLOP/s and {rates['vector'] / 1e12:.2f} float32 Top/s; L2 "
            f"{rates['l2'] / 1e12:.2f} TB/s, HBM {rates['hbm'] / 1e12:.1f} TB/s ({chip['source']})."
        )
    return "\n".join(told)


def _check(result: Fields, settings: Fields, tiling: str) -> str:
    check = settings["check"]
    own = [item for item in result["check"] if item["tiling"] == tiling]
    shares = [f"{item['share']:.0%} at {item['n']:,}" for item in own]
    return (
        f"**How far a real kernel is from its floor.** Of torch_npu's published times of dense attention with one head "
        f"on a {check['chip']} ({check['source']}) the floor is {', '.join(shares)} tokens."
    )


def _port(records: list[Fields], settings: Fields, tilings: list[str]) -> str:
    port = Fields(settings["port"], "port")
    at = [r for r in records if (r["n"], r["chip"]) == (port["n"], port["chip"]) and r["geometry"]]

    def span(form: str, tiling: str) -> str:
        found = sorted(r["reduction"] for r in at if (r["form"], r["tiling"]) == (form, tiling))
        return f"{found[0]:+.0%} to {found[-1]:+.0%}"

    rows = [[f"`{tiling}`", *(span(form, tiling) for form in ascend_cost.FORMS)] for tiling in tilings]
    return (
        f"**Against the published single-kernel port** ({port['source']}; {port['chip']}, {port['n']:,} tokens): "
        f"attention {port['attention']:+.1%}, time to first token {port['ttft']:+.0%}, as its authors measured, with a "
        f"geometry that they do not state. On paper, over the three geometries, by how an operator cuts a call into "
        f"blocks (`settings` of the file):\n\n{table(['blocks', *ascend_cost.FORMS], rows)}"
    )
