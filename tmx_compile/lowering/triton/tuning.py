"""Which kernel a call gets and its block shapes: a small measured table, never a search at a user's first prompt.

The choice depends on what is fixed per model and layer (dtype, heads, head dims, geometry), and on the length in a few
steps only: with few rows tiles are smaller, with many another kernel runs, and where a quarter of all rows are last
rows those decide.
Measured on an H100: benchmarks/results/operator_cuda.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """A launch of the general kernel.

    Attributes:
        rows: stacked rows per tile.
        keys: keys per block.
        warps: warps per program.
        stages: depth of the software pipeline.
        registers: most registers a thread may take; None for what the compiler likes.
        full_keys, full_stages: the same for the blocks that need no mask; None for ``keys`` and ``stages``.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    full_keys: int | None = None
    full_stages: int | None = None


SMALL = Tuning(64, 64, 4, 1, 168, 32, 2)
"""One block holds all keys of a tile: many small programs a multiprocessor hide each other's waiting.

Only the last rows walk further; half the keys twice as deep takes the same shared memory.
"""

LARGE = Tuning(128, 32, 8, 3, 128)
"""Two programs a multiprocessor: one's softmax runs beside the other's products."""

LARGE_HEADS = Tuning(64, 32, 4, 2)
"""Head dims above 128 fill the shared memory of any GPU since Ampere."""

FLOAT32 = Tuning(64, 32, 4, 2)
FLOAT32_LARGE_HEADS = Tuning(32, 16, 4, 1)


@dataclass(frozen=True)
class HopperTuning:
    """A launch of the Hopper kernel.

    Attributes:
        keys: per block.
        first: keys of a tile's first block; the same, or fewer where that wastes less.
        stages: blocks in flight.
        queries: tiles whose queries are there or on their way. With the blocks they fill the shared memory at head dim
            128.
        overhead: what a tile takes beside its blocks, in blocks.
        split_keys: keys that one of more than two splits of the last rows walks at least.
    """

    keys: int
    first: int
    stages: int
    queries: int
    overhead: int
    split_keys: int


HOPPER_REGISTERS = (168, 232, 40)
"""Per thread of the Hopper kernel: at launch, computing, copying."""


@dataclass(frozen=True)
class BackwardTuning:
    """The launches of the backward pass: over tiles of rows, over tiles of keys, over the sinks.

    ``sinks.keys`` is the most that a tile of sinks holds; a few sinks get a smaller one.
    """

    queries: Tuning
    keys: Tuning
    sinks: Tuning


BACKWARD = BackwardTuning(Tuning(64, 64, 4, 2), Tuning(32, 64, 4, 2), Tuning(64, 32, 4, 2))
BACKWARD_LARGE_HEADS = BackwardTuning(Tuning(64, 16, 8, 2), Tuning(16, 64, 8, 2), Tuning(32, 16, 4, 2))
BACKWARD_FLOAT32 = BackwardTuning(Tuning(32, 32, 8, 1), Tuning(32, 32, 8, 1), Tuning(32, 32, 8, 1))
BACKWARD_FLOAT32_LARGE_HEADS = BackwardTuning(Tuning(16, 16, 4, 1), Tuning(16, 16, 8, 1), Tuning(16, 16, 8, 1))

COUNTERS = 1024
"""Tiles whose splits can be counted in one launch."""

LEAST_SPLIT = 256
"""Keys that one part of the last rows walks at least, or rows that one part of the sinks does: less would cost more in
the merge than it saves."""

_LEAST_OF_HOPPER = 4 * 128
"""Stacked rows for each multiprocessor, tiles of 128, from which the Hopper kernel pays: one program a multiprocessor
takes them one after another, and with fewer the last one's end would be waited for."""
_LEAST_OF_LARGE = 2 * LARGE.rows
"""Stacked rows for each multiprocessor from which there are more large tiles than could all run at once: with fewer,
half the rows a tile make twice as many programs."""


def enough_for_hopper(rows: int, multiprocessors: int) -> bool:
    """Whether the Hopper kernel pays for ``rows`` stacked rows: batch x query heads x tokens."""
    return rows >= _LEAST_OF_HOPPER * multiprocessors


def row_steps(heads: int, multiprocessors: int) -> tuple[int, ...]:
    """The numbers of tokens, ascending, from which on a prompt of one sequence runs another kernel than with fewer."""
    return tuple(-(-rows * multiprocessors // heads) for rows in (_LEAST_OF_LARGE, _LEAST_OF_HOPPER))


def choose(element_size: int, dim: int, slots: int, rows: int, multiprocessors: int) -> Tuning:
    """The general kernel's shapes.

    Args:
        element_size: of the dtype, bytes.
        dim: the larger padded head dim.
        slots: sinks and window together, or all keys where last rows decide.
        rows: stacked rows, batch x query heads x tokens.
        multiprocessors: of the GPU.
    """
    if element_size == 4:
        return FLOAT32 if dim <= 128 else FLOAT32_LARGE_HEADS
    if dim > 128:
        return LARGE_HEADS
    few = dim == 128 and rows < _LEAST_OF_LARGE * multiprocessors
    return SMALL if few or one_block(slots) else LARGE


_NEVER = 1 << 40
"""Keys that a split walks at least, where there are no more than two."""


def choose_hopper(sink: int, window: int, positions: int, *, mostly_last: bool = False) -> HopperTuning:
    """The Hopper kernel's shapes for tiles of so many positions.

    Blocks of 128 keys halve the work beside the products. Narrow windows get blocks of 64, of which fewer keys are
    empty. Tiles of the narrowest wait for memory: last rows run beside them, in two splits. ``mostly_last``: last rows
    decide, which walk all keys.
    """
    # Sinks take whole pieces of 16 slots.
    sinks = (sink + 15) // 16 * 16
    slots = sinks + window + positions
    # More sinks than a block holds take more registers than large blocks leave.
    if (slots <= 320 and not mostly_last) or sink > 128:
        return HopperTuning(64, _first_block(sinks, slots, 64), 4, 2, 3, _NEVER if slots <= 192 else 2048)
    return HopperTuning(128, 128 if mostly_last else _first_block(sinks, slots, 128), 2, 3, 2, 2048)


def _first_block(sinks: int, slots: int, keys: int) -> int:
    """Keys of the first block: no more than are left beside whole blocks, and room for the sinks."""
    left = max(slots % keys or keys, sinks)
    return next((first for first in (16, 32, 64) if left <= first), keys)


def choose_backward(element_size: int, dim: int) -> BackwardTuning:
    """The backward kernels' shapes for a dtype's size in bytes and the larger padded head dim."""
    if element_size == 4:
        return BACKWARD_FLOAT32 if dim <= 128 else BACKWARD_FLOAT32_LARGE_HEADS
    return BACKWARD if dim <= 128 else BACKWARD_LARGE_HEADS


def one_block(slots: int) -> bool:
    """Whether one block holds all keys of a small tile: ``slots`` sinks and window keys, and its own 16 positions."""
    return slots + 16 <= SMALL.keys


def splits(tiles: int, kv_len: int, rows: int, multiprocessors: int, least: int = LEAST_SPLIT) -> int:
    """Parts of the keys for the last rows: work for every multiprocessor, bounded partial results, no part too small.

    Partial results take ``multiprocessors x 128`` rows at most: on an H100 8.7 MB at head dim 128, under 1% of the
    result at 131,072 tokens and 32 heads. More than two have ``least`` keys.
    """
    if tiles > COUNTERS:
        return 1
    return max(1, min(multiprocessors * 128 // rows // tiles, kv_len // LEAST_SPLIT, max(2, kv_len // least)))


def sink_splits(tiles: int, rows: int, multiprocessors: int) -> int:
    """Parts of the rows that see the sinks, for ``tiles`` tiles of sinks and ``rows`` stacked rows.

    Two programs for every multiprocessor, none with less than :data:`LEAST_SPLIT` rows.
    """
    if tiles > COUNTERS:
        return 1
    return max(1, min(2 * multiprocessors // tiles, rows // LEAST_SPLIT))
