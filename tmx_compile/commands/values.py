"""Values of options, read from text, and what several commands check."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from tmx_compile.mask.geometry import Geometry


def count(text: str) -> int:
    """An option's value that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """An option's value such as 4096,32768: distinct whole numbers of at least 1."""
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def number(text: str) -> float:
    """An option's value that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """An option's value such as 0.8,0.9: distinct finite numbers of at least 0."""
    return tuple(dict.fromkeys(number(part.strip()) for part in text.split(",")))


def geometry(text: str) -> Geometry:
    """An option's value such as 8/64/128."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be sinks/window/last rows as in 8/64/128, got {text!r}")
    return Geometry(*map(int, parts))


def geometries(text: str) -> tuple[Geometry, ...]:
    """An option's value such as 8/64/128,8/512/128, each once."""
    return tuple(dict.fromkeys(geometry(part.strip()) for part in text.split(",")))


def layers(text: str) -> tuple[int, ...]:
    """An option's value such as 20,21,24-27: layers counted from 0, ranges with both ends."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, final = part.strip().partition("-")
        if not first.isdecimal() or (dash and (not final.isdecimal() or int(final) < int(first))):
            raise argparse.ArgumentTypeError(f"must be layers counted from 0 as in 20,21,24-27, got {text!r}")
        found.extend(range(int(first), int(final if dash else first) + 1))
    return tuple(found)


def check_folders(**files: Path | None) -> None:
    """``ValueError``, with the option's name, for a file to write whose folder does not exist."""
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{name} must be a file in an existing folder, got {str(path)!r}")
