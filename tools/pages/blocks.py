"""Hand-written pages with generated blocks between two marks each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

_BEGIN = re.compile(r"^<!-- begin (\w+) -->$", re.MULTILINE)


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a block."""
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def filled(page: Path, blocks: Mapping[str, str]) -> str:
    """The text of a page with its blocks as they are told; what is written around them stays.

    Raises:
        ValueError: the page is missing, lacks the marks of a block, or has those of an unknown one.
    """
    if not page.is_file():
        raise ValueError(f"{page.name} is missing; its text is written by hand")
    text = page.read_text(encoding="utf-8")
    if unknown := [name for name in _BEGIN.findall(text) if name not in blocks]:
        raise ValueError(f"{page.name} has marks of unknown blocks: {', '.join(unknown)}; known: {', '.join(blocks)}")
    for name, block in blocks.items():
        begin, end = marks(name)
        before, found, rest = text.partition(f"{begin}\n")
        _, ended, after = rest.partition(f"{end}\n")
        if not found or not ended:
            raise ValueError(f"{page.name} lacks the marks {begin} and {end}")
        text = f"{before}{begin}\n\n{block}\n\n{end}\n{after}"
    return text
