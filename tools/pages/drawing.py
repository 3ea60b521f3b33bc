"""How pictures look: one message each, labels on what they name, on a white ground that dark pages leave alone.

A picture's digest includes this file, so that a changed style is noticed.
"""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart; without the yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#6E6E6E"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "tmx",
    "svg.fonttype": "none",
    "font.size": 10,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": NEUTRAL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "lines.markersize": 5,
}
_LINE_HEIGHT = 13
"""Points between two labels."""


def lines(figure: Any, data: Any) -> None:
    """Lines with their names beside them.

    ``data``: ``title``, ``x`` and ``y`` (what the axes are), ``scales`` of both ("linear", "log" or "share"), ``named``
    ("ends": behind the last points; "apart": where a line is furthest from the others), and ``lines``: (name, points,
    kind, number of the colour). Kinds are "solid", "dashed", "points", and "rule", which others are compared with; the
    last two are neutral.
    """
    figure.set_size_inches(7.2, 4)
    right = 0.77 if data["named"] == "ends" else 0.96
    figure.subplots_adjust(left=0.11, right=right, top=0.88, bottom=0.14)
    axes = figure.add_subplot()
    axes.set_title(data["title"])
    axes.set_xlabel(data["x"])
    axes.set_ylabel(data["y"])
    _scale(axes, data)
    for _, points, kind, number in data["lines"]:
        marks = {"solid": "-o", "dashed": "--o", "points": "x", "rule": "-"}[kind]
        width = 1 if kind == "rule" else STYLE["lines.linewidth"]
        axes.plot(*zip(*sorted(points), strict=True), marks, color=_colour(kind, number), linewidth=width)
    axes.margins(x=0.03)
    axes.autoscale_view()
    (_name_ends if data["named"] == "ends" else _name_apart)(axes, data["lines"])


def _colour(kind: str, number: int) -> str:
    return NEUTRAL if kind in ("points", "rule") else COLOURS[number]


def _scale(axes: Any, data: Any) -> None:
    across, up = data["scales"]
    ticks = sorted({x for _, points, *_ in data["lines"] for x, _ in points})
    if across == "log":
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:,.0f}" for x in ticks])
        axes.minorticks_off()
    else:
        axes.set_xticks(ticks)
    if up == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if up == "share":
        axes.set_ylim(-0.03, 1.08)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")


def _in_points(axes: Any, at: Any) -> Any:
    """Where something is on the figure, in 1/72 inch."""
    return axes.transData.transform(at) * 72 / axes.figure.dpi


def _name_ends(axes: Any, lines: Any) -> None:
    """Write names behind the ends of lines, upwards where these lie close."""
    placed: list[tuple[float, float]] = []
    ends = sorted(((max(points), name, _colour(*style)) for name, points, *style in lines), key=lambda e: e[0][1])
    for end, name, colour in ends:
        x, y = _in_points(axes, end)
        # Names are short: what ends further to the left does not meet this one.
        height = max([y, *(taken + _LINE_HEIGHT for beside, taken in placed if abs(beside - x) < 90)])
        placed.append((x, height))
        axes.annotate(name, end, (8, height - y), textcoords="offset points", color=colour, va="center")


def _name_apart(axes: Any, lines: Any) -> None:
    """Write each name beside the point that is furthest above or below all other lines."""
    import numpy

    drawn = {name: numpy.array([_in_points(axes, at) for at in sorted(points)]) for name, points, *_ in lines}
    for name, _, *style in lines:
        own = drawn[name]
        gaps = []
        for x, y in own:
            others = [path for other, path in drawn.items() if other != name and path[0][0] <= x <= path[-1][0]]
            beside = [float(y - numpy.interp(x, path[:, 0], path[:, 1])) for path in others]
            gaps.append(min(beside, key=abs, default=0.0))
        at = max(range(len(own)), key=lambda i: abs(gaps[i]))
        x, y = own[at]
        rises = bool(own[min(at + 1, len(own) - 1)][1] > y)
        above = gaps[at] >= 0
        # On the side where the line itself does not go.
        side, align = (-6, "right") if rises == above else (6, "left")
        where = axes.transData.inverted().transform((x * axes.figure.dpi / 72, y * axes.figure.dpi / 72))
        shift = (side, 9 if above else -10)
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        look = {"color": _colour(*style), "va": "center", "ha": align, "bbox": ground}
        axes.annotate(name, where, shift, textcoords="offset points", **look)


def bars(figure: Any, data: Any) -> None:
    """Horizontal bars from zero, in groups, the first of each for comparison; names in the bars, values behind them.

    ``data``: ``title``, ``x``, and ``groups``: (name, bars of (name, value, what is written behind)).
    """
    count = sum(len(bars) + 1 for _, bars in data["groups"])
    height = 0.9 + 0.36 * count
    figure.set_size_inches(7.2, height)
    figure.subplots_adjust(
        left=0.03, right=0.97, top=1 - 0.45 / (0.9 + 0.36 * count), bottom=0.5 / (0.9 + 0.36 * count)
    )
    axes = figure.add_subplot()
    axes.set_title(data["title"])
    axes.set_xlabel(data["x"])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    at = 0
    for name, bars in data["groups"]:
        axes.annotate(name, (0, at), (2, -2), textcoords="offset points", va="center", weight="bold")
        for number, (label, value, behind) in enumerate(bars):
            at += 1
            axes.barh(at, value, height=0.86, color=COLOURS[0] if number else NEUTRAL)
            axes.annotate(label, (0, at), (6, 0), textcoords="offset points", va="center", color="white")
            axes.annotate(behind, (value, at), (6, 0), textcoords="offset points", va="center")
        at += 1
    axes.set_ylim(at - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(value for _, bars in data["groups"] for _, value, _ in bars))
