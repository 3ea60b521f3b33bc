"""What streaming decode costs, for the message that says so when it is switched on."""

from __future__ import annotations

from tmx_compile.config import TriangleMixConfig

STREAMING_COST: str | None = None
"""A sentence with the measured quality cost and its result file under benchmarks/results; None: not measured yet."""

_UNMEASURED = "What this costs in quality has not been measured in this release: measure it on your own model."


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
        f"window of {config.sliding_window_size + 1}), whatever lies between them. {STREAMING_COST or _UNMEASURED}"
    )
