"""The attention backend on NVIDIA GPUs: around ``FLASH_ATTN`` of vLLM 0.26. vLLM imports it by name.

Written after a version that ran on an H100 with both runners, eager and with CUDA graphs; not run in this form.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tmx_compile.integrations.vllm.backend import TriangleBuilder, TriangleImpl


class Builder(TriangleBuilder, FlashAttentionMetadataBuilder):
    """Adds the plan of a step."""

    # The kernels take a whole prompt with its last rows in one launch.
    whole_prompts = True

    use_full_cuda_graph: bool

    # A graph of a step with chunks of prompts would repeat that step's plan; one of decode steps holds none.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def lengths(self, common: Any) -> list[int] | None:
        """See :class:`TriangleBuilder`. The bound is exact but for drafts, whose rows are dense in any case."""
        bound: Tensor | None = common.seq_lens_cpu_upper_bound
        return None if bound is None else bound.tolist()

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

    def tokens(self, layer: Any, kv_cache: Tensor, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`TriangleImpl`. The cache is (blocks, Hkv, size, 2 D): a token's key, then its value."""
        if kv_cache.dim() != 4 or kv_cache.shape[1] != self.num_kv_heads or kv_cache.shape[3] != 2 * self.head_size:
            raise RuntimeError(
                f"vLLM's cache must be (blocks, {self.num_kv_heads}, size, {2 * self.head_size}), got "
                f"{tuple(kv_cache.shape)}"
            )
        found = kv_cache[blocks, :, slots]
        return found[..., : self.head_size], found[..., self.head_size :]


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
