"""From tensors to one launch of the Hopper kernel. Importing this module needs Triton with Gluon."""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.devices import is_hopper, multiprocessors
from tmx_compile.lowering.triton.hopper import hopper_kernel
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import empty_by_tokens

_GROUP_ROWS = 64  # stacked rows of a computing group: one wgmma tile
_GROUPS = 2  # computing groups of a CTA
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
KEYS = 64  # per block
STAGES = 4  # blocks in flight; with two queries deep this fills the shared memory at head dim 128
REGISTERS = (168, 232, 40)  # per thread: at launch, computing, copying


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel is for these tensors: a Hopper GPU, 16-bit, one head dim of 33 to 128, addressable by TMA."""
    return (
        is_hopper(query.device)
        and query.dtype in _DTYPES
        and 32 < query.shape[3] <= 128
        and query.shape[3] == value.shape[3]
        and query.shape[1] // key.shape[1] <= _GROUP_ROWS
        and all(_fits_tma(x) for x in (query, key, value))
    )


def _fits_tma(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can address it: 16-byte strides and base, contiguous last dimension."""
    size = x.element_size()
    aligned = all(stride * size % 16 == 0 for stride in x.stride()[:3])
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and aligned and x.numel() > 0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    geometry: Geometry,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Run the kernel for tensors that :func:`takes` accepts.

    Arguments and result are those of ``launch.attend``; no count of ``geometry`` is beyond its length.
    """
    batch, heads, q_len, dim = query.shape
    sink, window, last = geometry.counts
    kv_heads, kv_len = key.shape[1], key.shape[2]
    block_d = triton.next_power_of_2(dim)
    group = heads // kv_heads
    head_box = triton.next_power_of_2(group)
    positions = _GROUP_ROWS // head_box
    rows = positions * _GROUPS
    out = empty_by_tokens(query, dim) if out is None else out
    all_heads = batch * kv_heads
    tiles, last_tiles = triton.cdiv(q_len, rows), max(1, triton.cdiv(last, rows))
    ctas = multiprocessors(query.device)
    splits = tuning.splits(all_heads * last_tiles, kv_len, _GROUPS * _GROUP_ROWS, ctas) if last else 1
    split_keys = triton.cdiv(triton.cdiv(kv_len, splits), KEYS) * KEYS
    last_items = all_heads * last_tiles * splits if last else 0
    stream_items = all_heads * tiles
    # Tiles that a CTA does while another does a last-row item: by their blocks, and 3 for a tile's own overhead.
    tile_blocks = triton.cdiv(window + rows, KEYS) + 3
    head_start = split_keys // KEYS // tile_blocks if last else 0
    part = part_lse = arrived = out
    if last and splits > 1:
        groups = all_heads * last_tiles * _GROUPS
        part = query.new_empty(groups * splits * _GROUP_ROWS * (block_d + 1), dtype=torch.float32)
        part_lse = part[groups * splits * _GROUP_ROWS * block_d :]
        arrived = query.new_zeros(groups, dtype=torch.int32)
    padded = key_mask is not None
    hopper_kernel[(min(ctas, stream_items + last_items),)](
        _descriptor(query, head_box, positions, block_d),
        _descriptor(key, 1, KEYS, block_d), _descriptor(value, 1, KEYS, block_d),
        _descriptor(key, 1, 16, 64), _descriptor(value, 1, 16, 64),
        out, key_mask if padded else out, extent if padded else out, part, part_lse, arrived,
        *out.stride()[:3], 0 if key_mask is None else key_mask.stride(0),
        q_len, kv_len, sink, window, last, geometry.reach_within(kv_len), scale * math.log2(math.e),
        last_items, last_tiles, splits, split_keys, tiles, stream_items, head_start,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=group, HEAD_BOX=head_box, DIM=dim, BLOCK_D=block_d,
        BLOCK_N=KEYS, STAGES=STAGES, PADDED=padded, REACH=geometry.reach is not None,
        CONSUMER_REGISTERS=REGISTERS[1], PRODUCER_REGISTERS=REGISTERS[2], num_warps=4, maxnreg=REGISTERS[0],
    )  # fmt: skip
    return out


def _descriptor(x: Tensor, heads: int, rows: int, block_dim: int) -> TensorDescriptor:
    shape = [1, heads, rows, block_dim]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, _layout(tuple(shape), x.dtype))


@functools.cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(shape), _DTYPES[dtype])
