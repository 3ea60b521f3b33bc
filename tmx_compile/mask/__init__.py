"""Plans: which pairs of rows and keys attention computes, before any graph and any device is in sight.

``geometry.py`` holds the counts of a triangle mask and ``formula.py`` what they mean for a row and a key;
``algebra.py`` makes masks of rules, ``intervals.py`` reads it row by row, ``blocks.py`` block by block.
"""

from tmx_compile.mask.algebra import (
    And,
    Causal,
    Grid,
    LastRows,
    Mask,
    Not,
    Or,
    Padding,
    Sink,
    Window,
    attends,
    dense_section,
    holds,
    last_section,
    middle_section,
    streaming_section,
    to_dense,
    triangle,
)
from tmx_compile.mask.blocks import BlockCounts, BlockKind, BlockPlan, Runs, block_plan
from tmx_compile.mask.geometry import ALL_ROWS, Geometry
from tmx_compile.mask.intervals import (
    Affine,
    RowIntervals,
    Segment,
    equal,
    pair_count,
    pair_counts,
    row_intervals,
    subset,
)

__all__ = [
    "ALL_ROWS",
    "Affine",
    "And",
    "BlockCounts",
    "BlockKind",
    "BlockPlan",
    "Causal",
    "Geometry",
    "Grid",
    "LastRows",
    "Mask",
    "Not",
    "Or",
    "Padding",
    "RowIntervals",
    "Runs",
    "Segment",
    "Sink",
    "Window",
    "attends",
    "block_plan",
    "dense_section",
    "equal",
    "holds",
    "last_section",
    "middle_section",
    "pair_count",
    "pair_counts",
    "row_intervals",
    "streaming_section",
    "subset",
    "to_dense",
    "triangle",
]
