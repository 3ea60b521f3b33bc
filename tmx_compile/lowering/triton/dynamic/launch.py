"""From tensors to the launches of choosing blocks and attending to them. Importing this module needs Triton."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from tmx_compile.lowering.triton.dynamic.choosing import choose_kernel, estimate_kernel, mean_kernel
from tmx_compile.lowering.triton.dynamic.kernel import block_sparse_kernel
from tmx_compile.lowering.triton.dynamic.sampling import sampled_kernel
from tmx_compile.lowering.triton.launch import INTERPRETED
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists
from tmx_compile.operator.dynamic.choice import grid_of
from tmx_compile.operator.dynamic.grid import Bounds, Grid, groups_of
from tmx_compile.operator.layout import empty_by_tokens

WORKSPACE = 1 << 25
"""Log-sum-exps that are kept at once (4 bytes each), unless one row of blocks has more."""
_MEAN_ROWS = 64  # of a program that computes means
_TILE = 64  # groups of rows, and at least of keys, of a program that estimates
_OF_WARP = 256, 2048  # of a program that chooses: blocks of keys of a warp, and log-sum-exps that it looks at at once


@dataclass(frozen=True)
class Tuning:
    """A launch of the attention kernel: keys a step, warps, stages, most registers a thread may take."""

    step: int
    warps: int
    stages: int
    registers: int | None = None


@dataclass(frozen=True)
class Tile:
    """A program that looks at sampled rows: how many, warps, stages, blocks of keys."""

    rows: int
    warps: int
    stages: int
    span: int


def sampled_tile(element_size: int, dim: int) -> Tile:
    """The shapes for a dtype's size in bytes and the head dim.

    Measured on an H100, at head dim 128: benchmarks/results/stacked_selection.json.
    """
    if element_size == 4 or dim > 128:
        # What fits into shared memory at a head dim of 256 and in blocks of 128.
        return Tile(64, 4, 1, 8)
    return Tile(128, 8, 2, 8)


def tuning(element_size: int, dim: int, block: int) -> Tuning:
    """The shapes for a dtype's size in bytes, the larger padded head dim and a block.

    Measured on an H100, at head dim 128: benchmarks/results/stacked.json.
    """
    if element_size == 4 or dim > 128:
        return Tuning(min(32 if dim <= 128 else 16, block), 4, 1 if element_size == 4 else 2)
    return Tuning(block, 8, 2) if block >= 128 else Tuning(block, 4, 3)


def select(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    selection: Selection,
    scale: float,
    *,
    tile: Tile | None = None,
) -> Lists:
    """As :func:`tmx_compile.operator.dynamic.select`, by kernels.

    Args:
        query, key, key_mask, selection, scale: as there.
        tile: for sampled rows, the shapes of a program; by default those that were measured.
    """
    grid = grid_of(query, key, selection)
    batch, heads = query.shape[:2]
    of_block = grid.block // selection.stride
    device = query.device
    # Without padding they are known here: nothing small is computed on the device.
    bounds = None if key_mask is None else Bounds.of(grid, key_mask, selection, device)
    known = Bounds.without_padding(grid, selection) if bounds is None else (0, 0, 0, 0)
    blocks = torch.empty(batch, heads, grid.rows, grid.columns, dtype=torch.int16, device=device)
    counts = torch.empty(batch, heads, grid.rows, dtype=torch.int32, device=device)
    if INTERPRETED and query.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as if it were integers.
        query, key = query.float(), key.float()
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    key_mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    packed = counts
    if bounds is not None:
        packed = torch.stack([bounds.start, bounds.end, bounds.sink_end, bounds.last_low], 1).to(torch.int32)
    together = max(1, WORKSPACE // (batch * heads * of_block * grid.columns))
    local = torch.empty(
        batch * heads * min(together, grid.rows) * of_block * grid.columns, dtype=torch.float32, device=device
    )
    whole = selection.share == 1.0
    sampled = selection.method == "sampled"
    if sampled:
        estimate = _sampling(query, key, key_mask, grid, selection, scale, tile)
    else:
        estimate = _grouping(query, key, key_mask, grid, selection, scale)
    width = triton.next_power_of_2(grid.columns)
    warps = max(1, min(8, width // _OF_WARP[0]))
    parts = max(1, min(of_block, warps * _OF_WARP[1] // width))
    for first in range(0, grid.rows, together):
        stop = min(grid.rows, first + together)
        if not whole:
            estimate(local, first, stop)
        choose_kernel[(stop - first, batch * heads)](
            local, packed, blocks, counts, *known, grid.first + first, first, grid.rows, (stop - first) * of_block,
            grid.columns, grid.offset, grid.kv_len, selection.share,
            HEADS=heads, STRIDE=selection.stride, OF_BLOCK=of_block, PARTS=parts, COLUMNS=width, WHOLE=whole,
            PEAK=sampled, PADDED=key_mask is not None, num_warps=warps,
        )  # fmt: skip
    return Lists(blocks, counts, _visited(grid, bounds, counts))


def _grouping(
    query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, selection: Selection, scale: float
) -> Callable[[Tensor, int, int], None]:
    """What writes the log-sum-exps of blocks of rows [first, stop) by groups of rows and keys."""
    batch, heads, _, dim = query.shape
    of_block = grid.block // selection.stride
    pooled = selection.method == "pooled"
    if pooled:
        front = grid.offset - grid.first * grid.block
        rows, _ = _means(query, None, front, grid.rows * of_block, selection.stride)
        keys, keys_of = _means(key, key_mask, 0, grid.columns * of_block, selection.stride)
        steps, q_offset = 1, grid.first * of_block
    else:
        rows, keys = query, key
        keys_of = groups_of(grid.existing_keys(key_mask, key.device), selection.stride, 1).sum(2, dtype=torch.int32)
        steps, q_offset = selection.stride, grid.offset
    padded = key_mask is not None and not pooled
    mask = keys_of if key_mask is None else key_mask
    key_tile = max(_TILE, of_block)

    def estimate(local: Tensor, first: int, stop: int) -> None:
        groups = (stop - first) * of_block
        row_tiles, key_tiles = triton.cdiv(groups, _TILE), triton.cdiv((grid.first + stop) * of_block, key_tile)
        estimate_kernel[(row_tiles, key_tiles, batch * heads)](
            rows, keys, keys_of, mask, local, *rows.stride()[:3], *keys.stride()[:3],
            keys_of.stride(0) if keys_of.shape[0] > 1 else 0, mask.stride(0) if padded else 0,
            (grid.first + first) * of_block, groups, q_offset, rows.shape[2], keys.shape[2], keys_of.shape[1],
            grid.columns, grid.offset, grid.kv_len, scale,
            HEADS=heads, KV_HEADS=key.shape[1], DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)),
            STRIDE=selection.stride, STEPS=steps, OF_BLOCK=of_block, ROWS=_TILE, KEYS=key_tile, PADDED=padded,
            FLOAT32=rows.dtype == torch.float32, num_warps=4, num_stages=3 if steps > 1 else 1,
        )  # fmt: skip

    return estimate


def _sampling(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    grid: Grid,
    selection: Selection,
    scale: float,
    shapes: Tile | None,
) -> Callable[[Tensor, int, int], None]:
    """The same by sampled rows."""
    batch, heads, _, dim = query.shape
    of_block = grid.block // selection.stride
    mask = query if key_mask is None else key_mask
    if scale < 0:
        query, scale = -query, -scale
    shared = heads // key.shape[1]
    # With more heads, fewer of them and some groups of rows.
    together = shared if shared <= 16 else math.gcd(shared, 16)
    shapes = shapes or sampled_tile(query.element_size(), dim)

    def estimate(local: Tensor, first: int, stop: int) -> None:
        groups = (stop - first) * of_block
        spans = triton.cdiv(grid.first + stop, shapes.span)
        sampled_kernel[(triton.cdiv(groups, shapes.rows // together), spans, batch * heads // together)](
            query, key, mask, local, *query.stride()[:3], *key.stride()[:3],
            0 if key_mask is None else key_mask.stride(0),
            (grid.first + first) * of_block, groups, grid.kv_len, grid.columns, grid.offset, scale * math.log2(math.e),
            HEADS=heads, KV_HEADS=key.shape[1], TOGETHER=together, DIM=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), STRIDE=selection.stride, BLOCK=grid.block,
            ROWS=shapes.rows, SPAN=shapes.span, PADDED=key_mask is not None, FLOAT32=query.dtype == torch.float32,
            STAGES=shapes.stages, num_warps=shapes.warps,
        )  # fmt: skip

    return estimate


def _means(x: Tensor, mask: Tensor | None, front: int, groups: int, stride: int) -> tuple[Tensor, Tensor]:
    """The means of groups (B, H, groups, D) in x's dtype, and how many of each exist (B, groups) int32.

    Args:
        x: (B, H, N, D).
        mask: (B, N) bool, or None: all exist.
        front: positions of the first group that come before the first of x.
        groups: how many.
        stride: of how many positions.
    """
    batch, heads, length, dim = x.shape
    means = torch.empty(batch, heads, groups, dim, dtype=x.dtype, device=x.device)
    counts = torch.empty(batch, groups, dtype=torch.int32, device=x.device)
    of_program = max(1, _MEAN_ROWS // stride)
    mean_kernel[(triton.cdiv(groups, of_program), batch * heads)](
        x, counts if mask is None else mask, means, counts, *x.stride()[:3], 0 if mask is None else mask.stride(0),
        front, length, groups, HEADS=heads, DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), STRIDE=stride,
        GROUPS=of_program, PADDED=mask is not None, num_warps=4,
    )  # fmt: skip
    return means, counts


def _visited(grid: Grid, bounds: Bounds | None, counts: Tensor) -> Tensor:
    """Blocks visited, and possible ones; without bounds nothing is hidden."""
    if bounds is None:
        before = grid.first * (grid.first + 1)
        whole = (grid.columns * (grid.columns + 1) - before) // 2 * counts.shape[0] * counts.shape[1]
        visited = counts.new_full((2,), whole, dtype=torch.int64)
        torch.sum(counts, (0, 1, 2), dtype=torch.int64, out=visited[0])
        return visited
    row = torch.arange(grid.first, grid.columns, device=counts.device)
    possible = torch.minimum(row + 1, bounds.end[:, None]) - bounds.start[:, None]
    return torch.stack([counts.sum(dtype=torch.int64), possible.clamp(min=0).sum() * counts.shape[1]])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    lists: Lists,
    block: int,
    scale: float,
    *,
    shapes: Tuning | None = None,
) -> Tensor:
    """As :func:`tmx_compile.operator.dynamic.attend`, by a kernel; the lists ascend.

    Args:
        query, key, value, key_mask, lists, block, scale: as there.
        shapes: of the launch; by default the table decides.
    """
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    dtype = query.dtype
    if INTERPRETED and dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    key_mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    batch, heads, q_len, dim = query.shape
    kv_len, v_dim = key.shape[2], value.shape[3]
    rows, columns = lists.blocks.shape[2:]
    out = empty_by_tokens(query, v_dim)
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (dim, v_dim))
    shapes = shapes or tuning(query.element_size(), max(block_d, block_dv), block)
    block_sparse_kernel[(batch * heads * rows,)](
        query, key, value, out, out if key_mask is None else key_mask, lists.blocks, lists.counts,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        0 if key_mask is None else key_mask.stride(0),
        q_len, kv_len, rows, columns, scale * math.log2(math.e),
        HEADS=heads, KV_HEADS=key.shape[1], DIM=dim, DIM_V=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK=block, STEP=shapes.step, PADDED=key_mask is not None, FLOAT32=query.dtype == torch.float32,
        STAGES=shapes.stages, num_warps=shapes.warps, num_stages=shapes.stages, maxnreg=shapes.registers,
    )  # fmt: skip
    return out.to(dtype)
