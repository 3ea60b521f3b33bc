"""The blocks on the memory of a prefill, and of a cache that streams."""

from __future__ import annotations

from tools.pages.markdown import Fields, slashed, table, times


def prefill(result: Fields) -> str:
    """Dense, half and all of the layers sparse, each in a process of its own."""
    settings, records = result["settings"], result["records"]
    rows = [
        [
            f"{r['triangle_layers']} of {settings['layers']}",
            f"{r['added_mib']:,.0f}",
            f"{r['added_share']:.0%}",
            f"{r['s']:.1f}",
            times(r["speedup"]),
        ]
        for r in records
    ]
    geometry = slashed([settings[n] for n in ("num_sink_tokens", "sliding_window_size", "num_last_tokens")])
    tokens = settings["tokens"]
    return (
        f"{tokens:,} tokens, {settings['padding']} of them left padding; {settings['model']}; {settings['layers']} "
        f"layers, {settings['dtype']}, {geometry}. Peak memory beyond the model's own; time of a second call.\n\n"
        + table(["triangle layers", "added, MiB", "of dense", "seconds", "speed-up"], rows)
        + f"\n\nA ({tokens:,}, {tokens:,}) mask alone takes {4 * tokens * tokens / 2**20:,.0f} MiB in float32."
    )


def kv_cache(result: Fields) -> str:
    """By the number of streaming layers."""
    settings, records = result["settings"], result["records"]
    rows = [
        [str(r["streaming_layers"]), f"{r['counted_mib']:,.1f}", f"{r['saving']:.1%}", f"{r['large_gib']:.2f}"]
        for r in records
    ]
    half, most = settings["least_layers_for_50_and_75_percent"]
    held = settings["num_sink_tokens"] + settings["sliding_window_size"] + 1
    layers = settings["layers"]
    return (
        f"The cache after a prompt of {settings['tokens']:,} tokens and one decode step: {layers} layers, "
        f"{settings['kv_heads']} key heads of {settings['head_dim']}, {settings['dtype']}, {held} keys kept in a "
        "streaming layer. Last column: the size of Qwen3-14B's cache, by arithmetic.\n\n"
        + table(["streaming layers", "MiB", "saving", "14B, GiB"], rows)
        + f"\n\nHalf of the cache takes {half} of {layers} layers ({half / layers:.0%}), three quarters {most} "
        f"({most / layers:.0%})."
    )
