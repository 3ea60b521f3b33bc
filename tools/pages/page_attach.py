"""The table of docs/attach.md: what the switch gives without compiling."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, slashed, table
from tools.pages.results import load, origin

PAGE = "attach.md"
FILE = "switch.json"


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its block from the file in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or the result file lacks a field.
    """
    if not (results / FILE).is_file():
        return None
    result = load(results / FILE)
    return filled(docs / PAGE, {"switch": f"{section(result)}\n\n<sub>{origin(result, FILE)}</sub>"})


def section(result: Fields) -> str:
    """Seconds of each length and padding, with what does not fit in memory."""
    settings, records = result["settings"], result["records"]
    geometry = slashed([settings[name] for name in ("num_sink_tokens", "sliding_window_size", "num_last_tokens")])
    rows = []
    for tokens, padding in dict.fromkeys((r["tokens"], r["padding"]) for r in records):
        pair = {r["attention"]: r for r in records if (r["tokens"], r["padding"]) == (tokens, padding)}
        cells = ["out of memory" if r["ms"] is None else f"{r['ms'] / 1e3:.3g}" for r in (pair["sdpa"], pair["tmx"])]
        saved = pair["tmx"]["reduction"]
        rows.append([f"{tokens:,}", padding, *cells, "" if saved is None else f"{-saved:.0%}"])
    head = ["tokens", "padding", "`sdpa`, s", "`tmx`, s", "difference"]
    return f"{settings['model']}; {settings['triangle_layers']} layers, {geometry}.\n\n{table(head, rows)}"
