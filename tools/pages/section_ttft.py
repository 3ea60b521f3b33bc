"""The page's section on the time to first token of whole models."""

from __future__ import annotations

from typing import Any

from benchmarks import ttft
from benchmarks.account import kernel_class
from tools.pages.markdown import Fields, ms, percent, table


def section(result: Fields, picture: str) -> str:
    settings, records = result["settings"], result["records"]
    lengths = sorted({r["tokens"] for r in records})
    out = [
        f"Whole models with random weights, {settings['dtype']}, batch {settings['batch']}, through "
        f"`torch.compile`; {settings['shapes']}. A call is `{settings['call']}`. `dense` is {settings['dense']}. "
        f"`dense-causal` is {settings['dense-causal']}. Triangle is {settings['triangle']}. `+graphs` is "
        f"{settings['graphs']}. Time: {settings['timing']}. In brackets how much of the time is saved, "
        f"{settings['reduction']}.",
        f"![Time to first token]({picture})",
    ]
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model]
        out.append(f"### {model}\n\n{_times(own, lengths)}\n\n{_costs(own)}")
        if any(r["account"] for r in own):
            out.append(_accounts(own))
    if missing := [f"`{part}`" for part in ttft.names(False) if part not in {r["part"] for r in records}]:
        out.append(f"Not measured yet, by part of the case: {', '.join(missing)}.")
    return "\n\n".join(out)


def _times(records: list[Fields], lengths: list[int]) -> str:
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        of = {r["tokens"]: r for r in records if r["variant"] == variant}
        some = next(iter(of.values()))
        sparse = f"{some['triangle_layers']} of {some['layers']}"
        rows.append([f"`{variant}`", sparse, *(_cell(of.get(tokens)) for tokens in lengths)])
    return table(["variant, seconds", "triangle layers", *(f"{tokens:,}" for tokens in lengths)], rows)


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


def _costs(records: list[Fields]) -> str:
    rows = []
    for variant in dict.fromkeys(r["variant"] for r in records):
        of = [r for r in records if r["variant"] == variant]
        peaks = [r for r in of if r["peak_gib"] is not None]
        longest = max(peaks, key=lambda r: r["tokens"], default=None)
        compiled = next((r["compile_s"] for r in of if r["compile_s"] is not None), None)
        rows.append(
            [
                f"`{variant}`",
                "-" if longest is None else f"{longest['peak_gib']:.1f} at {longest['tokens']:,}",
                "-" if compiled is None else f"{compiled:.0f}",
                str(max(r["compilations"] for r in of)),
                of[-1]["lowerings"],
            ]
        )
    failed = [f"- `{r['variant']}` at {r['tokens']:,} tokens: {r['failed']}" for r in records if r["failed"]]
    return table(["variant", "peak memory, GiB", "compile, s", "graphs compiled", "lowerings"], rows) + (
        "\n\nFailed:\n\n" + "\n".join(failed) if failed else ""
    )


def _accounts(records: list[Fields]) -> str:
    rows = []
    for r in records:
        if not r["account"]:
            continue
        spent = _by_class(r["account"])
        shares = " | ".join(ms(spent[kind]) for kind in ("attention", "matmul", "other"))
        rows.append(f"`{r['variant']}` | {r['tokens']:,} | {ms(r['ms'])} | {shares} | {r['account']['kernels']:,}")
    limits = [
        f"- `{r['variant']}`, {r['tokens']:,} tokens: {percent(r['reduction'])} reached; "
        f"{percent(r['limit_reduction'])} if its {r['triangle_layers']} triangle layers cost only the floor."
        for r in records
        if r["limit_reduction"] is not None and r["ms"]
    ]
    return (
        "Where the time goes, milliseconds of GPU kernels in one call by the profiler:\n\n"
        + table(["variant", "tokens", "time", "attention", "matrix products", "other", "kernels"], rows)
        + ("\n\n**What limits it.** " + _LIMIT + "\n\n" + "\n".join(limits) if limits else "")
    )


def _by_class(account: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of kernels by class; those that the file names are in today's classes, whatever it put them in."""
    spent = {kind: account[f"{kind}_ms"] for kind in ("attention", "matmul", "other")}
    for name, stored, took in account["longest"]:
        spent[stored] -= took
        spent[kernel_class(name)] += took
    return spent


_LIMIT = (
    "The layers that stay dense keep their attention, and every layer its matrix products. The time saved, and the "
    "most that arithmetic allows:"
)
