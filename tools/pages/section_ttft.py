"""The block on the time to first token of whole models."""

from __future__ import annotations

from typing import Any

from benchmarks import ttft
from benchmarks.account import kernel_class
from tools.pages.markdown import Fields, ms, percent, table


def section(result: Fields) -> str:
    """Every model: times by length, and where the dense ones go."""
    settings, records = result["settings"], result["records"]
    lengths = sorted({r["tokens"] for r in records})
    out = [f"{settings['dtype']}, batch {settings['batch']}. Seconds; in brackets the change {settings['reduction']}."]
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model]
        out.append(f"### {model}\n\n{_times(own, lengths)}")
        out += [text for text in (_others(own), _account(own), _failed(own)) if text]
    if missing := [f"`{part}`" for part in ttft.names(False) if part not in {r["part"] for r in records}]:
        out.append(f"Not measured yet, by part of the case: {', '.join(missing)}.")
    return "\n\n".join(out)


def _times(records: list[Fields], lengths: list[int]) -> str:
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records if "+" not in r["variant"]):
        of = {r["tokens"]: r for r in records if r["variant"] == variant}
        some = next(iter(of.values()))
        sparse = f"{some['triangle_layers']} of {some['layers']}"
        rows.append([f"`{variant}`", sparse, *(_cell(of.get(tokens)) for tokens in lengths)])
    return table(["variant", "triangle layers", *(f"{tokens:,}" for tokens in lengths)], rows)


def _others(records: list[Fields]) -> str:
    """The variants with a mask or CUDA graphs at their longest, without a row of their own."""
    said = []
    for variant in dict.fromkeys(r["variant"] for r in records if "+" in r["variant"]):
        longest = max((r for r in records if r["variant"] == variant), key=lambda r: r["tokens"])
        said.append(f"`{variant}` {_cell(longest)} at {longest['tokens']:,}")
    return f"With a mask or CUDA graphs, at the longest: {'; '.join(said)}." if said else ""


def _cell(record: Fields | None) -> str:
    if record is None:
        return ""
    if record["oom"]:
        return "out of memory"
    if record["ms"] is None:
        return "failed"
    compared = record["reduction"] is not None and record["variant"] != record["best_dense"]
    saved = f" ({percent(-record['reduction'], '+')})" if compared else ""
    return f"{record['ms'] / 1e3:.3g}{saved}"


def _failed(records: list[Fields]) -> str:
    failed = [f"- `{r['variant']}` at {r['tokens']:,} tokens: {r['failed']}" for r in records if r["failed"]]
    return "Failed:\n\n" + "\n".join(failed) if failed else ""


def _account(records: list[Fields]) -> str:
    """Where the time of dense attention goes, and what can be saved of it."""
    dense = next((r for r in records if r["account"] and r["geometry"] is None), None)
    if dense is None:
        return ""
    spent = _by_class(dense["account"])
    limits = [
        f"`{r['variant']}` {percent(r['reduction'])} of {percent(r['limit_reduction'])}"
        for r in records
        if r["limit_reduction"] is not None and r["ms"]
    ]
    return (
        f"Of the {ms(dense['ms'])} ms of `{dense['variant']}` at {dense['tokens']:,} tokens attention takes "
        f"{ms(spent['attention'])}, matrix products {ms(spent['matmul'])}, the rest {ms(spent['other'])}."
        + (f" Saved, of what would be if triangle layers cost only the floor: {', '.join(limits)}." if limits else "")
    )


def _by_class(account: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of kernels by class; those that the file names are in today's classes, whatever it put them in."""
    spent = {kind: account[f"{kind}_ms"] for kind in ("attention", "matmul", "other")}
    for name, stored, took in account["longest"]:
        spent[stored] -= took
        spent[kernel_class(name)] += took
    return spent
