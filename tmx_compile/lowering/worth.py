"""From which length on the triangle mask is faster than dense attention, where the machine's own kernels are fast."""

from __future__ import annotations

import functools

import torch

from tmx_compile.mask import Geometry, pair_counts

_SHARE = 0.5
"""The triangle mask has to leave out half of the causal pairs: dense kernels get through more pairs a second, and at
this share ours were never slower on the GPU, nor their backward (an H100, lengths from 2,112 on, windows from 32 to
1,024: benchmarks/results/short_prompts.json)."""

_LEAST_WORK = {False: 6 * 10**9, True: 18 * 10**9}
"""Causal pairs x query heads x head dim of a sequence, in inference and in training, from which on no plain call lost
to dense in that file. With less dense attention is done before the host has launched ours; CUDA graphs would have no
such limit."""

_LONGEST = 1 << 40


def least_length(
    lowering: str,
    device: torch.device,
    min_seq_len: int,
    geometry: Geometry,
    width: int | None = None,
    training: bool = False,
) -> int:
    """The length up to which a prompt stays dense: ``min_seq_len``, or more where ``auto`` would lose to dense.

    Args:
        lowering: what the user chose; a name other than "auto" is taken at its word.
        device: where the attention runs. Only on CUDA are dense kernels that much better fed.
        min_seq_len: the configuration's.
        geometry: sinks, window, last rows.
        width: query heads x head dim, where they are known.
        training: whether a backward pass follows.
    """
    if lowering != "auto" or device.type != "cuda":
        return min_seq_len
    least = max(min_seq_len, break_even(geometry) - 1)
    return least if width is None else max(least, least_for_width(width, training))


def least_for_width(width: int, training: bool) -> int:
    """The length up to which dense attention, of ``width`` query heads x head dim, is done before ours is launched."""
    # Dynamo traces this, also for a symbolic width, of which it knows no isqrt.
    return int((2 * _LEAST_WORK[training] // width) ** 0.5)


@functools.cache
def break_even(geometry: Geometry, share: float = _SHARE) -> int:
    """The least length from which on a prompt's mask keeps at most this share of its causal pairs (2**40: never)."""
    low, high = 1, _LONGEST
    while low < high:
        middle = (low + high) // 2
        attended, causal = pair_counts(geometry, middle, middle)
        if attended <= share * causal:
            high = middle
        else:
            low = middle + 1
    return low
