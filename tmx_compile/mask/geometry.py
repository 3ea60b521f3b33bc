"""The counts that the triangle mask is made of, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

ALL_ROWS = 2**31 - 1
"""``last`` for which every row is a last row, those behind the last valid key too: the mask is causal and padding
alone (dense)."""


@dataclass(frozen=True)
class Geometry:
    """What a row attends to, in tokens: see :func:`tmx_compile.operator.triangle_attention`.

    Attributes:
        sink: leading valid keys that every row attends to.
        window: how far behind its own key a row looks.
        last: final valid rows that attend to every key; :data:`ALL_ROWS`: all rows.
        reach: how far behind its own key the layer lets any row look at all, sinks and last rows included; None: no
            limit.
    """

    sink: int
    window: int
    last: int
    reach: int | None = None

    def __str__(self) -> str:
        """As options write it: sinks/window/last rows."""
        return "/".join(map(str, self.counts)) + ("" if self.reach is None else f" within {self.reach}")

    @property
    def slug(self) -> str:
        """The counts in the name of a file or an entry."""
        return "-".join(map(str, self.counts))

    @property
    def is_dense(self) -> bool:
        """Whether every row is a last row, whatever the length."""
        return self.last >= ALL_ROWS

    @property
    def counts(self) -> tuple[int, int, int]:
        """(sink, window, last), as operators take them."""
        return self.sink, self.window, self.last

    def arguments(self, scale: float) -> tuple[int | float, ...]:
        """What follows the tensors in a call of the operator: the counts, the scale, and the reach if there is one."""
        return (*self.counts, scale, *(() if self.reach is None else (self.reach,)))

    def reach_within(self, kv_len: int) -> int:
        """How far behind its own key a row of ``kv_len`` keys looks at all: ``kv_len`` where nothing limits it."""
        return kv_len if self.reach is None else min(self.reach, kv_len)

    def as_dense(self) -> Geometry:
        """Every row a last row, within the same reach."""
        return Geometry(0, 0, ALL_ROWS, self.reach)

    def within_reach(self) -> Geometry:
        """The same mask with a window that is no wider than the reach."""
        return self if self.reach is None else replace(self, window=min(self.window, self.reach))

    def bounded(self, kv_len: Any, q_len: Any = None) -> Geometry:
        """The same mask of ``kv_len`` keys and ``q_len`` rows, with no count beyond a length that is an int.

        A length that is None, symbolic or a node bounds nothing. A bounded ``last`` no longer means all rows where it
        was :data:`ALL_ROWS`: with padding, look at the end that last rows count from before.
        """
        sink, window, last = self.counts
        if isinstance(kv_len, int):
            sink, window = min(sink, kv_len), min(window, kv_len)
        if isinstance(q_len, int):
            last = min(last, q_len)
        return replace(self, sink=sink, window=window, last=last)
