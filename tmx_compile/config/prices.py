"""What sparse layers cost, and what time dynamic ones take. ``prices.json`` has the figures and their sources."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask.geometry import Geometry

_CHOSEN = {"deepest": "the deepest", "gradient": "chosen by gradient"}


@functools.cache
def prices() -> dict[str, Any]:
    """The measured figures, from ``prices.json`` beside this module. Read once, and never changed.

    ``streaming``: for each of ``shares`` of the model's layers, the relative change of the ``perplexity`` of what
    follows a prompt of ``prompt`` tokens, and the share of a list in the prompt that is ``copied`` right. ``first_n``:
    the relative change of the perplexity of a prompt's last tokens, by which layers are sparse.
    ``dynamic``: the time of one dynamic layer over that of dense attention, by ``tokens`` and ``block``: to ``select``
    blocks by each method, and to ``attend`` to those of each ``density``. ``source`` and ``sources`` name the result
    files; docs/quality.md and docs/dynamic.md show it.
    """
    found: dict[str, Any] = json.loads(Path(__file__).with_name("prices.json").read_text(encoding="utf-8"))
    return found


def streaming_message(layers: int, of: int | None, config: TriangleMixConfig) -> str:
    """What is switched on, and its price.

    Args:
        layers: how many layers stream.
        of: how many layers the model has; None: not known yet.
        config: the geometry.
    """
    price = prices()["streaming"]
    count = f"{layers} of {of} layers" if of is not None else f"{layers} layer{'' if layers == 1 else 's'}"
    seen = config.num_sink_tokens + config.sliding_window_size + 1
    measured = "; ".join(
        f"{', '.join(f'{cost:+.1%}' for cost in choice['perplexity'])} and "
        f"{', '.join(f'{copied:.0%}' for copied in choice['copied'])} "
        f"({_CHOSEN[choice['policy']]}, {Geometry(*choice['geometry'])})"
        for choice in price["choices"]
    )
    return (
        f"streaming decode: in {count} generated tokens attend to {seen} keys ({config.num_sink_tokens} sinks and a "
        f"window of {config.sliding_window_size + 1}), whatever lies between them. On {prices()['model']} with "
        f"{', '.join(f'{share:.0%}' for share in price['shares'])} of the layers perplexity changed by, and of a list "
        f"in the prompt was copied right instead of {price['copied_by_dense']:.0%}: {measured}. See docs/serving.md, "
        "and measure your own model with `tmx evaluate --streaming`"
    )


def first_n_message(n: int) -> str:
    """What choosing the first ``n`` layers costs, and what to choose in their place."""
    price = prices()["first_n"]
    cost, layers = price["perplexity"], price["layers"]
    return (
        f"num_triangle_layers={n} makes the first {n} layers sparse, which is the worst choice: on {prices()['model']} "
        f"({layers} of {prices()['layers_of_model']} layers, {Geometry(*price['geometry'])}) it costs "
        f"{cost['first']:.0%} perplexity, the deepest {layers} layers {cost['deepest']:.1%}. "
        f"Use TriangleMixConfig.deepest({n}, num_layers=...) or triangle_layer_indices."
    )
