"""What a report says layer by layer, for a terminal and for a page."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from tmx_compile.commands.picture import Shape
from tmx_compile.config import TriangleMixConfig
from tmx_compile.mask import Grid, Window, dense_section, pair_count
from tmx_compile.report import Reason, Report, SiteRecord


@dataclass(frozen=True)
class Row:
    """One attention call, or a layer without one.

    ``kind`` is "triangle", "dense" (by the configuration), "refused" (selected, and dense all the same) or "none".
    Pairs are (row, key) pairs of one head.
    """

    layer: int | None
    path: str
    kind: str
    why: str
    lowering: str
    attended: int
    causal: int
    shape: Shape | None

    @property
    def words(self) -> str:
        """The kind, for a reader."""
        return {"refused": "dense, though selected", "none": "no attention"}.get(self.kind, self.kind)

    @property
    def share(self) -> str:
        """Attended of causal pairs."""
        return f"{self.attended / self.causal:.1%}" if self.causal else ""


@dataclass(frozen=True)
class Outcome:
    """What would become of a model's layers: of ``model``, for a prompt of ``tokens`` tokens."""

    model: str
    kind: str
    tokens: int
    device: str
    config: TriangleMixConfig
    rows: list[Row]
    notes: list[str]

    @property
    def attended(self) -> int:
        """Attended pairs of one head, over all layers."""
        return sum(row.attended for row in self.rows)

    @property
    def causal(self) -> int:
        """The pairs that dense attention computes, over all layers."""
        return sum(row.causal for row in self.rows)

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    def shapes(self) -> dict[Shape, list[Row]]:
        """The distinct masks, in the order of the layers, with the rows that have each."""
        found: dict[Shape, list[Row]] = {}
        for row in self.rows:
            if row.shape is not None:
                found.setdefault(row.shape, []).append(row)
        return found

    def summary(self) -> list[tuple[str, str]]:
        """Names and values of what matters most."""
        sink, window, last = self.config.geometry.counts
        pairs = "none: no attention was read"
        if self.causal:
            pairs = f"{self.attended:,} of {self.causal:,} ({self.attended / self.causal:.1%}), one head, all layers"
        unread = [row for row in self.rows if row.causal == 0]
        if self.causal and unread:
            pairs += f" but {_listed(unread)}"
        lowerings = sorted({row.lowering for row in self.of_kind("triangle")})
        lines = [
            ("model", f"{self.model} ({self.kind})"),
            ("prompt", f"{self.tokens:,} tokens on {self.device}"),
            ("mask", f"{sink} sinks, window {window}, {last} last rows"),
            ("sparse", f"{_listed(self.of_kind('triangle'))} of {len(self.rows)} layers"),
            ("attended pairs", pairs),
        ]
        refused = self.of_kind("refused")
        if refused:
            lines.insert(4, ("dense although selected", _listed(refused)))
        if lowerings:
            lines.append(("lowering", ", ".join(lowerings)))
        return lines


def rows(report: Report, config: TriangleMixConfig, depth: int) -> list[Row]:
    """The report's calls by layer, and layers of which it has none; calls without a layer's number come last."""
    found = [_row(site, config) for site in report]
    seen = {row.layer for row in found}
    nothing = "no attention was found in this layer"
    found += [Row(i, "", "none", nothing, "", 0, 0, None) for i in range(depth) if i not in seen]
    return sorted(found, key=lambda row: depth if row.layer is None else row.layer)


def _row(site: SiteRecord, config: TriangleMixConfig) -> Row:
    why = Reason[site.reason].value if site.reason else ""
    why = f"{why}: {site.detail}" if site.detail else why
    sparse = site.decision != "dense"
    # By the configuration and not by the reason: a layer that is not selected may have another one too.
    selected = site.layer is None or config.is_triangle_layer(site.layer)
    kind = "triangle" if sparse else "refused" if selected else "dense"
    shape = None
    if site.causal_pairs and site.query[2] == site.key[2]:
        geometry = config.geometry if sparse else config.geometry.as_dense()
        shape = Shape(site.query[2], replace(geometry, reach=_reach(site)))
    return Row(site.layer, site.path, kind, why, site.lowering, site.attended_pairs, site.causal_pairs, shape)


def _reach(site: SiteRecord) -> int | None:
    """How far back the layer looks by itself: its causal pairs grow with that, so they tell it."""
    n = site.query[2]
    grid = Grid(n, n)
    if site.causal_pairs == pair_count(dense_section(), grid):
        return None
    return bisect_left(range(n), site.causal_pairs, key=lambda w: pair_count(dense_section() & Window(w), grid))


def _listed(found: list[Row]) -> str:
    """How many, and which layers, neighbours joined: ``3 (0, 4-5)``."""
    numbers = sorted({row.layer for row in found if row.layer is not None})
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    which = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
    return f"{len(found)} ({which})" if which else str(len(found))
