"""From tensors to one launch of the kernel. Importing this module needs Triton."""

from __future__ import annotations

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
from tmx_compile.lowering.triton.forward import Forward
from tmx_compile.lowering.triton.kernel import triangle_kernel
from tmx_compile.lowering.triton.prepared import TRIED_VERSION, Kind, Prepared, as_key, kind, remember
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
    return forward(
        query, key, value, key_mask, extent, *geometry.counts, scale, geometry.reach, sink_logits, softcap,
        with_lse, shapes, out, done,
    )  # fmt: skip


_known: dict[Any, Forward] = {}
# By the CUDA driver's number, as ``Tensor.get_device`` has it.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)


def forget() -> None:
    """Prepare every kind of call anew."""
    _known.clear()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    sink: int,
    window: int,
    last: int,
    scale: float,
    reach: int | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    with_lse: bool = False,
    shapes: Tuning | None = None,
    out: Tensor | None = None,
    done: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`attend`, its counts as operators have them.

    A kind of call that was made before is found by one flat key, and launched again: what stands here is the host's
    share of a short prompt.
    """
    device = query.get_device()
    if device >= 0 and device != _current_device():
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return forward(
                query, key, value, key_mask, extent, sink, window, last, scale, reach, sink_logits, softcap,
                with_lse, shapes, out, done,
            )  # fmt: skip
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
    unaligned = (addresses[0] | addresses[1] | addresses[2]) % 16
    rest = None
    if not (key_mask is None and sink_logits is None and out is None and done is None and extent is None):
        rest = as_key((key_mask, extent, sink_logits, out, *(done or ())))
    kind_of_call = (
        query.shape, query.stride(), query.dtype, device,
        key.shape, key.stride(), key.dtype, key.get_device(),
        value.shape, value.stride(), value.dtype, value.get_device(),
        unaligned and tuple([x % 16 == 0 for x in addresses]),
        sink, window, last, scale, reach, softcap, with_lse, shapes, rest,
    )  # fmt: skip
    launch = _known.get(kind_of_call)
    if launch is not None:
        return launch(query, key, value, key_mask, extent, done, sink_logits, out)
    return _first(
        kind_of_call, query, key, value, key_mask, extent, Geometry(sink, window, last, reach), scale, sink_logits,
        softcap, with_lse, shapes, out, done,
    )  # fmt: skip


def _first(
    kind_of_call: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    extent: Tensor | None,
    geometry: Geometry,
    scale: float,
    sink_logits: Tensor | None,
    softcap: float | None,
    with_lse: bool,
    shapes: Tuning | None,
    out: Tensor | None,
    done: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """A call of a kind that is not known, or whose tensors have to be changed every time."""
    if out is not None:
        _check_out(out, query, value)
    given = key_mask, sink_logits, query, key, value
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous() if INTERPRETED else sink_logits.contiguous()
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    # The interpreter multiplies bfloat16 as if it were integers.
    dtype, inexact = query.dtype, INTERPRETED and query.dtype == torch.bfloat16
    if inexact:
        query, key, value = query.float(), key.float(), value.float()
    if any(x is not y for x, y in zip(given, (key_mask, sink_logits, query, key, value), strict=True)):
        made, lse = attend(
            query, key, value, key_mask, extent, geometry, scale, sink_logits, softcap, with_lse, shapes=shapes,
            out=None if inexact else out, done=done,
        )  # fmt: skip
        if inexact:
            made = made.to(dtype) if out is None else out.copy_(made)
        return made, lse
    given_out = out if done is None else done[0]
    launch = prepare(
        kind(query), kind(key), kind(value), None if key_mask is None else kind(key_mask), geometry, scale,
        with_lse=with_lse, shapes=shapes, out=None if given_out is None else kind(given_out),
        sink_logits=sink_logits is not None, softcap=softcap, completes=done is not None,
    )  # fmt: skip
    return remember(_known, kind_of_call, launch)(query, key, value, key_mask, extent, done, sink_logits, out)


def prepare(
    query: Kind,
    key: Kind,
    value: Kind,
    key_mask: Kind | None,
    geometry: Geometry,
    scale: float,
    *,
    with_lse: bool = False,
    shapes: Tuning | None = None,
    out: Kind | None = None,
    sink_logits: bool = False,
    softcap: float | None = None,
    completes: bool = False,
) -> Forward:
    """What one kind of call computes once: a function of all the tensors.

    The arguments are those of :func:`attend`; whether there are ``sink_logits``, and whether it ``completes`` a result
    that is ``out``.
    """
    geometry = geometry.bounded(key.shape[2], query.shape[2])
    sink, window, last = geometry.counts
    batch, heads, q_len, _ = query.shape
    # Where many rows read all keys, those decide the block shapes.
    slots = sink + window if 4 * last < q_len else key.shape[2]
    size = batch * heads * q_len, multiprocessors(query.device)
    general = shapes is not None or completes
    # The Hopper kernel has neither learned sinks nor a softcap.
    general = general or sink_logits or softcap is not None
    if not general and tuning.enough_for_hopper(*size) and HOPPER is not None and HOPPER.takes(query, key, value):
        return HOPPER.forward(query, key, value, key_mask, geometry, scale, out, with_lse)  # type: ignore[no-any-return]
    if shapes is None:
        dim = max(query.shape[3], value.shape[3])
        shapes = tuning.choose(query.dtype.itemsize, _padded(dim), slots, *size)
    scores = sink_logits, softcap or 0.0
    return _general(query, key, value, key_mask, geometry, scale, with_lse, shapes, out, scores, completes=completes)


def _padded(dim: int) -> int:
    padded: int = max(16, triton.next_power_of_2(dim))
    return padded


def _general(
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
) -> Forward:
    """A launch of the general kernel."""
    _, heads, q_len, dim = query.shape
    kv_heads, kv_len, v_dim = key.shape[1], key.shape[2], value.shape[3]
    sink, window, last = geometry.counts
    grid = row_grid(query, key, last, shapes)
    strides = strides_by_tokens(heads, q_len, v_dim) if out is None else out.stride
    # Partial results and their log-sum-exps, if there are several.
    parts = grid.last_programs * shapes.rows * (v_dim + 1) if grid.splits > 1 else 0
    launch = Prepared(
        triangle_kernel,
        query.device,
        grid.programs,
        (
            *query.stride[:3], *key.stride[:3], *value.stride[:3], *strides[:3],
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
    return Forward(launch, query, value, with_lse, parts)


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
