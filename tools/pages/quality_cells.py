"""The cells of a result file on quality, and the pictures of docs/quality.md that show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tools.pages import drawing
from tools.pages.markdown import Fields, slashed
from tools.pages.pictures import Picture

PICTURES = ("quality-layers.svg", "quality-tasks.svg")
RANDOM = ("random0", "random1", "random2")


@dataclass(frozen=True)
class Results:
    """The cells of a result file."""

    settings: Fields
    records: Sequence[Fields]

    @classmethod
    def of(cls, result: Fields) -> Results:
        return cls(result["settings"], [r for r in result["records"] if not r["part"].startswith("ranking/")])

    @property
    def plain(self) -> list[Fields]:
        """Cells with dense decoding, ablations apart."""
        return [r for r in self.records if r["decode"] == "dense" and not r["part"].endswith(("/ablations", "/turns"))]

    def where(self, **wanted: Any) -> list[Fields]:
        """The plain cells with these fields."""
        return [r for r in self.plain if all(r[name] == value for name, value in wanted.items())]

    @property
    def places(self) -> list[tuple[int, tuple[int, ...]]]:
        """The (prompt, geometry) pairs of the plain cells, in order."""
        return list(dict.fromkeys((r["prompt"], tuple(r["geometry"])) for r in self.plain))

    @property
    def geometries(self) -> list[tuple[int, ...]]:
        """The geometries of the plain cells, in order."""
        return list(dict.fromkeys(geometry for _, geometry in self.places))

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.settings["layers"])


def told(place: tuple[int, tuple[int, ...]]) -> str:
    """A (prompt, geometry) pair in words."""
    prompt, geometry = place
    return f"{prompt:,} tokens with {slashed(geometry)}"


def pictures(result: Fields) -> list[Picture]:
    """What the choice of layers costs, and whether retrieval and copying survive it, where each shows most."""
    found = Results.of(result)
    return [_divergence(found), _answered(found)]


def _divergence(found: Results) -> Picture:
    """Of the place with the most cells; the longest prompt of these."""
    place = max(found.places, key=lambda p: (len(found.where(prompt=p[0], geometry=list(p[1]))), p[0]))
    lines: dict[str, list[list[float]]] = {}
    for r in found.where(prompt=place[0], geometry=list(place[1])):
        name = "random" if r["policy"] in RANDOM else r["policy"]
        if name != "all":
            lines.setdefault(name, []).append([r["count"], r["kl_final"][0]])
    data = {
        "title": f"The first layers cost most ({told(place)})",
        "x": f"sparse layers of {found.layers}",
        "y": "KL to dense, nats",
        "scales": ["linear", "log"],
        "named": "apart",
        "lines": [
            [name, sorted(points), "points" if name == "random" else "solid", i]
            for i, (name, points) in enumerate(lines.items())
        ],
    }
    return Picture(PICTURES[0], data, drawing.lines)


def _answered(found: Results) -> Picture:
    """Of the place where any choice loses most answers."""
    tasks = ("needle", "copy")
    worst = max(found.plain, key=lambda r: sum(r[f"{task}_dense"] - r[task][0] for task in tasks))
    place = (worst["prompt"], tuple(worst["geometry"]))
    lines: dict[str, list[list[float]]] = {}
    for r in found.where(prompt=place[0], geometry=list(place[1])):
        for task in tasks if r["policy"] in ("deepest", "first") else ():
            line = lines.setdefault(f"{task}, {r['policy']}", [[0, r[f"{task}_dense"]]])
            line.append([r["count"], r[task][0]])
    data = {
        "title": f"The deepest layers are not needed to find and copy ({told(place)})",
        "x": f"sparse layers of {found.layers}",
        "y": "right answers",
        "scales": ["linear", "share"],
        "named": "ends",
        "lines": [
            [name, points, "dashed" if name.endswith("first") else "solid", tasks.index(name.partition(",")[0])]
            for name, points in lines.items()
        ],
    }
    return Picture(PICTURES[1], data, drawing.lines)
