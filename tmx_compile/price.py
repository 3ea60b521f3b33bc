"""What streaming decode costs, for the message that says so when it is switched on."""

from __future__ import annotations

from tmx_compile.config import TriangleMixConfig

STREAMING_COST = {0.1: 0.014, 0.3: 0.24, 0.5: 0.60}
"""By the share of layers that stream, how much the perplexity of what follows a prompt rises.

SmolLM2-135M, prompts of 2,048 tokens, 8/64/128, the deepest layers: benchmarks/results/quality.json, docs/quality.md.
"""


def streaming_message(layers: int, of: int | None, config: TriangleMixConfig) -> str:
    """What is switched on, and its price.

    Args:
        layers: how many layers stream.
        of: how many layers the model has; None: not known yet.
        config: the geometry.
    """
    shares, costs = ([f"{x:.0%}" for x in values] for values in (STREAMING_COST, STREAMING_COST.values()))
    count = f"{layers} of {of} layers" if of is not None else f"{layers} layer{'' if layers == 1 else 's'}"
    seen = config.num_sink_tokens + config.sliding_window_size + 1
    return (
        f"streaming decode: in {count} generated tokens attend to {seen} keys ({config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window_size + 1}), whatever lies between them. On SmolLM2-135M "
        f"(8/64/128) perplexity rose by {', '.join(costs)} with {', '.join(shares)} of the layers, and copying from "
        "the prompt failed from 30% on: docs/quality.md. Measure your own model with `tmx evaluate --streaming`"
    )
