"""The tables of docs/attach.md: what each client did, and what the switch gives without compiling."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, slashed, table
from tools.pages.results import load, origin

PAGE = "attach.md"
FILE, CLIENTS = "switch.json", "clients.json"
_NAMES = {"torch": "PyTorch", "transformers": "Transformers", "accelerate": "Accelerate", "peft": "PEFT", "trl": "TRL"}
# Nothing is missed where these are told.
_MEANT = ("NOT_SELECTED", "SHORT_PROMPT")


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its block from the file in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or the result file lacks a field.
    """
    files = {"switch": (FILE, section), "clients": (CLIENTS, clients)}
    if not any((results / file).is_file() for file, _ in files.values()):
        return None
    blocks = {}
    for name, (file, write) in files.items():
        result = load(results / file)
        blocks[name] = f"{write(result)}\n\n<sub>{origin(result, file)}</sub>"
    return filled(docs / PAGE, blocks)


def clients(result: Fields) -> str:
    """A line for each way in which each client was used."""
    usual, rows, before = result["settings"]["triangle_layers"], [], ""
    for r in result["records"]:
        name = f"{_NAMES.get(r['client'], r['client'])} {r['version'].partition('+')[0]}"
        if r["failed"]:
            outcome, error = f"does not run: {r['failed']}", ""
        else:
            # A client may number its layers in a way of its own.
            dense = [layer for layer in r.get("selected", usual) if layer not in r["triangle"]]
            why = [reason for reason in r["reasons"] if reason not in _MEANT]
            outcome = f"dense: {', '.join(why) or 'not compiled'}" if dense else "triangle"
            error = f"{r['error']:.0e}"
        rows.append(["" if name == before else name, r["way"], outcome, error])
        before = name
    return table(["client", "used with", "layers", "error"], rows)


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
