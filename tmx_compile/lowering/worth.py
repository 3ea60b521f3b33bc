"""From which length on the triangle mask is faster than dense attention, where the machine's own kernels are fast."""

from __future__ import annotations

import functools

import torch

from tmx_compile.mask import Geometry, pair_counts

_SHARE = 0.5
"""The triangle mask has to leave out half of the causal pairs: dense kernels get through more pairs a second, and at
this share ours were never slower (an H100, lengths from 2,112 on, windows from 32 to 1,024)."""

_LONGEST = 1 << 40


def least_length(lowering: str, device: torch.device, min_seq_len: int, geometry: Geometry) -> int:
    """The length up to which a prompt stays dense: ``min_seq_len``, or more where ``auto`` would lose to dense.

    Args:
        lowering: what the user chose; a name other than "auto" is taken at its word.
        device: where the attention runs. Only on CUDA are dense kernels that much better fed.
        min_seq_len: the configuration's.
        geometry: sinks, window, last rows.
    """
    if lowering != "auto" or device.type != "cuda":
        return min_seq_len
    return max(min_seq_len, break_even(geometry) - 1)


@functools.cache
def break_even(geometry: Geometry) -> int:
    """The least length from which on a prompt's mask keeps at most half of its causal pairs (2**40: never)."""
    low, high = 1, _LONGEST
    while low < high:
        middle = (low + high) // 2
        attended, causal = pair_counts(geometry, middle, middle)
        if attended <= _SHARE * causal:
            high = middle
        else:
            low = middle + 1
    return low
