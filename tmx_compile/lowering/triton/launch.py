"""From tensors to one launch of the kernel. Importing this module needs Triton."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from tmx_compile.lowering.triton import tuning
from tmx_compile.lowering.triton.devices import multiprocessors
from tmx_compile.lowering.triton.kernel import triangle_kernel
from tmx_compile.lowering.triton.prepared import TRIED_VERSION, Kind, Prepared, empty, kind, scratch_memory
from tmx_compile.lowering.triton.tuning import Tuning
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator.layout import strides_by_tokens

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton runs the kernels itself, on tensors of any device: TRITON_INTERPRET=1 was set at import."""


def _hopper_launch() -> Any:
    """The Hopper kernel's launch, or None: Gluon changes between versions of Triton."""
    if INTERPRETED or not TRIED_VERSION:
        return None
    return importlib.import_module("tmx_compile.lowering.triton.hopper_launch")


HOPPER = _hopper_launch()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
    *,
    shapes: Tuning | None = None,
    out: Tensor | None = None,
    done: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the kernel.

    Args:
        query, key, value, key_mask, scale, sink_logits, softcap: as for
            :func:`tmx_compile.operator.triangle_attention`; key_mask bool.
        extent: (B, 3) int32 beside a key mask: first valid key, one past the last, whether a key between is masked;
            where all rows are last rows, the second is Skv (:func:`tmx_compile.lowering.triton.lowering.extents`).
        geometry: the mask.
        with_lse: also return the log-sum-exp.
        shapes: runs the general kernel with these; by default the table decides.
        out: (B, H, Sq, Dv) of query's dtype, last dimension contiguous: the memory to write into.
        done: a result (B, H, Sq, Dv) to complete in place, and (B, 2) int32: the positions [from, to) of each sequence
            whose rows it has already.

    Returns:
        out (B, H, Sq, Dv), by default in (B, Sq, H, Dv) memory as SDPA's own kernels leave it; lse (B, H, Sq) float32
        or None.

    Raises:
        ValueError: ``out`` is no such memory.
    """
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    if out is not None:
        _check_out(out, query, value)
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous() if INTERPRETED else sink_logits.contiguous()
    if INTERPRETED and query.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 as if it were integers.
        exact = query.float(), key.float(), value.float()
        scores: dict[str, Any] = {"sink_logits": sink_logits, "softcap": softcap}
        made, lse = attend(
            *exact, key_mask, extent, geometry, scale, **scores, with_lse=with_lse, shapes=shapes, done=done
        )
        return (made.to(query.dtype) if out is None else out.copy_(made)), lse
    kinds = kind(query), kind(key), kind(value)
    if kinds[0].stride[3] != 1 or kinds[1].stride[3] != 1 or kinds[2].stride[3] != 1:
        query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
        kinds = kind(query), kind(key), kind(value)
    launch = prepare(
        *kinds,
        None if key_mask is None else kind(key_mask),
        None if extent is None else kind(extent),
        geometry,
        scale,
        with_lse,
        shapes,
        None if done is None else (kind(done[0]), kind(done[1])),
        None if sink_logits is None else kind(sink_logits),
        softcap,
        None if out is None else kind(out),
    )
    return launch(query, key, value, key_mask, extent, done, sink_logits, out)


@functools.lru_cache(maxsize=4096)
def prepare(
    query: Kind,
    key: Kind,
    value: Kind,
    key_mask: Kind | None,
    extent: Kind | None,
    geometry: Geometry,
    scale: float,
    with_lse: bool,
    shapes: Tuning | None,
    done: tuple[Kind, Kind] | None = None,
    sink_logits: Kind | None = None,
    softcap: float | None = None,
    out: Kind | None = None,
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What one kind of call computes once: a function of all the tensors. The arguments are those of :func:`attend`.

    One prompt calls it once a layer, with its own length: the least recently used kinds are forgotten.
    """
    geometry = geometry.bounded(key.shape[2], query.shape[2])
    sink, window, last = geometry.counts
    batch, heads, q_len, _ = query.shape
    # Where many rows read all keys, those decide the block shapes.
    slots = sink + window if 4 * last < q_len else key.shape[2]
    size = batch * heads * q_len, multiprocessors(query.device)
    general = shapes is not None or done is not None or tuning.one_block(slots)
    # The Hopper kernel has neither learned sinks nor a softcap.
    general = general or sink_logits is not None or softcap is not None
    if not general and tuning.enough_for_hopper(*size) and HOPPER is not None and HOPPER.takes(query, key, value):
        return HOPPER.Launch(query, key, value, key_mask, geometry, scale, out, with_lse)  # type: ignore[no-any-return]
    if shapes is None:
        dim = max(query.shape[3], value.shape[3])
        shapes = tuning.choose(query.dtype.itemsize, _padded(dim), slots, *size)
    scores = sink_logits is not None, softcap or 0.0
    given = out if done is None else done[0]
    return _General(
        query, key, value, key_mask, geometry, scale, with_lse, shapes, given, scores, completes=done is not None
    )


def _padded(dim: int) -> int:
    padded: int = max(16, triton.next_power_of_2(dim))
    return padded


class _General:
    """A launch of the general kernel."""

    def __init__(
        self,
        query: Kind,
        key: Kind,
        value: Kind,
        key_mask: Kind | None,
        geometry: Geometry,
        scale: float,
        with_lse: bool,
        shapes: Tuning,
        out: Kind | None,
        scores: tuple[bool, float],
        *,
        completes: bool,
    ) -> None:
        batch, heads, q_len, dim = query.shape
        kv_heads, kv_len, v_dim = key.shape[1], key.shape[2], value.shape[3]
        sink, window, last = geometry.counts
        grid = row_grid(query, key, last, shapes)
        self._shape = batch, heads, q_len, v_dim
        self._strides = strides_by_tokens(heads, q_len, v_dim) if out is None else out.stride
        self._with_lse, self._lse_strides = with_lse, (heads * q_len, q_len, 1)
        # Partial results and their log-sum-exps, if there are several.
        parts = grid.last_programs * shapes.rows * (v_dim + 1)
        self._scratch = tuning.COUNTERS + parts if grid.splits > 1 else 0
        self._launch = Prepared(
            triangle_kernel,
            grid.programs,
            (
                *query.stride[:3], *key.stride[:3], *value.stride[:3], *self._strides[:3],
                0 if key_mask is None else key_mask.stride[0],
                q_len, kv_len, sink, window, last, geometry.reach_within(kv_len),
                scale * math.log2(math.e), grid.last_programs, grid.last_tiles, grid.splits, grid.split_keys,
            ),
            HEADS=heads, KV_HEADS=kv_heads, GROUP=grid.group, DIM=dim, DIM_V=v_dim,
            BLOCK_D=_padded(dim), BLOCK_DV=_padded(v_dim), BLOCK_M=shapes.rows, BLOCK_N=shapes.keys,
            FULL_N=shapes.full_keys or shapes.keys, PADDED=key_mask is not None, DONE=completes,
            REACH=geometry.reach is not None, WRITE_LSE=with_lse, FLOAT32=query.dtype == torch.float32,
            STAGES=shapes.stages, FULL_STAGES=shapes.full_stages or shapes.stages,
            SINK_LOGITS=scores[0], SOFTCAP=scores[1],
            num_warps=shapes.warps, num_stages=shapes.stages, maxnreg=shapes.registers,
        )  # fmt: skip

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        extent: Tensor | None,
        done: tuple[Tensor, Tensor] | None = None,
        sink_logits: Tensor | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        there = None
        if done is not None:
            out, there = done
        elif out is None:
            out = empty(query, self._shape, self._strides)
        lse = None
        if self._with_lse:
            lse = empty(query, self._shape[:3], self._lse_strides, torch.float32)
        scratch = scratch_memory(query, self._scratch) if self._scratch else None
        self._launch(out, query, key, value, out, lse, key_mask, extent, there, scratch, sink_logits)
        return out, lse


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


def row_grid(query: Kind | Tensor, key: Kind | Tensor, last: int, shapes: Tuning) -> RowGrid:
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
