"""What streaming decode costs, for the message that says so when it is switched on."""

from __future__ import annotations

from collections.abc import Iterator

from tmx_compile.config import TriangleMixConfig

STREAMING_COST = {
    ("the deepest", (8, 64, 128)): {0.1: 0.007, 0.3: 0.244, 0.5: 0.987},
    ("chosen by gradient", (8, 512, 128)): {0.1: 0.000, 0.3: 0.004, 0.5: 0.104},
}
"""How much the perplexity of what follows a prompt rises, by the layers that stream, their geometry and their share.

SmolLM2-135M, prompts of 4,096 tokens: benchmarks/results/quality_cuda.json, docs/quality.md. Copying from the prompt
fails from 30% on with the former, at 50% with the latter.
"""


def streaming_message(layers: int, of: int | None, config: TriangleMixConfig) -> str:
    """What is switched on, and its price.

    Args:
        layers: how many layers stream.
        of: how many layers the model has; None: not known yet.
        config: the geometry.
    """
    count = f"{layers} of {of} layers" if of is not None else f"{layers} layer{'' if layers == 1 else 's'}"
    seen = config.num_sink_tokens + config.sliding_window_size + 1
    return (
        f"streaming decode: in {count} generated tokens attend to {seen} keys ({config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window_size + 1}), whatever lies between them. On SmolLM2-135M with 10%, 30% and "
        f"50% of the layers perplexity rose by {'; by '.join(_measured())}; where it rose by a tenth or more, nothing "
        "could be copied from the prompt any more: docs/quality.md. Measure your own model with "
        "`tmx evaluate --streaming`"
    )


def _measured() -> Iterator[str]:
    for (layers, geometry), costs in STREAMING_COST.items():
        *most, last = (f"{cost:.1%}" for cost in costs.values())
        yield f"{', '.join(most)} and {last} ({layers}, {'/'.join(map(str, geometry))})"
