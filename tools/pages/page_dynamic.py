"""The tables of docs/dynamic.md: what blocks chosen at run time cost in quality, and what they save."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, spans, table
from tools.pages.results import load, origin

PAGE = "dynamic.md"
LAYER, RECALL, MODEL = "stacked.json", "stacked_quality_cuda.json", "stacked_quality.json"
_POLICIES = {"all others": "all others", "chosen": "by gradient", "calibrated": "calibrated"}


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its blocks from files in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or a result file lacks a field.
    """
    if not (results / LAYER).is_file():
        return None
    layer, recall, model = (load(results / name) for name in (LAYER, RECALL, MODEL))
    return filled(
        docs / PAGE,
        {
            "recall": f"{_recall(recall)}\n\n<sub>{origin(recall, RECALL)}</sub>",
            "model": f"{_model(model)}\n\n{_layers(model)}<sub>{origin(model, MODEL)}</sub>",
            "layer": f"{_layer(layer)}\n\n<sub>{origin(layer, LAYER)}</sub>",
        },
    )


def _recall(result: Fields) -> str:
    """The recall model with every layer dynamic that is no triangle layer, by method and share."""
    rows = []
    for r in result["records"]:
        if r["model"] == "recall" and r["policy"] == "all others":
            way = f"{r['method']}, {r['stride']}, {r['block']}"
            right = r["accuracy"]
            cells = [f"{share:.1%}" for share in (r["density_outside"], *(right[task] for task in right))]
            rows.append([way, f"{r['share']:g}", *cells])
    tasks = next(r["accuracy"] for r in result["records"] if r["model"] == "recall")
    names = [name.replace("_", " ").replace("hops", "names away") for name in tasks]
    return table(["method, groups, blocks", "share", "density", *names], rows)


def _model(result: Fields) -> str:
    """SmolLM2 with dynamic layers beside its triangle layers: perplexity over that of the triangle layers alone."""
    rows = []
    for r in sorted(result["records"], key=lambda r: r["n"]):
        if r["policy"] in _POLICIES:
            mean, lower, upper = r["ppl_over_triangle"]
            cells = [f"{r['n']:,}", f"{r['texts']}", f"{len(r['dynamic_layers'])}: {_POLICIES[r['policy']]}"]
            cells += [f"{r['density']:.1%}", f"{r['density_outside']:.1%}"]
            rows.append([*cells, f"{mean:+.1%} ({lower:+.1%} to {upper:+.1%})"])
    head = ["tokens", "texts", "dynamic layers", "their density", "density", "perplexity over triangle alone, 95%"]
    return table(head, rows)


def _layers(result: Fields) -> str:
    """The layers and shares of the calibrated choices."""
    found: dict[str, None] = {}
    for r in result["records"]:
        if r["policy"] == "calibrated":
            layers, shares = r["dynamic_layers"], r["share"]
            by_layer = shares if isinstance(shares, list) else [shares] * len(layers)
            parts = [
                f"{_listed([i for i, x in zip(layers, by_layer, strict=True) if x == share])} at {share:g}"
                for share in sorted(set(by_layer))
            ]
            found[f"{len(layers)} layers: {'; '.join(parts)}."] = None
    return "".join(f"Calibrated, {text}\n\n" for text in found)


def _listed(layers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(spans(run) if len(run) > 1 else str(run[0]) for run in runs)


def _layer(result: Fields) -> str:
    """One layer by length, block and density: milliseconds, and over the best dense attention."""
    rows = []
    for r in result["records"]:
        cells = [f"{r['n']:,}", f"{r['block']}", f"{r['density']:.1%}", ms(r["ms"]), ms(r["dense_ms"])]
        rows.append([*cells, f"{r['of_dense']:.2f}", f"{r['rate']:.2f}"])
    return table(["tokens", "block", "density", "ms", "dense ms", "of dense", "a block"], rows)
