"""The attention backend on a CPU: around ``CPU_ATTN``. vLLM imports it by name."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)

from tmx_compile.integrations.vllm import pages
from tmx_compile.integrations.vllm.backend import Active, TriangleBuilder, TriangleImpl


class Builder(TriangleBuilder, CPUAttentionMetadataBuilder):
    """Adds the plan of a step."""

    def lengths(self, common: Any) -> Tensor | None:
        """See :class:`TriangleBuilder`; everything is on the host."""
        lengths: Tensor = common.seq_lens
        return lengths


class Impl(TriangleImpl, CPUAttentionBackendImpl):
    """Computes streaming rows."""

    def stream(self, on: Active, query: Tensor, key: Tensor, value: Tensor, last: int, out: Tensor) -> None:
        """See :class:`TriangleImpl`; ``last`` is 0 here, where last rows are the platform's."""
        if on.lowering != pages.NAME:
            super().stream(on, query, key, value, last, out)
            return
        isa = _get_attn_isa(query.dtype, pages.TILE, query.shape[2])
        pages.stream(torch.ops._C, query, key, value, on.geometry, self.scale, isa, out)

    def tokens(self, layer: Any, kv_cache: Tensor, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`TriangleImpl`. The cache (blocks, Hkv, size, 2 D) is two halves, ordered as the kernels like."""
        number, heads, size, _ = kv_cache.shape
        halves = kv_cache.view(number, heads, 2 * size, -1).chunk(2, dim=2)
        head = torch.arange(heads)[None, :, None]
        # In 0.32 the layer has it, in 0.26 the implementation.
        isa = getattr(self, "isa", None) or layer.isa
        keys, values = (
            half.flatten(2)[blocks[:, None, None], head, order[slots][:, None, :]]
            for half, order in zip(halves, cache_order(isa, kv_cache.dtype, size, self.head_size), strict=True)
        )
        return keys, values


class TriangleBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with triangle layers; its name stays, because vLLM looks members of an enumeration up by it."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The implementation."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The builder of metadata."""
        return Builder


@functools.cache
def cache_order(isa: str, dtype: torch.dtype, size: int, dim: int) -> tuple[Tensor, Tensor]:
    """Where a block of keys, and one of values, holds each number: (size, dim) places among a head's, int64.

    The kernels transpose and interleave as their instructions like it, and none of them says how. So numbers are
    written by vLLM's own function, and looked for: in digits of four bits, which every dtype holds exactly.
    """
    number = torch.arange(size * dim).view(size, 1, dim)
    found = [torch.zeros(size * dim, dtype=torch.int64) for _ in range(2)]
    for digit in range(-(-(size * dim - 1).bit_length() // 4)):
        written = ((number >> 4 * digit) & 15).to(dtype)
        cache = torch.zeros(2, 1, 2 * size, dim, dtype=dtype)
        halves = cache.chunk(2, dim=2)
        slots = torch.arange(size) + size
        _custom_ops.cpu_attn_reshape_and_cache(
            written, written, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )
        for place, half in enumerate(halves):
            found[place] += half[1, 0].reshape(-1).long() << 4 * digit
    keys, values = (each.argsort().view(size, dim) for each in found)
    if not all(torch.equal(each.sort().values, number.view(-1)) for each in found):
        raise RuntimeError(f"vLLM's cache for {isa}, {dtype}, blocks of {size} and head_dim {dim} is not a permutation")
    return keys, values
