"""Streaming rows by vLLM's own CPU kernel, which knows causal attention and one sliding window, and no sinks.

Attention does not mind the order of its keys. So rows go in blocks of at most ``window + 1``, each a sequence of its
own whose keys are ordered [the window before its first row | sinks | its rows]: ``window + sink + 1`` keys that end at
a row are then exactly those that it attends to, since one more row takes one more key at the end and drops one at the
start. Rows so early that sinks and window meet attend to every key before them, as that many keys let them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tmx_compile.mask.geometry import Geometry

NAME = "vllm"
"""What ``lowering`` calls this."""
TILE = 32
"""Keys that vLLM's kernels take at once: pages are multiples of it."""
_SHORTEST = 16
"""A window shorter than this makes blocks of so few rows that the blocked lowering is chosen instead."""


def pays(geometry: Geometry) -> bool:
    """Whether this is what computes streaming rows on a CPU unless told otherwise."""
    return geometry.window >= _SHORTEST and geometry.reach is None


@dataclass(frozen=True)
class Sequences:
    """Blocks of rows as sequences of a step.

    Attributes:
        window: keys that a row attends to at most, its own among them.
        starts: (sequences + 1,) int32, the first row of each.
        lengths: (sequences,) int32, keys of each.
        page: tokens of a page; each sequence has one.
        keys: (tokens,) int64, which keys these are, one sequence after the other.
        slots: (tokens,) int64, their places in the pages.
    """

    window: int
    starts: Tensor
    lengths: Tensor
    page: int
    keys: Tensor
    slots: Tensor


@functools.lru_cache(maxsize=16)
def sequences(rows: int, keys: int, geometry: Geometry) -> Sequences:
    """The sequences of the last ``rows`` of ``keys`` positions; ``geometry``'s last rows are not looked at.

    Kept for the other layers of a step.
    """
    sink, window = geometry.sink, geometry.window
    first = keys - rows
    early = min(max(0, window + sink - first), rows)
    parts = [torch.arange(first + early)] if early else []
    counts = [early] if early else []
    before = window + sink
    # Whole tiles: as many rows as fill them.
    page = max((before + window + 1) // TILE, before // TILE + 1) * TILE
    size = min(window + 1, page - before)
    for begin in range(first + early, keys, size):
        end = min(begin + size, keys)
        parts.append(torch.cat([torch.arange(begin - window, begin), torch.arange(sink), torch.arange(begin, end)]))
        counts.append(end - begin)
    lengths = [len(part) for part in parts]
    return Sequences(
        before + 1,
        torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        page,
        torch.cat(parts),
        torch.cat([torch.arange(count) + number * page for number, count in enumerate(lengths)]),
    )


def stream(
    kernels: Any, query: Tensor, key: Tensor, value: Tensor, geometry: Geometry, scale: float, isa: str, out: Tensor
) -> None:
    """Streaming rows (rows, H, D) over keys and values (n, Hkv, D) that end at the last row, into ``out``.

    Args:
        kernels: vLLM's operators, ``torch.ops._C``.
        query: (rows, H, D), rows at least 1.
        key: (n, Hkv, D), n at least rows.
        value: like ``key``.
        geometry: sinks and window; its last rows are not looked at.
        scale: factor on the products.
        isa: which of vLLM's kernels.
        out: (rows, H, D).
    """
    rows, heads, dim = query.shape
    plan = sequences(rows, key.shape[0], geometry)
    count = len(plan.lengths)
    # Numbers behind a sequence's end count for nothing, but must be numbers.
    cache = key.new_zeros(count, key.shape[1], 2 * plan.page, dim)
    halves = cache.chunk(2, dim=2)
    scales = (1.0, 1.0, "auto")
    kernels.cpu_attn_reshape_and_cache(key[plan.keys], value[plan.keys], *halves, plan.slots, isa, *scales)
    made = kernels.get_scheduler_metadata(
        count, heads, key.shape[1], dim, plan.lengths, query.dtype, plan.starts, True, plan.window, isa,
        True, None,
    )  # fmt: skip
    table = torch.arange(count, dtype=torch.int32)[:, None]
    kernels.cpu_attention_with_kv_cache(
        query, *halves, out, plan.starts, plan.lengths, scale, True, None, plan.window, table, 0.0, made, None,
        None, *scales,
    )  # fmt: skip
