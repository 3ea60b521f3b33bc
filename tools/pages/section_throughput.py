"""The page's sections on tokens per second end to end."""

from __future__ import annotations

from tools.pages.markdown import Fields, ms, table, times

_HEAD = ("batch x prompt", "variant", "prefill, s", "decode, s", "tokens/s, end to end", "decoding only", "cache, MiB")


def section(result: Fields) -> str:
    settings, records = result["settings"], result["records"]
    used = list(dict.fromkeys(r["variant"] for r in records))
    geometry = "/".join(str(settings[n]) for n in ("num_sink_tokens", "sliding_window_size", "num_last_tokens"))
    out = [
        f"{settings['model']}, {settings['dtype']}; {settings['triangle_layers']} are triangle layers, geometry "
        f"{geometry}. A prompt for each sequence of the batch, then {settings['new_tokens']} generated tokens for "
        f"each. Prompts: {settings['prompts']}. Generated: {settings['generated']}. Sizes: {settings['sizes']}.",
        "\n".join(f"- `{name}`: {settings[name]}." for name in used),
        f"Calls: `{settings['calls']}`. Attention: {settings['attention']}. Tokens per second end to end: "
        f"{settings['tokens_per_s']}. Cache: {settings['cache_mib']}. In brackets the speed against `dense` with "
        "the same batch; more than 1x is faster.",
        table(_HEAD, [_row(r) for r in records]),
        _costs(records),
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


def _row(record: Fields) -> list[str]:
    head = [_workload(record), f"`{record['variant']}`"]
    if record["failed"]:
        return [*head, "failed", "", "", "", ""]

    def against(text: str, ratio: float | None) -> str:
        return text if record["variant"] == "dense" or ratio is None else f"{text} ({times(ratio)})"

    return [
        *head,
        against(f"{record['prefill_s']:.3g}", record["prefill_ratio"]),
        f"{record['decode_s']:.3g}",
        against(ms(record["tokens_per_s"]), record["ratio"]),
        against(ms(record["decode_tokens_per_s"]), record["decode_ratio"]),
        f"{record['cache_prompt_mib']:,.0f}, {record['cache_mib']:,.0f}",
    ]


def _costs(records: list[Fields]) -> str:
    rows = []
    for r in records:
        if not r["failed"]:
            peak = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
            counts = [str(r["compilations"]), str(r["recompiles"]), str(r["rounds"])]
            like = f"{r['like_dense']:.0%}" if r["like_dense"] is not None else "-"
            rows.append(
                [_workload(r), f"`{r['variant']}`", f"{r['compile_s']:.0f}", *counts, peak, like, r["lowerings"]]
            )
    head = ["batch x prompt", "variant", "first run, s", "graphs compiled", "after the first run", "rounds"]
    return (
        "What is not in those times. The first run compiles; compile caches are shared, so later rows find what "
        "earlier ones made. *As dense* is the share of greedy choices that are those of `dense`, each after the same "
        "tokens.\n\n" + table([*head, "peak, GiB", "as dense", "lowerings"], rows)
    )


def _limits(records: list[Fields]) -> str:
    """What the figures say about the two halves of the time."""
    dense = [r for r in records if r["variant"] == "dense" and not r["failed"]]
    shares = [f"{r['prefill_s'] / (r['prefill_s'] + r['decode_s']):.0%} at {_workload(r)}" for r in dense]
    return (
        "**What limits it.** Triangle layers work on the prompt, streaming on what follows, and end to end each counts "
        f"by its share of the time. Of `dense` the prompt takes {', '.join(shares)}. A decode step also reads every "
        "weight, in all variants alike, and attention over the cache in the layers that stay dense. What streaming "
        "decode costs in quality is a measurement of its own."
    )
