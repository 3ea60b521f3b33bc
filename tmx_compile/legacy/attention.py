"""Attention of one layer that knows its own plan: triangle or dense, by the length of the prompt."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.legacy import block_sparse
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.legacy.operands import as_mask, as_scale, check_tensor, check_tensors
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator import kernel, triangle_attention

# Blocks of a call with an explicit mask, where the configuration names none.
_BLOCK = TriangleMixInferenceConfig.npu_block_size


class AscendTriangleMixAttention(nn.Module):
    """Causal self-attention of one layer under its TriangleMix plan, on any device; it has no parameters.

    The plan is the triangle mask where ``layer_idx`` is a triangle layer of the configuration and the prompt has more
    than ``min_seq_len`` rows (2048 by default), and dense causal attention everywhere else. Without ``attn_mask``, and
    with one of shape (batch, keys), memory is O(N): triangle layers run ``tmx::triangle_attention``.

    Args:
        num_heads: query heads.
        head_dim: numbers of a query and of a key in one head.
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        trianglemix_config: which layers are triangle layers, and their geometry; an inference configuration works too.
            None, or a disabled one: dense.
        layer_idx: the layer that this module is, from 0. Without it no plan can be known and the layer stays dense;
            where the configuration has triangle layers, a warning says so.
        num_layers: layers of the model, to check ``layer_idx`` and the configuration against.

    Raises:
        ValueError: a number that is none or lies out of range, ``layer_idx`` or a configured layer beyond
            ``num_layers``, or another class of configuration; with the values.

    >>> import torch
    >>> from tmx_compile import AscendTriangleMixAttention, TriangleMixConfig
    >>> config = TriangleMixConfig.deepest(1, num_layers=2, min_seq_len=256)
    >>> attention = AscendTriangleMixAttention(4, 16, 0.25, config, layer_idx=1, num_layers=2)
    >>> query, key = torch.randn(1, 300, 4, 16), torch.randn(1, 300, 2, 16)
    >>> attention(query, key, key).shape
    torch.Size([1, 300, 4, 16])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        trianglemix_config: TriangleMixConfig | TriangleMixInferenceConfig | None = None,
        layer_idx: int | None = None,
        num_layers: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = as_count("num_heads", num_heads, minimum=1)
        self.head_dim = as_count("head_dim", head_dim, minimum=1)
        self.scale = as_scale(scale)
        self.block_size = _BLOCK
        if isinstance(trianglemix_config, TriangleMixInferenceConfig):
            self.block_size = trianglemix_config.npu_block_size
            trianglemix_config = trianglemix_config.to_trianglemix_config()
        if not (trianglemix_config is None or isinstance(trianglemix_config, TriangleMixConfig)):
            raise ValueError(
                "trianglemix_config must be a TriangleMixConfig, a TriangleMixInferenceConfig or None, got "
                f"{trianglemix_config!r}"
            )
        self.trianglemix_config = trianglemix_config
        self.layer_idx = None if layer_idx is None else as_count("layer_idx", layer_idx)
        self.num_layers = None if num_layers is None else as_count("num_layers", num_layers, minimum=1)
        if self.num_layers is not None:
            if self.layer_idx is not None and self.layer_idx >= self.num_layers:
                raise ValueError(f"layer_idx must be less than num_layers={self.num_layers}, got {self.layer_idx}")
            if trianglemix_config is not None:
                trianglemix_config.check_layers(self.num_layers)
        if self.layer_idx is None and trianglemix_config is not None and trianglemix_config.layers():
            warnings.warn("without layer_idx no layer is a triangle layer: this one stays dense", stacklevel=2)

    def plan(self, q_len: int) -> TriangleMixConfig | None:
        """Return the configuration whose triangle mask a prompt of ``q_len`` rows gets here, or None for dense.

        ``ValueError`` where that is no non-negative integer.

        >>> from tmx_compile import AscendTriangleMixAttention, TriangleMixConfig
        >>> attention = AscendTriangleMixAttention(4, 16, 0.25, TriangleMixConfig.deepest(1, num_layers=2), layer_idx=1)
        >>> attention.plan(2048) is None, attention.plan(2049).geometry.counts  # min_seq_len is 2048
        (True, (4, 32, 64))
        """
        q_len = as_count("q_len", q_len)
        config = self.trianglemix_config
        if config is None or self.layer_idx is None or q_len <= config.min_seq_len:
            return None
        return config if config.is_triangle_layer(self.layer_idx) else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend under the plan, and under ``attn_mask`` too where there is one.

        A mask never widens the plan: a pair has weight where both let it. Row i stands at position
        ``keys - rows + i``, so that earlier keys of a cache may come first.

        Args:
            query: (batch, rows, num_heads, head_dim), any floating dtype.
            key: (batch, keys, key heads, head_dim) with at least as many keys as rows; the key heads divide the heads.
            value: (batch, keys, key heads, any head_dim).
            attn_mask: None, or one of

                - (batch, keys) bool, True for a key that may be attended: padding. Sinks count from a sequence's first
                  such key and last rows from its last. This is the form for long prompts.
                - floats added to the scaled scores, (rows, keys) or (1 or batch, 1 or heads, rows, keys), masked from
                  -1e4 down, as :meth:`AscendNPUTriangleMixOptimizer.sparse_attention_kernel` takes them. Sinks and last
                  rows count from the ends of the whole sequence.
                - bool of the latter shapes, True where a pair may be attended, as in
                  ``torch.nn.functional.scaled_dot_product_attention``; the opposite of what NPU operators take.

        Returns:
            (batch, rows, num_heads, value's head_dim) in query's dtype; a row that attends to nothing is 0.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, with the values; before any work.

        Two sequences, one with padding on its left:

        >>> import torch
        >>> from tmx_compile import AscendTriangleMixAttention
        >>> padding = torch.ones(2, 8, dtype=torch.bool)
        >>> padding[1, :3] = False
        >>> x = torch.randn(2, 8, 4, 16)
        >>> AscendTriangleMixAttention(4, 16, 0.25)(x, x, x, padding)[1, :3].abs().max()
        tensor(0.)
        """
        self._check(query, key, value)
        rows, keys = query.shape[1], key.shape[1]
        plan = self.plan(rows)
        key_mask = _key_mask(attn_mask, query.shape[0], rows, keys)
        if attn_mask is not None and key_mask is None:
            geometry = Geometry(0, 0, rows) if plan is None else plan.geometry
            one_query, one_key = (x[:1].transpose(1, 2) for x in (query, key))
            triangle = kernel.problem(one_query, one_key, None, geometry)
            mask = as_mask("attn_mask", attn_mask, query, keys, boolean=True)
            return block_sparse.attend(query, key, value, mask, self.scale, self.block_size, triangle)
        if key_mask is not None and key_mask.device != query.device:
            raise ValueError(f"attn_mask must be on query's device {query.device}, got {key_mask.device}")
        return self._whole(query, key, value, key_mask, plan)

    def _whole(
        self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, plan: TriangleMixConfig | None
    ) -> Tensor:
        """Without an explicit mask: O(N) memory."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if plan is None and key_mask is None and _has_fused_causal(query, key, value):
            # The caller's autocast would change the result's dtype, in dense layers alone.
            with torch.autocast(query.device.type, enabled=False):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
                )
        else:
            sink, window, last = (0, 0, ALL_ROWS) if plan is None else plan.geometry.counts
            out, _ = triangle_attention(
                query, key, value, key_mask, sink=sink, window=window, last=last, scale=self.scale
            )
        return out.transpose(1, 2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        check_tensors(query, key, value)
        heads, dim = query.shape[2:]
        if (heads, dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"query must have num_heads={self.num_heads} and head_dim={self.head_dim}, got {heads} and {dim}"
            )
        if query.shape[1] > key.shape[1]:
            raise ValueError(f"query must not have more rows than there are keys, got {query.shape[1]}, {key.shape[1]}")

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``print``."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, scale={self.scale}, layer_idx={self.layer_idx}, "
            f"num_layers={self.num_layers}, trianglemix_config={self.trianglemix_config!r}"
        )


def _key_mask(attn_mask: Tensor | None, batch: int, rows: int, keys: int) -> Tensor | None:
    """``attn_mask`` where it is one of (batch, keys); ``ValueError`` where it might be that or (rows, keys)."""
    if attn_mask is None:
        return None
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) != (batch, keys):
        return None
    if batch == rows and rows > 1:
        raise ValueError(
            f"attn_mask of shape {tuple(attn_mask.shape)} may be (batch, keys) or (rows, keys): give it four dimensions"
        )
    return attn_mask


def _has_fused_causal(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether PyTorch has a dense causal kernel for these (batch, heads, tokens, head_dim) that stores no scores."""
    if query.shape[2] != key.shape[2] or query.shape[3] != value.shape[3]:
        return False
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.device.type == "cpu" or (query.device.type == "cuda" and half and query.shape[3] <= 256)
