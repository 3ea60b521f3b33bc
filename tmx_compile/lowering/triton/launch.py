"""From tensors to one launch of the kernel. Importing this module needs Triton."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.devices import multiprocessors
from tmx_compile.lowering.triton.kernel import triangle_kernel
from tmx_compile.lowering.triton.tuning import Tuning
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import empty_by_tokens

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs the kernels itself, on tensors of any device: TRITON_INTERPRET=1 was set at import."""


def _hopper_launch() -> Any:
    """The Hopper kernel's launch, or None: Gluon changes between versions of Triton, and these two are tried."""
    tried = triton.__version__.startswith(("3.6.", "3.7."))
    return importlib.import_module("tmx_compile.lowering.triton.hopper_launch") if tried and not INTERPRETED else None


HOPPER = _hopper_launch()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    geometry: Geometry,
    scale: float,
    *,
    with_lse: bool = False,
    shapes: Tuning | None = None,
    out: Tensor | None = None,
    hopper_from: int = tuning.HOPPER_FROM_TOKENS,
    done: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel.

    Args:
        query, key, value, key_mask, scale: as for :func:`tmx_compile.operator.triangle_attention`; key_mask bool.
        extent: (B, 3) int32 beside a key mask: first valid key, one past the last, whether a key between is masked;
            where all rows are last rows, the second is Skv (:func:`tmx_compile.lowering.triton.lowering.extents`).
        geometry: the mask.
        with_lse: also return the log-sum-exp.
        shapes: runs the general kernel with these; by default the table decides.
        out: (B, H, Sq, Dv) of query's dtype, last dimension contiguous: the memory to write into.
        hopper_from: batch x rows from which the Hopper kernel runs where it can.
        done: a result (B, H, Sq, Dv) to complete in place, and (B, 2) int32: the positions [from, to) of each sequence
            whose rows it has already.

    Returns:
        out (B, H, Sq, Dv), by default in (B, Sq, H, Dv) memory as SDPA's own kernels leave it; lse (B, H, Sq) float32
        or None.

    Raises:
        ValueError: ``out`` is no such memory.
    """
    given = out
    if given is not None:
        _check_out(given, query, value)
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    key_mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    batch, heads, q_len, dim = query.shape
    kv_heads, kv_len, v_dim = key.shape[1], key.shape[2], value.shape[3]
    geometry = geometry.bounded(kv_len, q_len)
    sink, window, last = geometry.counts
    # Where many rows read all keys, those decide the block shapes.
    slots = sink + window if 4 * last < q_len else kv_len
    general = (
        shapes is not None or with_lse or done is not None or tuning.one_block(slots) or batch * q_len < hopper_from
    )
    if not general and HOPPER is not None and HOPPER.takes(query, key, value):
        return HOPPER.attend(query, key, value, key_mask, extent, geometry, scale, out=given), None
    dtype = query.dtype
    if INTERPRETED and dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as if it were integers.
        query, key, value = query.float(), key.float(), value.float()
    if done is not None:
        out, there = done
    else:
        there, out = query, empty_by_tokens(query, v_dim) if given is None or given.dtype != query.dtype else given
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32) if with_lse else None
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    shapes = shapes or tuning.choose(query.element_size(), max(block_d, block_dv), slots)
    grid = row_grid(query, key, last, shapes)
    part = part_lse = arrived = out
    if grid.splits > 1:
        part = query.new_empty(grid.last_programs * shapes.rows * (v_dim + 1), dtype=torch.float32)
        part_lse = part[grid.last_programs * shapes.rows * v_dim :]
        arrived = query.new_zeros(grid.last_items, dtype=torch.int32)
    padded = key_mask is not None
    triangle_kernel[(grid.programs,)](
        query, key, value, out, out if lse is None else lse,
        key_mask if padded else out, extent if padded else out, there, part, part_lse, arrived,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        0 if key_mask is None else key_mask.stride(0),
        q_len, kv_len, sink, window, last, geometry.reach_within(kv_len),
        scale * math.log2(math.e), grid.last_programs, grid.last_tiles, grid.splits, grid.split_keys,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=grid.group, DIM=dim, DIM_V=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_M=shapes.rows, BLOCK_N=shapes.keys, PADDED=padded, DONE=done is not None,
        REACH=geometry.reach is not None, WRITE_LSE=with_lse, FLOAT32=query.dtype == torch.float32,
        STAGES=shapes.stages, FULL_N=shapes.full_keys or shapes.keys, FULL_STAGES=shapes.full_stages or shapes.stages,
        num_warps=shapes.warps, num_stages=shapes.stages, maxnreg=shapes.registers,
    )  # fmt: skip
    if given is not None and out is not given:
        return given.copy_(out), lse
    return out.to(dtype), lse


def _check_out(out: Tensor, query: Tensor, value: Tensor) -> None:
    shape = (*query.shape[:3], value.shape[3])
    if out.shape != shape or out.dtype != query.dtype or out.device != query.device or out.stride(3) != 1:
        raise ValueError(
            f"out must be {shape}, {query.dtype} on {query.device} with a contiguous last dimension, got "
            f"{tuple(out.shape)}, {out.dtype} on {out.device} with strides {out.stride()}"
        )


@dataclass(frozen=True)
class RowGrid:
    """The programs over tiles of rows, forward or backward: those of the last rows, then one for each streaming tile.

    Attributes:
        group: query heads that a tile stacks.
        last_tiles: tiles of last rows for each stack of heads, at least 1.
        last_items: the same for all heads of the batch.
        splits: parts of the keys that a tile of last rows is split into.
        split_keys: keys in one part.
        last_programs: programs of last rows; 0 where there are none.
        programs: all of them.
    """

    group: int
    last_tiles: int
    last_items: int
    splits: int
    split_keys: int
    last_programs: int
    programs: int


def row_grid(query: Tensor, key: Tensor, last: int, shapes: Tuning) -> RowGrid:
    """The programs for (B, H, Sq, D) queries and (B, Hkv, Skv, D) keys in tiles of ``shapes``."""
    batch, heads, q_len, _ = query.shape
    kv_len = key.shape[2]
    group = heads_per_tile(heads // key.shape[1], shapes.rows)
    rows = shapes.rows // group
    head_blocks = batch * heads // group
    last_tiles = max(1, triton.cdiv(last, rows))
    last_items = head_blocks * last_tiles
    splits = tuning.splits(last_items, kv_len, shapes.rows, multiprocessors(query.device)) if last else 1
    split_keys = triton.cdiv(triton.cdiv(kv_len, splits), shapes.keys) * shapes.keys
    last_programs = last_items * splits if last else 0
    programs = last_programs + head_blocks * triton.cdiv(q_len, rows)
    return RowGrid(group, last_tiles, last_items, splits, split_keys, last_programs, programs)


def heads_per_tile(group: int, rows: int) -> int:
    """How many of the query heads that share a key head one tile stacks: the largest divisor that leaves rows."""
    return max(size for size in range(1, group + 1) if group % size == 0 and size <= rows // 2)
