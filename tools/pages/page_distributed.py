"""The tables and pictures of docs/distributed.md: a prompt split over two cards, and by a model over more."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from studies import context_scale
from tools.pages import drawing
from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table
from tools.pages.pictures import Picture
from tools.pages.results import load, origin

PAGE, FILE = "distributed.md", "context_parallel.json"
TIME, SHARE = "distributed-time.svg", "distributed-share.svg"
LAYERS = 32
"""Of the model that is told: those of the Llama-3.1-8B."""

_ByCards: TypeAlias = "dict[int, dict[int, dict[str, float]]]"


def generate(results: Path, docs: Path) -> tuple[str, list[Picture]] | None:
    """The page of ``docs`` with its blocks from a file in ``results``, and its pictures; None where there is none.

    Raises:
        ValueError: the page is missing or lacks the marks, or the result file lacks a field.
    """
    if not (results / FILE).is_file():
        return None
    result = load(results / FILE)
    found = context_scale.by_cards(result, LAYERS)
    blocks = {
        "measured": f"{_measured(result)}\n\n<sub>{origin(result, FILE)}</sub>",
        "waits": _waits(result),
        "check": _check(result),
        "scale": _scale(found),
    }
    return filled(docs / PAGE, blocks), [_time(found), _share(found)]


def _measured(result: Fields) -> str:
    """Milliseconds by length and by what is split, triangle and dense."""
    settings, records = result["settings"], result["records"]
    found = {(r["variant"], r["n"]): r for r in records if "n" in r}
    one = {n: r["ms"] for (variant, n), r in found.items() if variant == "one"}

    def cell(variant: str, n: int) -> str:
        item = found.get((variant, n))
        if item is None:
            return ""
        more = variant in ("context", "tensor")
        return ms(item["ms"]) + (f" ({one[n] / item['ms']:.2f}x)" if more else "")

    variants = ("one", "context", "tensor", "one, dense", "context, dense", "tensor, dense")
    rows = [[f"{n:,}", *(cell(variant, n) for variant in variants)] for n in sorted(one)]
    return (
        f"{settings['heads']}/{settings['kv_heads']} heads, hidden size {settings['hidden']:,}, {settings['weights']} "
        f"weights in {settings['dtype']}, {settings['layers']} layers, half of them triangle layers "
        f"({slashed(settings['geometry'])}), {settings['ranks']} cards; milliseconds to the first token, of "
        "the slower card:\n\n"
        + table(
            ["tokens", "one card", "prompt split", "heads split", "dense: one card", "prompt split", "heads split"],
            rows,
        )
    )


def _waits(result: Fields) -> str:
    """What a triangle layer sends, and what collectives take of the time."""
    split = [r for r in result["records"] if r["variant"] == "context"]
    share = min(r["bytes_per_triangle_layer"] / r["bytes_of_gathering"] for r in split if "nccl_ms" in r)
    longest = max(r["n"] for r in split if "nccl_ms" in r)
    told = " and ".join(f"{r['exposed_ms'] / r['ms']:.1%} at {r['n']:,} tokens" for r in split if "nccl_ms" in r)
    return (
        f"A triangle layer sends {split[0]['bytes_per_triangle_layer'] / 1e6:.2f} MB at every length, of both cards "
        f"together: {share:.2%} of what gathering keys and values sends at {longest:,} tokens. On the first card "
        f"collectives run, or wait for the other card, while nothing else does for this share of the time: {told}. "
        "This was measured before they overlapped. Nearly all of their bytes are those of the dense layers."
    )


def _check(result: Fields) -> str:
    """The model beside what was measured."""
    rows = []
    for r in result["records"]:
        if r["variant"] == "context":
            predicted = context_scale.of_record(result, r)["ms"]
            rows.append([f"{r['n']:,}", ms(r["ms"]), ms(predicted), f"{predicted / r['ms'] - 1:+.1%}"])
    return table([f"tokens, {result['settings']['ranks']} cards", "measured, ms", "by the model", "off by"], rows)


def _scale(found: _ByCards) -> str:
    head = [f"{ranks} cards" if ranks > 1 else "1 card" for ranks in context_scale.RANKS]
    rows = []
    for tokens, by_ranks in found.items():
        cells = [
            _seconds(each["ms"] / 1e3) + (f" ({each['share']:.1%})" if ranks > 1 else "")
            for ranks, each in by_ranks.items()
        ]
        rows.append([f"{tokens:,}", *cells])
    return f"{LAYERS} layers, half of them triangle layers; seconds, and the share of collectives:\n\n" + table(
        ["tokens", *head], rows
    )


def _seconds(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _time(found: _ByCards) -> Picture:
    """Seconds by cards, a line a length."""
    data = {
        "title": "More cards, by a model: time falls until 32 cards have the 32 heads",
        "y": "seconds to the first token",
        "scales": ["log", "log"],
        **_lines(found, lambda each: each["ms"] / 1e3),
    }
    return Picture(TIME, data, drawing.lines)


def _share(found: _ByCards) -> Picture:
    """The share of collectives by cards, a line a length."""
    data = {
        "title": "Collectives cost most in short prompts, and beyond one host of 8 cards",
        "y": "collectives, % of the time",
        "scales": ["log", "linear"],
        **_lines(found, lambda each: 100 * each["share"]),
    }
    return Picture(SHARE, data, drawing.lines)


def _lines(found: _ByCards, value: Any) -> dict[str, Any]:
    return {
        "x": "cards",
        "named": "ends",
        "lines": [
            [
                f"{tokens:,} tokens",
                # Rounded: the last digits of a fit differ from one processor to the next.
                [[ranks, float(f"{value(each):.3g}")] for ranks, each in by_ranks.items() if ranks > 1],
                "solid",
                number,
            ]
            for number, (tokens, by_ranks) in enumerate(found.items())
        ],
    }
