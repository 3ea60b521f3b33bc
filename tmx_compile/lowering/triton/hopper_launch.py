"""From tensors to one launch of the Hopper kernel. Importing this module needs Triton with Gluon."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.devices import is_hopper, multiprocessors
from tmx_compile.lowering.triton.forward import Forward
from tmx_compile.lowering.triton.hopper import hopper_kernel
from tmx_compile.lowering.triton.prepared import Kind, Prepared
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import strides_by_tokens

_GROUP_ROWS = 64  # stacked rows of a computing group: one wgmma tile
_GROUPS = 2  # computing groups of a CTA
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def takes(query: Kind, key: Kind, value: Kind) -> bool:
    """Whether the kernel is for these tensors: a Hopper GPU, 16-bit, one head dim of 33 to 128, addressable by TMA."""
    return (
        is_hopper(query.device)
        and query.dtype in _DTYPES
        and 32 < query.shape[3] <= 128
        and query.shape[3] == value.shape[3]
        and query.shape[1] // key.shape[1] <= _GROUP_ROWS
        and all(_fits_tma(x) for x in (query, key, value))
    )


def _fits_tma(x: Kind) -> bool:
    """Whether the tensor memory accelerator can address it: 16-byte strides and base, contiguous last dimension."""
    aligned = all(stride * x.dtype.itemsize % 16 == 0 for stride in x.stride[:3])
    return x.stride[3] == 1 and x.aligned and aligned and 0 not in x.shape


def forward(
    query: Kind,
    key: Kind,
    value: Kind,
    key_mask: Kind | None,
    geometry: Geometry,
    scale: float,
    out: Kind | None,
    with_lse: bool = False,
) -> Forward:
    """A launch of the Hopper kernel for tensors that :func:`takes` accepts.

    Arguments are those of ``launch.prepare``; no count of ``geometry`` is beyond its length.
    """
    batch, heads, q_len, dim = query.shape
    sink, window, last = geometry.counts
    kv_heads, kv_len = key.shape[1], key.shape[2]
    block_d = triton.next_power_of_2(dim)
    group = heads // kv_heads
    head_box = triton.next_power_of_2(group)
    positions = _GROUP_ROWS // head_box
    rows = positions * _GROUPS
    all_heads = batch * kv_heads
    shapes = tuning.choose_hopper(sink, window, rows, mostly_last=4 * last >= q_len)
    tiles, last_tiles = triton.cdiv(q_len, rows), max(1, triton.cdiv(last, rows))
    ctas = multiprocessors(query.device)
    stacked = _GROUPS * _GROUP_ROWS
    splits = tuning.splits(all_heads * last_tiles, kv_len, stacked, ctas, shapes.split_keys) if last else 1
    split_keys = triton.cdiv(triton.cdiv(kv_len, splits), shapes.keys) * shapes.keys
    last_items = all_heads * last_tiles * splits if last else 0
    stream_items = all_heads * tiles
    # Tiles that a CTA does while another does a last-row item.
    tile_blocks = triton.cdiv(window + rows, shapes.keys) + shapes.overhead
    head_start = split_keys // shapes.keys // tile_blocks if last else 0
    shape = batch, heads, q_len, dim
    strides = strides_by_tokens(heads, q_len, dim) if out is None else out.stride
    result = Kind(torch.Size(shape), strides, query.dtype, query.device, out is None or out.aligned)
    # The copy engine writes boxes of heads: where one has more than the group, it would write another group's rows.
    copy_out = head_box == group and _fits_tma(result)
    # Partial results and their log-sum-exps, of each computing group.
    parts = last_items * _GROUPS * _GROUP_ROWS * (block_d + 1) if splits > 1 else 0
    launch = Prepared(
        hopper_kernel,
        query.device,
        min(ctas, stream_items + last_items),
        (
            *strides[:3], 0 if key_mask is None else key_mask.stride[0],
            q_len, kv_len, sink, window, last, geometry.reach_within(kv_len), scale * math.log2(math.e),
            last_items, last_tiles, splits, split_keys, tiles, stream_items, head_start,
        ),
        (
            _describe(query, head_box, positions, block_d),
            *(_describe(x, 1, shapes.keys, block_d) for x in (key, value)),
            *(_describe(x, 1, 16, 64) for x in (key, value)),
            _describe(result if copy_out else query, head_box, positions, block_d),
        ),
        HEADS=heads, KV_HEADS=kv_heads, GROUP=group, HEAD_BOX=head_box, DIM=dim, BLOCK_D=block_d,
        BLOCK_N=shapes.keys, FIRST=shapes.first, MANY_SINKS=sink > shapes.first, STAGES=shapes.stages,
        QUERIES=shapes.queries, PADDED=key_mask is not None, REACH=geometry.reach is not None, WRITE_LSE=with_lse,
        COPY_OUT=copy_out,
        CONSUMER_REGISTERS=tuning.HOPPER_REGISTERS[1], PRODUCER_REGISTERS=tuning.HOPPER_REGISTERS[2],
        num_warps=4, maxnreg=tuning.HOPPER_REGISTERS[0],
    )  # fmt: skip
    return Forward(launch, query, value, with_lse, parts, takes_pieces=True, copies_out=copy_out)


def _describe(x: Kind, heads: int, rows: int, block_dim: int) -> Callable[[Tensor], TensorDescriptor]:
    """What makes a descriptor of a tensor of this kind, for blocks of ``heads`` x ``rows`` x ``block_dim``."""
    block = [1, heads, rows, block_dim]
    layout = _layout(tuple(block), x.dtype)
    return lambda tensor: TensorDescriptor(tensor, list(x.shape), list(x.stride), block, layout)


@functools.cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(shape), _DTYPES[dtype])
