"""The ``fa4`` lowering: layers that stay dense, by FlashAttention-4 where the extra ``[fa4]`` is installed.

FlashAttention-4 (Shah and others, the package flash-attn-4) is on Hopper the fastest dense kernel that was measured:
benchmarks/results/dense.json. Padding keeps its speed: the valid keys of a padded sequence stand together, so the
kernel gets each sequence's place and length (its ``cu_seqlens`` and ``seqused``), made on the GPU without waiting for
it. What that leaves undone (rows of padding; whole sequences with a masked key between valid ones) our own kernel
adds in a second launch, whose programs have nothing to do where nothing was left.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer, length
from tmx_compile.lowering.triton.lowering import extents
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.operator.layout import empty_by_tokens
from tmx_compile.operator.sharding import shard_by_batch_and_heads
from tmx_compile.report import Accepted, Reason, Rejected

LEAST_TOKENS = 4096
"""Shorter prompts wait for the launch rather than for the GPU: SDPA and our own kernel cost the host less."""

HEAD_DIMS = (64, 128)
"""Those that were measured."""

DTYPES = (torch.bfloat16, torch.float16)


class FlashAttention4(Lowering):
    """The ``fa4`` lowering: dense causal attention in inference, on Hopper, with padding or without."""

    name = "fa4"

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """What was measured to be faster, where the package and a GPU for it are there."""
        why = self._why_not(call)
        return Accepted() if why is None else Rejected(Reason.NO_LOWERING, f"fa4: {why}")

    def _why_not(self, call: AttentionCall) -> str | None:
        query, key, value = call.query, call.key, call.value
        dims = query.shape[3], value.shape[3]
        if call.documents or call.geometry.reach is not None or call.geometry.last < ALL_ROWS:
            return "causal and padding only"
        if call.changes:
            return call.changes
        if not statically_known_true(query.shape[2] == key.shape[2]):
            return "needs equal numbers of rows and keys"
        if call.needs_grad:
            return "forward only"
        if query.dtype not in DTYPES:
            return f"{query.dtype} is not bfloat16 or float16"
        if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
            return f"head dims {dims[0]} and {dims[1]} are not both 64 or both 128"
        if not 0 < call.scale < math.inf:
            return f"scale={call.scale} is not positive and finite"
        if 0 in query.shape:
            return "an empty tensor"
        return cast("str | None", missing(query.device))

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """One call; with padding, what it needs to know of each sequence as ordinary nodes, shared by all layers."""
        key_mask, extent, whole = operands.key_mask, None, None
        if key_mask is not None:
            kv_len = length(operands.key, 2)
            extent = extents(key_mask, kv_len, ALL_ROWS)
            whole = unbroken(key_mask, kv_len)
        return write.call(
            FA4_OPERATOR, operands.query, operands.key, operands.value, key_mask, extent, whole, call.scale
        )


def unbroken(key_mask: Any, kv_len: Any) -> Any:
    """(B, 2) int32 of a (B, Skv) bool mask: where the valid keys begin and end; [0, 0) if any between is masked."""
    where = rows.extent(key_mask, kv_len)
    intact = (where.end - where.start) == key_mask.sum(1, keepdim=True)
    return torch.where(intact, torch.cat([where.start, where.end], 1), 0).to(torch.int32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def missing(device: torch.device) -> str | None:
    """What FlashAttention-4 lacks to run on a device, or None."""
    if device.type != "cuda":
        return f"written for NVIDIA GPUs, got {device.type}"
    if not installed():
        return "flash-attn-4 is not installed"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "written for NVIDIA GPUs, this is an AMD build of PyTorch"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) != (9, 0):
        return "measured on Hopper (compute capability 9.0) only"
    return None


@functools.cache
def installed() -> bool:
    """Whether the package flash-attn-4 is there; it is not imported, which takes seconds."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


@torch.library.custom_op(
    "tmx::dense_attention_fa4",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? extent, Tensor? whole, float scale)"
    " -> Tensor",
)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    whole: Tensor | None,
    scale: float,
) -> Tensor:
    geometry = Geometry(0, 0, ALL_ROWS)
    few = query.shape[2] < LEAST_TOKENS
    if key_mask is None or extent is None or whole is None:
        if few:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        return by_sequences(query, key, value, None, scale)
    from tmx_compile.lowering.triton.launch import attend

    if few:
        return attend(query, key, value, key_mask, extent, geometry, scale)[0]
    out = by_sequences(query, key, value, whole, scale)
    return attend(query, key, value, key_mask, extent, geometry, scale, done=(out, whole))[0]


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return empty_by_tokens(query, value.shape[3])


def by_sequences(query: Tensor, key: Tensor, value: Tensor, whole: Tensor | None, scale: float) -> Tensor:
    """Causal attention by FlashAttention-4, each row among the keys of its sequence.

    Args:
        query: (B, H, N, D); key, value: (B, Hkv, N, D); bfloat16 or float16.
        whole: (B, 2) int32, the range of rows and keys of each sequence; None: all of them.
        scale: of the scores.

    Returns:
        (B, H, N, D) in (B, N, H, D) memory; rows outside of their sequence's range are left as they came.
    """
    dense, ragged = functions()
    operands = by_tokens(query, key, value)
    if whole is None:
        return result_of(dense(*operands, softmax_scale=scale, causal=True)).transpose(1, 2)
    batch, count = query.shape[0], query.shape[2]
    first = torch.arange(batch, device=query.device, dtype=torch.int32) * count
    begin = F.pad(first + whole[:, 0], (0, 1), value=batch * count)
    used = whole[:, 1] - whole[:, 0]
    out = ragged(
        *(x.reshape(batch * count, *x.shape[2:]) for x in operands),
        cu_seqlens_q=begin,
        cu_seqlens_k=begin,
        max_seqlen_q=count,
        max_seqlen_k=count,
        seqused_q=used,
        seqused_k=used,
        softmax_scale=scale,
        causal=True,
    )
    return result_of(out).view(batch, count, *query.shape[1::2]).transpose(1, 2)


def by_tokens(*tensors: Tensor) -> list[Tensor]:
    """(B, h, N, D) as the package takes them, (B, N, h, D)."""
    moved = [x.transpose(1, 2) for x in tensors]
    # Whole tokens may be far apart; the elements of one head are not.
    return [x if x.stride(3) == 1 else x.contiguous() for x in moved]


def result_of(made: Any) -> Tensor:
    """The attention of what the package returns: alone in some versions, with the log-sum-exp in others."""
    return cast("Tensor", made[0] if isinstance(made, tuple) else made)


def functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Attention of a batch, and of sequences that stand one behind the other."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return flash_attn_func, flash_attn_varlen_func


FA4_OPERATOR = torch.ops.tmx.dense_attention_fa4.default
"""The dense operator: (query, key, value, key_mask, extent, whole, scale) -> out, shapes as the triangle's."""

shard_by_batch_and_heads(FA4_OPERATOR)
