"""Attention with the mask written out, a chunk of rows at a time: the numbers that everything is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.mask.geometry import Geometry

# Cells of one chunk of scores.
CELLS = 2**26


def precise_dtype(query: Tensor) -> torch.dtype:
    """float32 where 16-bit numbers on CUDA are checked, else float64, which is as exact as anybody asks."""
    return torch.float32 if query.device.type == "cuda" and query.element_size() == 2 else torch.float64


def attention_rows(query: Tensor, key: Tensor, value: Tensor, rows: Tensor, geometry: Geometry) -> Tensor:
    """Rows of causal triangle attention (1, H, R, D) in :func:`precise_dtype`, for queries (1, H, N, D).

    Nothing of the package's own masks or kernels takes part. A ``last`` of N gives dense causal attention.

    Args:
        query: (1, H, N, D).
        key: (1, Hkv, N, D), Hkv dividing H.
        value: like ``key``.
        rows: (R,) int64, the rows to compute, in any order.
        geometry: sinks, window and last rows.
    """
    sink, window, last = geometry.counts
    _, heads, n, dim = query.shape
    group = heads // key.shape[1]
    precise = precise_dtype(query)
    out = query.new_empty(1, heads, len(rows), dim, dtype=precise)
    column = torch.arange(n, device=query.device)[None, :]
    chunk = max(1, CELLS // (group * n))
    for kv_head in range(key.shape[1]):
        keys, values = key[0, kv_head].to(precise), value[0, kv_head].to(precise)
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        for first in range(0, len(rows), chunk):
            row = rows[first : first + chunk, None]
            queries = query[0, of_group, row[:, 0]].to(precise)
            attend = (column <= row) & ((column < sink) | (row - column <= window) | (row >= n - last))
            scores = (queries @ keys.T) * dim**-0.5
            weights = torch.softmax(scores.masked_fill_(~attend, float("-inf")), -1)
            out[0, of_group, first : first + chunk] = weights @ values
    return out


def sampled_rows(n: int, geometries: list[Geometry], count: int, device: torch.device) -> Tensor:
    """Distinct rows of ``n``, ascending: where the masks change, and about ``count`` others at random.

    The masks change at the first rows, the ends of sinks and window, the border of the last rows, the final ones.
    """
    wanted = {*range(min(16, n)), *range(max(0, n - 16), n)}
    for sink, window, last in (geometry.counts for geometry in geometries):
        for border in (sink, window, sink + window, n - last):
            wanted |= {row for row in range(border - 4, border + 4) if 0 <= row < n}
    generator = torch.Generator().manual_seed(n)
    wanted |= set(torch.randint(0, n, (count,), generator=generator).tolist())
    return torch.tensor(sorted(wanted), device=device)


def largest_error(out: Tensor, rows: Tensor, expected: Tensor) -> float:
    """The largest absolute difference of rows of ``out`` (1, H, N, D) from ``expected`` (1, H, R, D); nan if any is."""
    # Head by head: all heads of a million tokens are more numbers than 32-bit indices reach.
    heads = range(out.shape[1])
    differences = [(out[0, h].index_select(0, rows).to(expected.dtype) - expected[0, h]).abs().max() for h in heads]
    return float(torch.stack(differences).max())
