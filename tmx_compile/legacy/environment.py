"""How settings are written in environment variables. Reads none: ``TriangleMixInferenceConfig.from_env`` does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def _env_bool(text: str) -> bool:
    word = text.lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 0, 1, true, false, yes, no, on or off")


def _env_int(text: str) -> int:
    # Ten digits already pass every limit here; int() alone would also take "1_0" and other alphabets' digits.
    if not re.fullmatch(r"-?[0-9]{1,10}", text):
        raise ValueError("expected an integer")
    return int(text)


def _env_layers(text: str) -> tuple[str, Any]:
    if re.fullmatch(r"-?[0-9]+", text):
        return "num_triangle_layers", _env_int(text)
    indices: list[int] = []
    items = [item.strip() for item in text.removesuffix(",").split(",")]
    for item in items:
        match = re.fullmatch(r"([0-9]{1,10})(?:\s*-\s*([0-9]{1,10}))?", item)
        if match is None:
            raise ValueError(f"expected a count or a list such as 0,16-31; cannot read {item!r}")
        first, end = int(match[1]), int(match[2] or match[1])
        # A typing slip in a range must not become a list of millions.
        if not first <= end < first + 10_000:
            raise ValueError(f"range {item} is not an ascending range of layers")
        indices.extend(range(first, end + 1))
    return "triangle_layer_indices", indices


VARIABLES: dict[str, Callable[[str], tuple[str, Any]]] = {
    "VLLM_TRIANGLEMIX_ENABLED": lambda text: ("enable_trianglemix", _env_bool(text)),
    "VLLM_TRIANGLEMIX_LAYERS": _env_layers,
    "VLLM_NPU_OPTIMIZATION": lambda text: ("use_npu_optimization", _env_bool(text)),
    "VLLM_NPU_BLOCK_SIZE": lambda text: ("npu_block_size", _env_int(text)),
    "VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS": lambda text: ("use_gradient_analysis", _env_bool(text)),
}
"""By variable, what reads its text into the name and the value of a setting; ``ValueError`` for bad text."""
