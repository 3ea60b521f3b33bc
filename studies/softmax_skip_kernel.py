"""Dense causal attention that skips, inside the running softmax, tiles of keys whose maximum cannot matter.

The scores of a tile are computed in any case. Where no row's maximum comes within the threshold of what the row has
seen, exponentials and the product with the values are left out. Importing this module needs Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tmx_compile.lowering.triton.kernel import NO_MAXIMUM
from tmx_compile.operator.layout import empty_by_tokens


@triton.jit
def skipping_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    skipped_ptr,  # (programs,) int32
    q_head,
    q_row,
    k_head,
    k_row,
    o_head,
    o_row,
    tokens,
    scale,  # times log2(e)
    threshold,  # base 2
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SKIP: tl.constexpr,
    LOAD_ALL: tl.constexpr,
    NEAR_FIRST: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of rows of one head of one sequence; tokens are a multiple of both tiles, keys and values lie alike."""
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, KEYS)
    inside = tl.arange(0, DIM)
    query = tl.load(query_ptr + head * q_head + row[:, None].to(tl.int64) * q_row + inside[None, :])
    key_base = key_ptr + head // GROUP * k_head
    value_base = value_ptr + head // GROUP * k_head
    acc = tl.zeros([ROWS, DIM], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], NO_MAXIMUM, tl.float32)
    whole = row_tile * ROWS // KEYS
    own = ROWS // KEYS if ROWS > KEYS else 1
    skipped = 0
    for part in range(2):
        # The tiles that a mask has to look at, before or after the others.
        if (part == 0) == NEAR_FIRST:
            for tile in tl.range(whole, whole + own, num_stages=1):
                place = tile * KEYS + column
                at = place[:, None].to(tl.int64) * k_row + inside[None, :]
                scores = tl.dot(query, tl.trans(tl.load(key_base + at)))
                scores = tl.where(place[None, :] <= row[:, None], scores, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale)
                weights = tl.exp2(scores * scale - new_maximum[:, None])
                shrink = tl.exp2(maximum - new_maximum)
                total = total * shrink + tl.sum(weights, 1)
                value = tl.load(value_base + at)
                acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
                maximum = new_maximum
        else:
            for tile in tl.range(0, whole, num_stages=STAGES):
                at = (tile * KEYS + column)[:, None].to(tl.int64) * k_row + inside[None, :]
                scores = tl.dot(query, tl.trans(tl.load(key_base + at)))
                if LOAD_ALL:
                    value = tl.load(value_base + at)
                largest = tl.max(scores, 1) * scale
                matters = True
                if SKIP:
                    matters = tl.max(largest - maximum, 0) > -threshold
                if matters:
                    new_maximum = tl.maximum(maximum, largest)
                    weights = tl.exp2(scores * scale - new_maximum[:, None])
                    shrink = tl.exp2(maximum - new_maximum)
                    total = total * shrink + tl.sum(weights, 1)
                    if not LOAD_ALL:
                        value = tl.load(value_base + at)
                    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])
                    maximum = new_maximum
                else:
                    skipped += 1
    acc = acc / total[:, None]
    tl.store(
        out_ptr + head * o_head + row[:, None].to(tl.int64) * o_row + inside[None, :], acc.to(out_ptr.dtype.element_ty)
    )
    tl.store(skipped_ptr + head * tl.num_programs(0) + row_tile, skipped)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    threshold: float | None,
    *,
    near_first: bool = False,
    load_all: bool = False,
    rows: int = 128,
    keys: int = 128,
    warps: int = 8,
    stages: int = 2,
) -> tuple[Tensor, Tensor]:
    """Attention (1, H, N, D) of one sequence, and the number of tiles left out (H, N / rows).

    Args:
        query: (1, H, N, D).
        key, value: (1, Hkv, N, D), with the same strides.
        threshold: nats below the running maximum of its row that every score of a tile has to lie; None: all are taken.
        near_first: a row's own tiles come first, so that the running maximum is high early.
        load_all: values are loaded in any case, so that the loads can be pipelined.
        rows, keys, warps, stages: of the launch; the tokens are a multiple of both tiles.
    """
    tokens = query.shape[2]
    if tokens % rows or tokens % keys:
        raise ValueError(f"tokens must be a multiple of {rows} and {keys}, got {tokens}")
    out = empty_by_tokens(query, query.shape[3])
    skipped = torch.empty(query.shape[1], tokens // rows, dtype=torch.int32, device=query.device)
    log2_e = math.log2(math.e)
    skipping_kernel[(tokens // rows, query.shape[1])](
        query, key, value, out, skipped, *query.stride()[1:3], *key.stride()[1:3], *out.stride()[1:3], tokens,
        query.shape[3] ** -0.5 * log2_e, (threshold or 0.0) * log2_e, GROUP=query.shape[1] // key.shape[1],
        DIM=query.shape[3], ROWS=rows, KEYS=keys, SKIP=threshold is not None, LOAD_ALL=load_all, NEAR_FIRST=near_first,
        STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, skipped
