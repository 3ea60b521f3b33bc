"""How blocks of keys are chosen at run time, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

METHODS = ("pooled", "antidiagonal", "sampled")
"""How the mass of a block is estimated: see :mod:`tmx_compile.operator.dynamic.estimate` and, for the last,
:mod:`~tmx_compile.operator.dynamic.sampled`."""
BLOCKS = (16, 32, 64, 128)
"""Sides of a block that a kernel tiles by."""


def checked_method(name: str, value: Any) -> str:
    """The name of a method, or a ``ValueError`` that names the parameter and the value."""
    if value not in METHODS:
        raise ValueError(f"{name} must be one of {', '.join(METHODS)}, got {value!r}")
    return str(value)


def checked_share(name: str, value: Any) -> float:
    """A share above 0 and at most 1, likewise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return float(value)


def checked_block(name: str, value: Any) -> int:
    """The side of a block, likewise."""
    if isinstance(value, bool) or value not in BLOCKS:
        raise ValueError(f"{name} must be one of {', '.join(map(str, BLOCKS))}, got {value!r}")
    return int(value)


def usual_group(method: str, block: int) -> int:
    """The tokens of a group where none are given: for sampled rows a quarter of a block, at least 16; else 16."""
    return max(16, block // 4) if method == "sampled" else 16


def checked_group(name: str, value: Any, block: int) -> int:
    """The tokens of a group in blocks of ``block``, likewise."""
    if isinstance(value, bool) or value not in BLOCKS or value > block:
        known = ", ".join(str(size) for size in BLOCKS if size <= block)
        raise ValueError(f"{name} must be one of {known} in blocks of {block}, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Selection:
    """What a row of blocks keeps of the blocks before it: see :func:`tmx_compile.operator.block_sparse_attention`.

    Attributes:
        method: how masses are estimated: "pooled", "antidiagonal" or "sampled".
        share: how much of the estimated mass of a row of blocks is kept, in (0, 1].
        block: rows and keys of a block: 16, 32, 64 or 128.
        stride: tokens of a group, the unit of the estimate, of which one row is "sampled"; divides ``block``.
        sink: leading valid keys whose blocks are always kept.
        last: final valid rows whose blocks of rows keep everything.

    Raises:
        ValueError: a value outside of these, naming it.
    """

    method: str = "sampled"
    share: float = 0.95
    block: int = 128
    stride: int = 32
    sink: int = 4
    last: int = 64

    def __post_init__(self) -> None:
        checked_method("method", self.method)
        checked_share("share", self.share)
        checked_block("block", self.block)
        if self.stride < 1 or self.block % self.stride != 0:
            raise ValueError(f"stride must divide block={self.block}, got {self.stride}")
        for name in ("sink", "last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def arguments(self) -> tuple[str, float, int, int, int, int]:
        """The fields in order, as the operator takes them."""
        return self.method, self.share, self.block, self.stride, self.sink, self.last

    def bounded(self, kv_len: int) -> Selection:
        """The same with no count beyond the number of keys."""
        return replace(self, sink=min(self.sink, kv_len), last=min(self.last, kv_len))
