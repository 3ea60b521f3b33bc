"""From tensors to the launches of the backward kernels. Importing this module needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.backward_keys import key_kernel
from tmx_compile.lowering.triton.backward_queries import query_kernel
from tmx_compile.lowering.triton.devices import multiprocessors
from tmx_compile.lowering.triton.launch import INTERPRETED, heads_per_tile, row_grid
from tmx_compile.lowering.triton.prepared import Kind, Prepared, allocator, as_key, kind, number_of, remember
from tmx_compile.lowering.triton.splits import split_memory
from tmx_compile.lowering.triton.tuning import BackwardTuning
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import strides_by_tokens

_known: dict[Any, _Launches] = {}


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
    softcap: float | None = None,
    shapes: BackwardTuning | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels: two launches, and one for the sinks where there are any.

    Args:
        grad_out: gradient of ``out``, (B, H, Sq, Dv), of any strides.
        grad_lse: gradient of ``lse``, (B, H, Sq) float32, or None.
        query, key, value, key_mask, extent, geometry, scale: as for the forward (:func:`launch.attend`).
        out, lse: its results, learned sinks included.
        softcap: as for the forward.
        shapes: the block shapes; by default the table decides.

    Returns:
        The gradients of query, key and value, each in (B, tokens, heads, dim) memory.
    """
    tensors = grad_out, grad_lse, query, key, value, key_mask, extent, out, lse
    kind_of_call = *as_key(tensors), *geometry.counts, geometry.reach, scale, softcap, shapes
    launches = _known.get(kind_of_call)
    if launches is not None:
        return launches(*tensors)
    usable = _usable(*tensors)
    if any(x is not y for x, y in zip(usable, tensors, strict=True)):
        grads = gradients(*usable, geometry, scale, softcap=softcap, shapes=shapes)
        return tuple(x.to(query.dtype) for x in grads)  # type: ignore[return-value]
    kinds = tuple(None if x is None else kind(x) for x in tensors)
    return remember(_known, kind_of_call, _Launches(kinds, geometry, scale, shapes, softcap))(*tensors)


def _usable(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The same tensors, but for those of strides or a dtype that the kernels do not read."""
    rows = grad_out, query, key, value, out
    if INTERPRETED and query.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as if it were integers.
        rows = tuple(x.float() for x in rows)  # type: ignore[assignment]
    grad_out, query, key, value, out = (x if x.stride(3) == 1 else x.contiguous() for x in rows)
    key_mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    return grad_out, grad_lse, query, key, value, key_mask, extent, out, lse


def forget() -> None:
    """Prepare every kind of call anew."""
    _known.clear()


class _Launches:
    """The launches of the backward kernels."""

    def __init__(
        self,
        kinds: tuple[Kind | None, ...],
        geometry: Geometry,
        scale: float,
        shapes: BackwardTuning | None,
        softcap: float | None,
    ) -> None:
        grad_out, grad_lse, query, key, value, key_mask, _, out, _ = kinds
        assert grad_out is not None
        assert query is not None
        assert key is not None
        assert value is not None
        assert out is not None
        batch, heads, q_len, dim = query.shape
        kv_heads, kv_len, v_dim = key.shape[1], key.shape[2], value.shape[3]
        geometry = geometry.bounded(kv_len, q_len)
        sink, window, last = geometry.counts
        block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
        shapes = shapes or tuning.choose_backward(query.dtype.itemsize, max(block_d, block_dv))
        self._allocate, self._device = allocator(query.device), number_of(query.device)
        self._results = [(tuple(x.shape), strides_by_tokens(*x.shape[1:]), x.dtype) for x in (query, key, value)]
        self._lse = (batch, heads, q_len), (heads * q_len, q_len, 1), torch.float32
        of_query, of_key, of_value = (strides[:3] for _, strides, _ in self._results)

        grid = row_grid(query, key, last, shapes.queries)
        # The sinks: as small a tile as holds them, and ranges of rows.
        sink_keys = min(shapes.sinks.keys, max(16, triton.next_power_of_2(sink)))
        sink_tiles = triton.cdiv(sink, sink_keys)
        group = heads // kv_heads
        key_group = heads_per_tile(group, min(shapes.sinks.rows, shapes.keys.rows))
        all_tiles = batch * kv_heads * sink_tiles
        splits = tuning.sink_splits(all_tiles, q_len * group, multiprocessors(query.device)) if sink else 1
        # Partial results of the last rows, and afterwards of the sinks for keys and values.
        parts = grid.last_programs * shapes.queries.rows * dim if grid.splits > 1 else 0
        sink_parts = all_tiles * splits * sink_keys * (dim + v_dim) if splits > 1 else 0
        self._parts = max(parts, sink_parts)

        strides = [y for x in (query, key, value) for y in x.stride[:3]]
        mask_batch = 0 if key_mask is None else key_mask.stride[0]
        lengths = q_len, kv_len, sink, window, last, geometry.reach_within(kv_len), scale
        same = {
            "HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim, "DIM_V": v_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "PADDED": key_mask is not None, "REACH": geometry.reach is not None,
            "FLOAT32": query.dtype == torch.float32, "SOFTCAP": softcap or 0.0,
        }  # fmt: skip
        self._query_launch = Prepared(
            query_kernel,
            query.device,
            grid.programs,
            (
                *strides, *out.stride[:3], *grad_out.stride[:3], *of_query, mask_batch,
                *lengths, grid.last_programs, grid.last_tiles, grid.splits, grid.split_keys,
            ),
            **same, GROUP=grid.group, KEY_GROUP=key_group, BLOCK_M=shapes.queries.rows, BLOCK_N=shapes.queries.keys,
            LSE_GRAD=grad_lse is not None, STAGES=shapes.queries.stages,
            num_warps=shapes.queries.warps, num_stages=shapes.queries.stages, maxnreg=shapes.queries.registers,
        )  # fmt: skip
        self._key_launches = []
        for sinks, shape in ((True, shapes.sinks), (False, shapes.keys)):
            if sinks and not sink:
                continue
            keys = sink_keys if sinks else shape.keys
            tiles = sink_tiles if sinks else triton.cdiv(kv_len, keys)
            parts = splits if sinks else 1
            launch = Prepared(
                key_kernel,
                query.device,
                batch * kv_heads * tiles * parts,
                (
                    *strides, *grad_out.stride[:3], *of_key, *of_value, mask_batch,
                    *lengths, tiles, parts, triton.cdiv(triton.cdiv(q_len, parts), shape.rows) * shape.rows,
                ),
                **same, GROUP=key_group, BLOCK_M=shape.rows, BLOCK_N=keys, SINKS=sinks,
                STAGES=shape.stages, num_warps=shape.warps, num_stages=shape.stages, maxnreg=shape.registers,
            )  # fmt: skip
            self._key_launches.append(launch)

    def __call__(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        extent: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        allocate = self._allocate
        grad_query, grad_key, grad_value = [allocate(*x) for x in self._results]
        row_lse, delta = allocate(*self._lse), allocate(*self._lse)
        counters = parts = None
        if self._parts:
            counters, parts = split_memory(allocate, self._device, self._parts)
        self._query_launch(
            delta, query, key, value, out, grad_out, lse, grad_lse, key_mask, extent, grad_query, row_lse, delta,
            parts, counters,
        )  # fmt: skip
        for launch in self._key_launches:
            launch(
                delta, query, key, value, grad_out, row_lse, delta, key_mask, extent, grad_key, grad_value,
                parts, counters,
            )  # fmt: skip
        return grad_query, grad_key, grad_value
