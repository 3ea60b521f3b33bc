"""The page's pictures, as SVG.

What is drawn is hashed into the file, so that the check does not depend on the drawing library's version.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.pages.markdown import slashed

_DIGEST = re.compile(r"data sha256 ([0-9a-f]{64})")


class Picture:
    """A picture: its data, and how it is drawn on a new figure."""

    def __init__(self, file: str, data: Any, draw: Callable[[Any, Any], None]) -> None:
        self.file = file
        self._data, self._draw = data, draw

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self._draw.__name__, self._data]).encode()).hexdigest()

    def is_current(self, folder: Path) -> bool:
        """Whether the stored picture shows this data."""
        path = folder / self.file
        match = _DIGEST.search(path.read_text(encoding="utf-8")) if path.is_file() else None
        return match is not None and match[1] == self.digest

    def write(self, folder: Path) -> None:
        """Draw it into a folder. The same data gives the same bytes with the same version of the library."""
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.hashsalt": "tmx", "svg.fonttype": "none", "font.size": 9}):
            figure = Figure(layout="constrained")
            self._draw(figure, self._data)
            about = {"Date": None, "Description": f"data sha256 {self.digest}"}
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", metadata=about)
        folder.mkdir(parents=True, exist_ok=True)
        # The library leaves blanks at the ends of lines.
        text = "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"
        (folder / self.file).write_text(text, encoding="utf-8")


def grid(drawn: Any, panels: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Axes for each panel of numbers of sparse layers, with what it holds; three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    drawn.set_size_inches(3.4 * columns + 0.4, 2.8 * rows)
    for i, (title, lines) in enumerate(panels.items()):
        axes = drawn.add_subplot(rows, columns, i + 1)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("sparse layers")
        axes.grid(alpha=0.3)
        yield axes, lines
        axes.legend(fontsize=7)


def operator(result: Any, file: str) -> Picture:
    """Milliseconds against tokens: dense, each lowering and the floor, a panel for each dtype and geometry."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for r in result["records"]:
        lines = panels.setdefault(f"{r['dtype']}, {slashed(r['geometry'])}", {})
        for name, value in (("dense", r["dense_ms"]), ("floor", r["floor_ms"]), (r["lowering"], r["ms"])):
            point = [r["n"], value]
            if value is not None and point not in lines.setdefault(name, []):
                lines[name].append(point)
    return Picture(file, panels, _draw_lines)


def ttft(result: Any, file: str) -> Picture:
    """Seconds of each variant that was run without a mask and without CUDA graphs, a panel for each model."""
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for r in result["records"]:
        if r["ms"] is not None and not r["mask"] and not r["graphs"]:
            panels.setdefault(r["model"], {}).setdefault(r["variant"], []).append([r["tokens"], r["ms"] / 1e3])
    return Picture(file, panels, _draw_bars)


def _draw_lines(figure: Any, panels: dict[str, dict[str, list[list[float]]]]) -> None:
    columns = 3 if len(panels) % 3 == 0 else min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure.set_size_inches(3.2 * columns + 0.4, 2.8 * rows)
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, points in lines.items():
            style = {"dense": "k-o", "floor": "k:"}.get(name, "-o")
            axes.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)


def _draw_bars(figure: Any, panels: dict[str, dict[str, list[list[float]]]]) -> None:
    figure.set_size_inches(4.6 * len(panels), 3.2)
    for i, (title, bars) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), i + 1)
        lengths = sorted({tokens for points in bars.values() for tokens, _ in points})
        width = 0.8 / len(bars)
        for number, (name, points) in enumerate(bars.items()):
            at = [lengths.index(tokens) + number * width for tokens, _ in points]
            axes.bar(at, [seconds for _, seconds in points], width, label=name)
        axes.set_xticks([x + 0.4 - width / 2 for x in range(len(lengths))], [f"{n:,}" for n in map(int, lengths)])
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("tokens")
        axes.set_ylabel("seconds to first token")
        axes.legend(fontsize=7)
        axes.grid(axis="y", alpha=0.3)
