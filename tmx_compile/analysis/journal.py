"""A file that remembers finished measurements, so that an interrupted analysis goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "tmx-{}-journal-1"


class Journal:
    """Finished measurements by name, one JSON line each, written as soon as they are known.

    Args:
        path: the file, made where it is missing; None: nothing is remembered beyond this process.
        header: what must be the same for measurements to be used again: model, geometry, estimator and so on.
        of: what is measured, a word: "calibration", "evaluation".

    Raises:
        ValueError: the file is no journal, or one with another header.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, header: Mapping[str, Any], of: str = "calibration") -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, Any] = {}
        article = "an" if of[0] in "aeiou" else "a"
        first = {"format": FORMAT.format(of), **header}
        if self._path is None:
            return
        if not self._path.is_file() or self._path.stat().st_size == 0:
            self._path.write_text(json.dumps(first) + "\n", encoding="utf-8")
            return
        text = self._path.read_text(encoding="utf-8")
        *lines, rest = text.split("\n")
        stored = _parsed(lines[0]) if lines else None
        if not isinstance(stored, dict) or stored.get("format") != first["format"]:
            raise ValueError(f"resume must be a file that {article} {of} wrote, {os.fspath(self._path)} is none")
        for name, value in json.loads(json.dumps(first)).items():
            if stored.get(name) != value:
                raise ValueError(
                    f"resume file {os.fspath(self._path)} has {name}={stored.get(name)!r}, this {of} {value!r}"
                )
        for line in lines[1:]:
            entry = _parsed(line)
            if isinstance(entry, dict) and "key" in entry:
                self._known[entry["key"]] = entry["value"]
        if rest:
            # The writer was stopped in the middle of a line.
            self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def get(self, key: str) -> Any:
        """What was measured under a name, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember a measurement (plain data)."""
        self._known[key] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
