"""The attention backend on NVIDIA GPUs: around ``FLASH_ATTN`` of vLLM 0.26. vLLM imports it by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tmx_compile.integrations.vllm.backend import Active, TriangleBuilder, TriangleImpl, active
from tmx_compile.integrations.vllm.gather import Places, Scratch, from_packed, together
from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.devices import multiprocessors


class Builder(TriangleBuilder, FlashAttentionMetadataBuilder):
    """Adds the plan of a step."""

    # The kernels take a whole prompt with its last rows in one launch.
    whole_prompts = True

    use_full_cuda_graph: bool

    # A graph of a step with chunks of prompts would repeat that step's plan; one of decode steps holds none.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def lengths(self, common: Any) -> Tensor | None:
        """See :class:`TriangleBuilder`. The bound is exact but for drafts, whose rows are dense in any case."""
        bound: Tensor | None = common.seq_lens_cpu_upper_bound
        return bound

    def build_dense(self, common: Any) -> Any:
        """The platform's metadata for the dense rows, in memory of its own."""
        # With full graphs the builder writes into one buffer, which the step's own metadata already holds.
        kept: bool = self.use_full_cuda_graph
        self.use_full_cuda_graph = False
        try:
            return super().build_dense(common)
        finally:
            self.use_full_cuda_graph = kept


class Impl(TriangleImpl, FlashAttentionImpl):
    """Computes streaming rows."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.engine = get_current_vllm_config()

    def profiled(self, layer: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See :class:`TriangleImpl`. Here kernels are compiled."""
        on = active(self.engine, query.device)
        if on is not None and layer.layer_name in on.sparse:
            self.prepare(on, query, key, value)

    def kernel_steps(self, query: Tensor) -> tuple[int, ...]:
        """See :class:`TriangleImpl`."""
        return tuning.row_steps(query.shape[1], multiprocessors(query.device))

    def prepare(self, on: Active, query: Tensor, key: Tensor, value: Tensor) -> None:
        """See :class:`TriangleImpl`. There is no cache yet; one block stands for it."""
        if not on.prepared:
            some = key.new_zeros(1, 16, self.num_kv_heads, 2 * self.head_size).transpose(1, 2)
            table = torch.zeros(1, dtype=torch.int32, device=key.device)
            self.together(None, some, Places(table, 16, 1, 1, 0), key[:1], value[:1], on.scratch)
        super().prepare(on, query, key, value)

    def together(
        self, layer: Any, kv_cache: Tensor, earlier: Places, key: Tensor, value: Tensor, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """See :class:`TriangleImpl`. Here in one launch."""
        return together(kv_cache, self.head_size, earlier, key, value, scratch)

    def tokens(self, layer: Any, kv_cache: Tensor, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`TriangleImpl`."""
        return from_packed(kv_cache, self.num_kv_heads, self.head_size, blocks, slots)


class TriangleBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with triangle layers; its name stays, because vLLM looks members of an enumeration up by it."""

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """The implementation."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        """The builder of metadata."""
        return Builder
