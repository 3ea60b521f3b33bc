"""Masks in the form that NPU kernels take, and block-sparse attention under an explicit mask."""

from __future__ import annotations

import torch
from torch import Tensor

from tmx_compile.config import as_count
from tmx_compile.legacy import block_sparse
from tmx_compile.legacy.masks import check_inf_dtype
from tmx_compile.legacy.operands import as_mask, as_scale, check_tensor, check_tensors

NPU_MASKED = -1e6
"""What stands for -inf in a mask for NPU kernels."""


class AscendNPUTriangleMixOptimizer:
    """Static helpers of the original API for Ascend NPUs; they run on any device.

    >>> import torch
    >>> from tmx_compile import AscendNPUTriangleMixOptimizer, TriangleMixConfig, TriangleMixMaskGenerator
    >>> masks = TriangleMixMaskGenerator(TriangleMixConfig(4, 32, 16))
    >>> mask = masks.get_attention_mask(128, layer_idx=0, use_triangle=True)
    >>> mask = AscendNPUTriangleMixOptimizer.optimize_mask_for_npu(mask)
    >>> query, key = torch.randn(1, 128, 4, 16), torch.randn(1, 128, 2, 16)
    >>> AscendNPUTriangleMixOptimizer.sparse_attention_kernel(query, key, key, mask, scale=0.25).shape
    torch.Size([1, 128, 4, 16])
    """

    @staticmethod
    def optimize_mask_for_npu(mask: Tensor, block_size: int = 64) -> Tensor:
        """Return a copy of an additive mask without infinities: -inf becomes -1e6.

        In float16, which cannot hold -1e6, it becomes the most negative finite value, -65504; bfloat16 rounds -1e6 to
        -999424. Whatever lies below that value becomes it too; 0 and every other finite value stay.

        Args:
            mask: additive mask of any shape; float16, bfloat16, float32 or float64.
            block_size: rows and keys of a block of the kernel that will read it. The kernel here takes lengths that
                are no multiple of it, so the shape is kept.

        Raises:
            ValueError: ``mask`` is no tensor of such a dtype, or ``block_size`` no positive integer.

        >>> import torch
        >>> from tmx_compile import AscendNPUTriangleMixOptimizer
        >>> AscendNPUTriangleMixOptimizer.optimize_mask_for_npu(torch.tensor([0.0, float("-inf")]))
        tensor([       0., -1000000.])
        """
        check_tensor("mask", mask)
        check_inf_dtype(mask.dtype, "mask.dtype")
        as_count("block_size", block_size, minimum=1)
        return mask.clamp(min=max(NPU_MASKED, torch.finfo(mask.dtype).min))

    @staticmethod
    def sparse_attention_kernel(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, block_size: int = 64
    ) -> Tensor:
        """Softmax attention under an explicit mask; blocks that the mask empties are not computed.

        Sums and products are float32 (float64 for float64 inputs), so nothing overflows in float16. How many blocks are
        left is read on the host, which waits for the device, and breaks a graph under ``torch.compile``. Differentiable
        in query, key, value and mask.

        Args:
            query: (batch, rows, heads, head_dim), any floating dtype.
            key: (batch, keys, key heads, head_dim); the key heads divide the heads, and are never expanded.
            value: (batch, keys, key heads, any head_dim).
            mask: (rows, keys) or (1 or batch, 1 or heads, rows, keys), added to the scaled scores; its dtype may differ
                from query's. From -1e4 down (-inf, -1e6, -65504 alike) it masks: such a pair has no weight at all. A
                boolean mask is refused: True attends in PyTorch and masks on an NPU.
            scale: factor on the scores.
            block_size: rows and keys of a block; the lengths need not be multiples of it.

        Returns:
            (batch, rows, heads, value's head_dim) in query's dtype; a row that attends to nothing is 0.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, a scale that is no finite number, or a block size
                that is no positive integer; before any work.

        >>> import torch
        >>> import torch.nn.functional as F
        >>> from tmx_compile import AscendNPUTriangleMixOptimizer
        >>> query, mask = torch.randn(1, 100, 2, 16), torch.full((100, 100), -1e6).triu(1)
        >>> out = AscendNPUTriangleMixOptimizer.sparse_attention_kernel(query, query, query, mask, scale=0.25)
        >>> x = query.transpose(1, 2)
        >>> torch.allclose(out.transpose(1, 2), F.scaled_dot_product_attention(x, x, x, is_causal=True), atol=1e-5)
        True
        """
        check_tensors(query, key, value)
        added = as_mask("mask", mask, query, key.shape[1])
        block = as_count("block_size", block_size, minimum=1)
        return block_sparse.attend(query, key, value, added, as_scale(scale), block)
