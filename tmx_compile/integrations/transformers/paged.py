"""Continuous batching (``generate_batch``, ``transformers serve``): requests packed in one sequence, a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from tmx_compile.integrations.transformers.causal_mask import causal_mask

# How the packed call says what belongs to whom; one request's call has nothing of it.
_PACKING = ("cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index")


def no_mask(**arguments: Any) -> None:
    """The mask interface of packed calls: their requests' lengths say everything."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def paged_attention(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    settings: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention of one layer, request by request.

    Args:
        attend: attention of one request, called as Transformers calls an attention function.
        module: the layer's attention.
        query: (1, H, rows of all requests, D).
        key: (1, Hkv, rows of all requests, D), to be put into the cache.
        value: (1, Hkv, rows of all requests, Dv).
        scaling: factor on the scores.
        settings: with the paged ``cache`` and the cumulative lengths of the requests.

    Returns:
        out (1, rows, H, Dv), 0 in rows of no request, and None in place of the weights.

    Raises:
        ValueError: a call that is not one of continuous batching.
    """
    cache = settings.get("cache")
    if cache is None or settings.get("cu_seq_lens_q") is None:
        raise ValueError("this implementation is for continuous batching (generate_batch), and got a call without it")
    if query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError("lengths are read on the host: pass ContinuousBatchingConfig(use_cuda_graph=False)")
    window = settings.get("sliding_window")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=settings)
    rows, keys = (settings[name].tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    settings = {name: given for name, given in settings.items() if name not in _PACKING}
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    for (begin, end), (first, last) in zip(pairwise(rows), pairwise(keys), strict=True):
        if begin == end:
            continue
        # A sliding layer may have let go of the keys before a chunk.
        before = 0 if window is None or end - begin == last - first else 1
        mask = causal_mask(
            batch_size=1,
            q_length=end - begin,
            kv_length=last - first,
            q_offset=last - first - (end - begin) + before,
            kv_offset=before,
            mask_function=causal_mask_function if window is None else sliding_window_causal_mask_function(window),
            local_size=window,
            device=query.device,
        )
        part = query[:, :, begin:end], key[:, :, first:last], value[:, :, first:last]
        out[:, begin:end] = attend(module, *part, mask, scaling=scaling, **settings)[0]
    return out, None
