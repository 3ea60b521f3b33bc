"""Masks and the running softmax of the Hopper kernel, on the scores of 64 stacked rows and a block of keys.

Importing this module needs Triton with Gluon for Hopper.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tmx_compile.lowering.triton.hopper_ring import CONSUMERS


@gluon.jit
def softmax(scores, maximum, scale):
    """The running softmax (base 2): weights of this block, their sum, new maximum, and what shrinks older weights."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_maximum, 1))
    shrink = gl.exp2(maximum - new_maximum)
    return weights, gl.sum(weights, 1), new_maximum, shrink


@gluon.jit
def _columns(scores, first, POSITIONS: gl.constexpr, BLOCK_N: gl.constexpr):
    """The scores as a thread holds them, two columns in every eight; their columns, but for what depends on the thread;
    that rest; and the positions of the rows.

    The columns are constants so: no register holds them, and comparing with one is a single instruction.
    """
    parts = scores.reshape([64, BLOCK_N // 8, 4, 2])
    PARTS: gl.constexpr = parts.type.layout
    eighth = gl.arange(0, BLOCK_N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS))))
    pair = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, PARTS))))
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS))))
    at = 8 * eighth.expand_dims(0).expand_dims(2).expand_dims(3) + half.expand_dims(0).expand_dims(1).expand_dims(2)
    own = 2 * pair.expand_dims(0).expand_dims(1).expand_dims(3)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, PARTS)))) % POSITIONS
    return parts, at, own, first + row.expand_dims(1).expand_dims(2).expand_dims(3)


@gluon.jit
def mask_front(
    scores, first, first_slot, shift, work, counts, mask_ptr,
    POSITIONS: gl.constexpr, layout: gl.constexpr, BLOCK_N: gl.constexpr, SINKS: gl.constexpr, PADDED: gl.constexpr,
    REACH: gl.constexpr,
):  # fmt: skip
    """Drop what lies before a row's window and is no sink of its, and hidden keys.

    With :func:`mask_end` this is the formula of the mask (:mod:`tmx_compile.mask.formula`).
    """
    parts, at, own, position = _columns(scores, first, POSITIONS, BLOCK_N)
    window_shift = shift + first_slot + own
    allowed = at >= gl.maximum(position - work.span, work.low) - window_shift
    if SINKS:
        newest = position - work.sink_low - first_slot - own
        sink = at <= gl.minimum(newest, work.sinks - 1 - first_slot - own)
        if REACH:
            sink = sink & (at >= newest - counts.reach)
        allowed = allowed | sink
    parts = gl.where(allowed, parts, float("-inf"))
    if PADDED:
        if work.holes != 0:
            valid = gl.load(mask_ptr + window_shift + at, mask=at >= work.low - window_shift, other=0) != 0
            if SINKS:
                sink_ptr = mask_ptr + (work.sink_low + first_slot + own) + at
                valid = valid | (gl.load(sink_ptr, mask=at < work.sinks - first_slot - own, other=0) != 0)
            parts = gl.where(valid, parts, float("-inf"))
    return gl.convert_layout(parts.reshape([64, BLOCK_N]), layout, assert_trivial=True)


@gluon.jit
def mask_end(scores, first, first_slot, shift, POSITIONS: gl.constexpr, layout: gl.constexpr, BLOCK_N: gl.constexpr):
    """Drop keys after a row: among an item's last slots, no more of them than it has positions."""
    parts, at, own, position = _columns(scores, first, POSITIONS, BLOCK_N)
    allowed = (at < BLOCK_N - POSITIONS * CONSUMERS) | (at <= position - (shift + first_slot + own))
    parts = gl.where(allowed, parts, float("-inf"))
    return gl.convert_layout(parts.reshape([64, BLOCK_N]), layout, assert_trivial=True)
