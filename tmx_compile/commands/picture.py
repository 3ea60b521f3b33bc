"""A picture of one mask, to scale: its sections as polygons of an SVG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tmx_compile.mask.geometry import Geometry

Point = tuple[float, float]
# a * key + b * row <= c
HalfPlane = tuple[int, int, float]


@dataclass(frozen=True)
class Shape:
    """A mask of a prompt in one layer.

    Args:
        tokens: rows and keys.
        geometry: what a row sees, within the layer's own sliding window where it has one.
    """

    tokens: int
    geometry: Geometry


def section_polygons(shape: Shape) -> list[tuple[str, list[Point]]]:
    """The sections and their corners as (key, row), in the order in which they are painted: a later one covers.

    A cell (row i, key j) is the unit square from (j, i), and belongs to the section that covers its centre. Diagonal
    edges stand half a cell off the diagonal, so that a straight line sorts the centres as the steps would.
    """
    n = shape.tokens
    causal: list[HalfPlane] = [(1, -1, 0.5)]
    if shape.geometry.reach is not None:
        causal.append((-1, 1, shape.geometry.reach + 0.5))
    if shape.geometry.is_dense:
        parts: list[tuple[str, list[HalfPlane]]] = [("dense", [])]
    else:
        sink, window, last = shape.geometry.counts
        parts = [
            ("middle", []),
            ("last", [(0, -1, last - n)]),
            ("streaming", [(1, 0, sink)]),
            ("streaming", [(-1, 1, window + 0.5)]),
        ]
    square: list[Point] = [(0, 0), (n, 0), (n, n), (0, n)]
    found = []
    for name, planes in parts:
        corners = square
        for plane in (*causal, *planes):
            corners = list(_clip(corners, plane))
        if len(corners) > 2:
            found.append((name, corners))
    return found


def svg(shape: Shape, label: str) -> str:
    """The picture, rows downwards and keys to the right; colours come from the classes of the page around it."""
    n = shape.tokens
    drawn = "".join(
        f'<polygon class="{name}" points="{" ".join(f"{x:.10g},{y:.10g}" for x, y in _rounded(corners))}"/>'
        for name, corners in section_polygons(shape)
    )
    return (
        f'<svg class="mask" viewBox="0 0 {n} {n}" role="img" aria-label="{label}">'
        f'<rect class="frame" width="{n}" height="{n}"/>{drawn}</svg>'
    )


def _clip(corners: list[Point], plane: HalfPlane) -> Iterator[Point]:
    """The part of a convex polygon inside a half-plane: edges that cross the line are cut where they cross it."""
    a, b, c = plane
    for (x, y), (u, v) in zip(corners, [*corners[1:], *corners[:1]], strict=True):
        here, there = c - a * x - b * y, c - a * u - b * v
        if here >= 0:
            yield x, y
        if (here > 0 > there) or (here < 0 < there):
            part = here / (here - there)
            yield x + part * (u - x), y + part * (v - y)


def _rounded(corners: list[Point]) -> list[Point]:
    return [(round(x, 3), round(y, 3)) for x, y in corners]
