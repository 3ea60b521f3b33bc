"""The blocks on tokens per second end to end."""

from __future__ import annotations

from tools.pages.markdown import Fields, ms, slashed, table, times

_HEAD = ("batch x prompt", "variant", "prefill, s", "tokens/s, end to end", "decoding only", "cache, MiB")


def section(result: Fields) -> str:
    """The smallest and the largest batch; what is in between is in the file."""
    settings, records = result["settings"], result["records"]
    geometry = slashed([settings[n] for n in ("num_sink_tokens", "sliding_window_size", "num_last_tokens")])
    batches = [r["batch"] for r in records]
    ends = [r for r in records if r["batch"] in (min(batches), max(batches))]
    out = [
        f"{settings['model']}, {settings['dtype']}; triangle layers: {settings['triangle_layers']}, {geometry}. "
        f"{settings['new_tokens']} tokens follow each prompt.",
        table(_HEAD, _rows(ends)),
        _first_runs(records),
    ]
    if failed := [f"- `{r['variant']}`, {_workload(r)}: {r['failed']}" for r in records if r["failed"]]:
        out.append("Failed:\n\n" + "\n".join(failed))
    missing = [f"`batch-{batch}`" for batch, _, _ in settings["workloads"] if all(r["batch"] != batch for r in records)]
    if missing:
        out.append(f"Not measured yet, by part of the case: {', '.join(missing)}.")
    out.append(_limits(records))
    return "\n\n".join(out)


def _workload(record: Fields) -> str:
    return f"{record['batch']} x {record['tokens']:,}"


def _rows(records: list[Fields]) -> list[list[str]]:
    """The batch and the prompt stand in the first of their rows."""
    rows = [_row(r) for r in records]
    return [row if i == 0 or rows[i - 1][0] != row[0] else ["", *row[1:]] for i, row in enumerate(rows)]


def _row(record: Fields) -> list[str]:
    head = [_workload(record), f"`{record['variant']}`"]
    if record["failed"]:
        return [*head, "failed", "", "", ""]

    def against(text: str, ratio: float | None) -> str:
        return text if record["variant"] == "dense" or ratio is None else f"{text} ({times(ratio)})"

    return [
        *head,
        against(f"{record['prefill_s']:.3g}", record["prefill_ratio"]),
        against(ms(record["tokens_per_s"]), record["ratio"]),
        against(ms(record["decode_tokens_per_s"]), record["decode_ratio"]),
        f"{record['cache_mib']:,.0f}",
    ]


def _first_runs(records: list[Fields]) -> str:
    """What is not in the times: compiling, and how often the greedy choice is another."""
    said = []
    for variant in dict.fromkeys(r["variant"] for r in records if not r["failed"]):
        of = [r for r in records if r["variant"] == variant and not r["failed"]]
        like = [r["like_dense"] for r in of if r["like_dense"] is not None]
        agreed = f", {_span(like, '.0%')} alike" if like and variant != "dense" else ""
        said.append(f"`{variant}` {_span([r['compile_s'] for r in of], '.0f')} s{agreed}")
    return f"First run, and greedy choices that are those of `dense`: {'; '.join(said)}."


def _span(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _limits(records: list[Fields]) -> str:
    """The share of the time that triangle layers work on."""
    dense = [r for r in records if r["variant"] == "dense" and not r["failed"]]
    shares = [f"{r['prefill_s'] / (r['prefill_s'] + r['decode_s']):.0%} at {_workload(r)}" for r in dense]
    return f"Of `dense` the prompt takes {', '.join(shares)}."
