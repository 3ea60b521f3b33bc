"""Markdown tables, and numbers as the pages write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Fields(dict[str, Any]):
    """Plain data whose missing fields are an error that names the file and the place."""

    def __init__(self, items: dict[str, Any], where: str) -> None:
        super().__init__(items)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"{self.where} lacks the field {name!r}")


def table(head: Sequence[str], rows: Sequence[str | Sequence[str]]) -> str:
    """A Markdown table; a row is its cells, or the cells already joined by bars."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {line if isinstance(line, str) else ' | '.join(line)} |" for line in lines)


def ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 99.5 else f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def slashed(numbers: Sequence[int]) -> str:
    return "/".join(map(str, numbers))


def spans(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"


def mib(value: float) -> str:
    """Bytes in MiB."""
    return f"{value / 2**20:,.1f}"


def percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.0%}"
