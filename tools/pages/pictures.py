"""Pictures, as SVG, and what those of docs/benchmarks.md show.

What is drawn, and the code that draws it, are hashed into the file, so that the check does not depend on the version of
the drawing library.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.pages import drawing
from tools.pages.markdown import percent, slashed

_DIGEST = re.compile(r"data sha256 ([0-9a-f]{64})")


class Picture:
    """A picture: its data, and how it is drawn on a new figure."""

    def __init__(self, file: str, data: Any, draw: Callable[[Any, Any], None]) -> None:
        self.file = file
        self.data, self.draw = data, draw

    @property
    def digest(self) -> str:
        """Of the data and of the style."""
        style = Path(drawing.__file__).read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([self.draw.__name__, self.data, style]).encode()).hexdigest()

    def is_current(self, folder: Path) -> bool:
        """Whether the stored picture shows this data in this style."""
        path = folder / self.file
        match = _DIGEST.search(path.read_text(encoding="utf-8")) if path.is_file() else None
        return match is not None and match[1] == self.digest

    def write(self, folder: Path) -> None:
        """Draw it into a folder. The same data gives the same bytes with the same version of the library."""
        import matplotlib
        from matplotlib.figure import Figure

        style: Any = drawing.STYLE
        with matplotlib.rc_context(style):
            figure = Figure()
            self.draw(figure, self.data)
            about = {"Date": None, "Description": f"data sha256 {self.digest}"}
            drawn = io.StringIO()
            figure.savefig(drawn, format="svg", metadata=about)
        folder.mkdir(parents=True, exist_ok=True)
        # The library leaves blanks at the ends of lines.
        text = "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"
        (folder / self.file).write_text(text, encoding="utf-8")


def operator(result: Any, file: str) -> Picture:
    """How many times faster than dense the fastest lowering is, by tokens; a line for each dtype and geometry."""
    several = len(result["settings"]["dtypes"]) > 1
    ours = result["settings"]["lowerings"]
    best: dict[str, dict[int, float]] = {}
    for r in result["records"]:
        if r["speedup"] is not None and r["lowering"] in ours:
            line = best.setdefault(slashed(r["geometry"]) + (f", {r['dtype']}" if several else ""), {})
            line[r["n"]] = max(r["speedup"], line.get(r["n"], 0.0))
    lengths = sorted({n for line in best.values() for n in line})
    data = {
        "title": "One attention layer: the longer the prompt, the more is saved",
        "x": "tokens",
        "y": "times faster than dense",
        "scales": ["log", "log"],
        "named": "ends",
        "lines": [
            *([name, sorted(map(list, line.items())), "solid", i] for i, (name, line) in enumerate(best.items())),
            ["dense", [[n, 1.0] for n in lengths], "rule", 0],
        ],
    }
    return Picture(file, data, drawing.lines)


def ttft(result: Any, file: str) -> Picture:
    """Seconds at the longest prompt, of the best dense variant and the first triangle one of each model."""
    timed = [r for r in result["records"] if r["ms"] is not None and not r["mask"] and not r["graphs"]]
    longest = max(r["tokens"] for r in timed)
    groups = []
    for model in dict.fromkeys(r["model"] for r in timed):
        own = [r for r in timed if (r["model"], r["tokens"]) == (model, longest)]
        dense = min((r for r in own if r["geometry"] is None), key=lambda r: r["ms"], default=None)
        sparse = next((r for r in own if r["geometry"] is not None), None)
        if dense is None or sparse is None:
            continue
        name = f"{sparse['triangle_layers']} of {sparse['layers']} layers sparse"
        groups.append(
            [
                model,
                [
                    ["dense", dense["ms"] / 1e3, f"{dense['ms'] / 1e3:.1f} s"],
                    [name, sparse["ms"] / 1e3, f"{sparse['ms'] / 1e3:.1f} s ({percent(-sparse['reduction'], '+')})"],
                ],
            ]
        )
    data = {"title": f"Time to first token, a prompt of {longest:,} tokens", "x": "seconds", "groups": groups}
    return Picture(file, data, drawing.bars)
