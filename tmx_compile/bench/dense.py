"""Dense causal attention by every SDPA backend that a device has."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tmx_compile.bench.timing import describe

BACKENDS = {
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH},
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
}
# The math backend writes all scores out.
_MATH_UP_TO = 4096


def dense_variants(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """``F.scaled_dot_product_attention(is_causal=True)`` by backend name, and why a backend is left out.

    A backend that takes no grouped queries gets keys and values that were expanded beforehand: that time and memory
    are not counted against it.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    refused: dict[str, str] = {}
    expanded: list[Tensor] = []
    for name, backend in BACKENDS[query.device.type].items():
        if backend is SDPBackend.MATH and query.shape[2] > _MATH_UP_TO:
            continue
        try:
            found[name] = _works(_call(backend, query, key, value, grouped=True))
        except RuntimeError:
            group = query.shape[1] // key.shape[1]
            expanded = expanded or [x.repeat_interleave(group, 1) for x in (key, value)]
            try:
                found[name] = _works(_call(backend, query, *expanded, grouped=False))
            except RuntimeError as error:
                refused[f"dense {name}"] = describe(error)
    return found, refused


def _call(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, *, grouped: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    return run


def _works(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        # A backend that refuses warns once for every reason it has.
        warnings.simplefilter("ignore")
        run()
    return run
