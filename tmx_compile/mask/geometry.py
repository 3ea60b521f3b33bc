"""The shape of the triangle as one value."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """Sinks, window, last rows (tokens), and how far back the layer itself lets a row see (None: no limit)."""

    sink: int
    window: int
    last: int
    reach: int | None = None
