"""Other implementations of the same mask, timed beside ours where they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tmx_compile.bench.layer import Peer
from tmx_compile.mask.geometry import Geometry


def peers() -> dict[str, Peer]:
    """What is installed, by the name of its records."""
    peer = minference_tri_shape()
    return {} if peer is None else {"minference_tri_shape": peer}


def minference_tri_shape() -> Peer | None:
    """The Triton kernel of MInference, by the authors of the method; None where the package is absent.

    It takes one key head for every query head. Expanding the keys is part of the call and of its time, because every
    grouped-query model has to do it in every layer.
    """
    if importlib.util.find_spec("minference") is None:
        return None
    from minference.ops.streaming_kernel import tri_shape_kernel

    def peer(query: Tensor, key: Tensor, value: Tensor, geometry: Geometry) -> Callable[[], Tensor] | None:
        sink, window, last = geometry.counts
        if query.device.type != "cuda" or not 0 < last < query.shape[2]:
            return None
        # Its window counts the row's own key.
        config: Any = {"attn_forward_config": {"n_init": sink, "n_local": window + 1, "n_last": last}}
        group = query.shape[1] // key.shape[1]

        def run() -> Tensor:
            keys, values = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(query.shape) for x in (key, value))
            out: Tensor = tri_shape_kernel(query, keys, values, config)
            return out

        return run

    return peer
