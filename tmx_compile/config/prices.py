"""What streaming decode costs, for the message that says so when it is switched on."""

from __future__ import annotations

from tmx_compile.config import TriangleMixConfig

SHARES = (0.1, 0.3, 0.5)
STREAMING_COST = {
    ("the deepest", (8, 64, 128)): ((0.007, 0.81), (0.244, 0.23), (0.987, 0.02)),
    ("the deepest", (8, 512, 128)): ((-0.001, 0.80), (0.027, 0.29), (0.124, 0.09)),
    ("chosen by gradient", (8, 512, 128)): ((-0.000, 0.81), (0.004, 0.78), (0.104, 0.09)),
}
"""For each of ``SHARES`` of the layers: how much the perplexity of what follows a prompt rises, and the share of a list
in the prompt that is copied right. By the layers that stream and their geometry.

SmolLM2-135M, prompts of 4,096 tokens: benchmarks/results/quality_cuda.json, docs/quality.md.
"""
COPIED_BY_DENSE = 0.82


def streaming_message(layers: int, of: int | None, config: TriangleMixConfig) -> str:
    """What is switched on, and its price.

    Args:
        layers: how many layers stream.
        of: how many layers the model has; None: not known yet.
        config: the geometry.
    """
    count = f"{layers} of {of} layers" if of is not None else f"{layers} layer{'' if layers == 1 else 's'}"
    seen = config.num_sink_tokens + config.sliding_window_size + 1
    measured = "; ".join(
        f"{', '.join(f'{cost:+.1%}' for cost, _ in found)} and {', '.join(f'{copied:.0%}' for _, copied in found)} "
        f"({which}, {'/'.join(map(str, geometry))})"
        for (which, geometry), found in STREAMING_COST.items()
    )
    return (
        f"streaming decode: in {count} generated tokens attend to {seen} keys ({config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window_size + 1}), whatever lies between them. On SmolLM2-135M with "
        f"{', '.join(f'{share:.0%}' for share in SHARES)} of the layers perplexity changed by, and of a list in the "
        f"prompt was copied right instead of {COPIED_BY_DENSE:.0%}: {measured}. See docs/serving.md, and measure your "
        "own model with `tmx evaluate --streaming`"
    )
