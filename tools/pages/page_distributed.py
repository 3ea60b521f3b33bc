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

PAGE, FILE, OVERLAP = "distributed.md", "context_parallel.json", "context_parallel_overlap.json"
TIME, SHARE = "distributed-time.svg", "distributed-share.svg"
LAYERS = 32
"""Of the model that is told: those of the Llama-3.1-8B."""

_WAYS = {"context": "in four groups", "context, in turn": "at once"}
"""Of variants in the run that compares them, how a dense layer's heads travel."""

_ByCards: TypeAlias = "dict[int, dict[int, dict[str, float]]]"


def generate(results: Path, docs: Path) -> tuple[str, list[Picture]] | None:
    """The page of ``docs`` with its blocks from a file in ``results``, and its pictures; None where there is none.

    Raises:
        ValueError: the page is missing or lacks the marks, or the result file lacks a field.
    """
    if not all((results / name).is_file() for name in (FILE, OVERLAP)):
        return None
    result, overlap = load(results / FILE), load(results / OVERLAP)
    found = context_scale.by_cards(result, LAYERS)
    blocks = {
        "measured": f"{_measured(result)}\n\n<sub>{origin(result, FILE)}</sub>",
        "waits": _waits(result, overlap),
        "steps": _steps(overlap),
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


def _waits(result: Fields, overlap: Fields) -> str:
    """What a triangle layer sends, and what collectives take of the time, one after the other and overlapped."""
    split = [r for r in result["records"] if r["variant"] == "context" and "nccl_ms" in r]
    longest = max(split, key=lambda r: int(r["n"]))
    share = longest["bytes_per_triangle_layer"] / longest["bytes_of_gathering"]
    rows = []
    for r in (r for r in overlap["records"] if r["variant"] in _WAYS):
        alone = " / ".join(f"{x / r['ms']:.1%}" for x in r.get("exposed_ms", ()))
        memory = " / ".join(f"{x:.2f}" for x in r["memory_gib"])
        rows.append([f"{r['n']:,}", _WAYS[r["variant"]], f"{ms(r['ms'])} ({r['speedup']:.2f}x)", alone, memory])
    return (
        f"A triangle layer sends {longest['bytes_per_triangle_layer'] / 1e6:.2f} MB at every length, of both cards "
        f"together: {share:.2%} of what gathering keys and values sends at {longest['n']:,} tokens.\n\n"
        "In a later run, of half the layers, a dense layer's queries, keys and values travel in one message, as they "
        "do now, or heads travel in four groups, one of which is attended to while the next comes in. NCCL's stream "
        'has a high priority. "Alone" is the share of the time in which a collective runs, or waits for the other '
        "card, and nothing else does, by the profiler, on each card (in the run above, with three messages for one, on "
        f"the first card: {longest['exposed_ms'] / longest['ms']:.1%} at {longest['n']:,} tokens):\n\n"
        + table(["tokens", "heads travel", "ms", "alone", "peak GiB, by card"], rows)
    )


def _steps(overlap: Fields) -> str:
    """A step over the cache of a long prompt, twice: every layer is dense in it, whatever the configuration."""
    steps = [r for r in overlap["records"] if r["variant"].startswith("step, context")]
    memory = " / ".join(f"{x:.2f}" for x in steps[0]["memory_gib"])
    told = " and ".join(ms(r["ms"]) for r in steps)
    return (
        f"{told} milliseconds behind {steps[0]['n']:,} tokens on {steps[0]['ranks']} cards, for a configuration with "
        f"triangle layers and for one without. Both run the same graph, so that is how far measurements are apart. "
        f"Peak GiB by card: {memory}.\n\n<sub>{origin(overlap, OVERLAP)}</sub>"
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
