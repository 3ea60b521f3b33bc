"""From tensors to the launches of the backward kernels. Importing this module needs Triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.backward_keys import key_kernel
from tmx_compile.lowering.triton.backward_queries import query_kernel
from tmx_compile.lowering.triton.devices import multiprocessors
from tmx_compile.lowering.triton.launch import INTERPRETED, heads_per_tile, row_grid
from tmx_compile.lowering.triton.tuning import BackwardTuning
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import empty_by_tokens


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    scale: float,
    *,
    shapes: BackwardTuning | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels: two launches, and one for the sinks where there are any.

    Args:
        grad_out: gradient of ``out``, (B, H, Sq, Dv), of any strides.
        grad_lse: gradient of ``lse``, (B, H, Sq) float32, or None.
        query, key, value, key_mask, extent, geometry, scale: as for the forward (:func:`launch.attend`).
        out, lse: its results.
        shapes: the block shapes; by default the table decides.

    Returns:
        The gradients of query, key and value, each in (B, tokens, heads, dim) memory.
    """
    dtype = query.dtype
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as if it were integers.
        grad_out, query, key, value, out = (x.float() for x in (grad_out, query, key, value, out))
    grad_out, query, key, value, out = (
        x if x.stride(3) == 1 else x.contiguous() for x in (grad_out, query, key, value, out)
    )
    key_mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, v_dim = key.shape[1], key.shape[2], value.shape[3]
    geometry = geometry.bounded(kv_len, q_len)
    sink, window, last = geometry.counts
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    shapes = shapes or tuning.choose_backward(query.element_size(), max(block_d, block_dv))
    grad_query, grad_key, grad_value = (empty_by_tokens(x, x.shape[3]) for x in (query, key, value))
    row_lse, delta = torch.empty_like(lse), torch.empty_like(lse)

    grid = row_grid(query, key, last, shapes.queries)
    # The sinks: as small a tile as holds them, and ranges of rows.
    sink_keys = min(shapes.sinks.keys, max(16, triton.next_power_of_2(sink)))
    sink_tiles = triton.cdiv(sink, sink_keys)
    group = heads // kv_heads
    key_group = heads_per_tile(group, min(shapes.sinks.rows, shapes.keys.rows))
    all_tiles = batch * kv_heads * sink_tiles
    splits = tuning.sink_splits(all_tiles, q_len * group, multiprocessors(query.device)) if sink else 1
    part = sink_part = sink_part_value = arrived = delta
    if grid.splits > 1:
        part = delta.new_empty(grid.last_programs * shapes.queries.rows * dim)
    if splits > 1:
        sink_part = delta.new_empty(all_tiles * splits * sink_keys * (dim + v_dim))
        sink_part_value = sink_part[all_tiles * splits * sink_keys * dim :]
    # A multiple of 16 bytes: Triton compiles a kernel again for a pointer that is none.
    last_items = triton.cdiv(grid.last_items, 4) * 4
    if grid.splits > 1 or splits > 1:
        arrived = torch.zeros(last_items + all_tiles, dtype=torch.int32, device=query.device)

    padded = key_mask is not None
    mask = delta if key_mask is None else key_mask
    reach = geometry.reach_within(kv_len)
    strides = [y for x in (query, key, value) for y in x.stride()[:3]]
    mask_batch = 0 if key_mask is None else key_mask.stride(0)
    lengths = q_len, kv_len, sink, window, last, reach, scale
    same = {
        "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "DIM_V": v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "PADDED": padded, "REACH": geometry.reach is not None, "FLOAT32": query.dtype == torch.float32,
    }  # fmt: skip
    query_kernel[(grid.programs,)](
        query, key, value, out, grad_out, lse, delta if grad_lse is None else grad_lse,
        mask, extent if padded else delta, grad_query, row_lse, delta, part, arrived,
        *strides, *out.stride()[:3], *grad_out.stride()[:3], *grad_query.stride()[:3], mask_batch,
        *lengths, grid.last_programs, grid.last_tiles, grid.splits, grid.split_keys,
        **same, GROUP=grid.group, KEY_GROUP=key_group, BLOCK_M=shapes.queries.rows, BLOCK_N=shapes.queries.keys,
        LSE_GRAD=grad_lse is not None, STAGES=shapes.queries.stages,
        num_warps=shapes.queries.warps, num_stages=shapes.queries.stages, maxnreg=shapes.queries.registers,
    )  # fmt: skip
    for sinks, shape in ((True, shapes.sinks), (False, shapes.keys)):
        if sinks and not sink:
            continue
        keys = sink_keys if sinks else shape.keys
        tiles = sink_tiles if sinks else triton.cdiv(kv_len, keys)
        parts = splits if sinks else 1
        key_kernel[(batch * kv_heads * tiles * parts,)](
            query, key, value, grad_out, row_lse, delta, mask, extent if padded else delta, grad_key, grad_value,
            sink_part, sink_part_value, arrived[last_items:] if splits > 1 else arrived,
            *strides, *grad_out.stride()[:3], *grad_key.stride()[:3], *grad_value.stride()[:3], mask_batch,
            *lengths, tiles, parts, triton.cdiv(triton.cdiv(q_len, parts), shape.rows) * shape.rows,
            **same, GROUP=key_group, BLOCK_M=shape.rows, BLOCK_N=keys, SINKS=sinks,
            STAGES=shape.stages, num_warps=shape.warps, num_stages=shape.stages, maxnreg=shape.registers,
        )  # fmt: skip
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype)
