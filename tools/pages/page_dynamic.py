"""The tables of docs/dynamic.md: what blocks chosen at run time cost in quality, and what they save."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tmx_compile.analysis.judge.intervals import interval
from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, spans, table
from tools.pages.results import load, origin

PAGE = "dynamic.md"
LAYER, RECALL, MODEL = "stacked.json", "stacked_quality_cuda.json", "stacked_quality.json"
FRONTIER, WHOLE = "stacked_frontier.json", "stacked_model.json"
KERNELS, TIMED, COVERAGE = "stacked_kernels.json", "stacked_recall.json", "stacked_coverage.json"
SELECTION, MIXES = "stacked_selection.json", "stacked_mixes.json"
SKIP, SKIP_MODEL = "softmax_skip.json", "softmax_skip_model.json"
_WHICH = {"all others": "0-2", "without layer 1": "0, 2", "alone": "all", "without layer 1, alone": "all but 1"}
_POLICIES = {"all others": "all others", "chosen": "by gradient", "calibrated": "calibrated"}


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its blocks from files in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or a result file lacks a field.
    """
    if not (results / LAYER).is_file():
        return None
    layer, recall, model, frontier, whole, skip, skip_model, kernels, timed, coverage, selection = (
        load(results / name)
        for name in (
            *(LAYER, RECALL, MODEL, FRONTIER, WHOLE, SKIP, SKIP_MODEL),
            *(KERNELS, TIMED, COVERAGE, SELECTION),
        )
    )
    more = {}
    if (results / MIXES).is_file():
        mixes = load(results / MIXES)
        more["mixes"] = f"{_mixes(mixes)}\n\n<sub>{origin(mixes, MIXES)}</sub>"
    return filled(
        docs / PAGE,
        {
            **more,
            "recall": f"{_recall(recall)}\n\n<sub>{origin(recall, RECALL)}</sub>",
            "model": f"{_model(model)}\n\n{_layers(model)}<sub>{origin(model, MODEL)}</sub>",
            "frontier": f"{_frontier(frontier)}\n\n<sub>{origin(frontier, FRONTIER)}</sub>",
            "coverage": f"{_coverage(coverage)}\n\n<sub>{origin(coverage, COVERAGE)}</sub>",
            "selection": f"{_selection(selection)}\n\n<sub>{origin(selection, SELECTION)}</sub>",
            "timed": f"{_timed(timed)}\n\n<sub>{origin(timed, TIMED)}</sub>",
            "kernels": f"{_kernels(kernels)}\n\n<sub>{origin(kernels, KERNELS)}</sub>",
            "layer": f"{_layer(layer)}\n\n<sub>{origin(layer, LAYER)}</sub>",
            "whole": f"{_whole(whole)}\n\n<sub>{origin(whole, WHOLE)}</sub>",
            "skip": f"{_skip(skip)}\n\n<sub>{origin(skip, SKIP)}</sub>",
            "skip_model": f"{_skip_model(skip_model)}\n\n<sub>{origin(skip_model, SKIP_MODEL)}</sub>",
        },
    )


def _recall(result: Fields) -> str:
    """The recall model by which layers are dynamic, method and share, at the greatest length."""
    records = [r for r in result["records"] if r["model"] == "recall"]
    longest = max(r["n"] for r in records)
    rows = []
    for r in records:
        if r["n"] == longest and r["policy"] in _WHICH and (r["policy"] != "alone" or r["stride"] == 1):
            way = f"{_WHICH[r['policy']]}: {r['method']}, {r['stride']}, {r['block']}"
            right = r["accuracy"]
            cells = [f"{share:.1%}" for share in (r["density_outside"], *(right[task] for task in right))]
            rows.append([way, f"{r['share']:g}", *cells])
    tasks = records[0]["accuracy"]
    names = [name.replace("_", " ").replace("hops", "names away") for name in tasks]
    return table(["layers: method, groups, blocks", "share", "density", *names], rows)


def _model(result: Fields) -> str:
    """SmolLM2 with dynamic layers beside its triangle layers: perplexity over that of the triangle layers alone."""
    rows = []
    for r in sorted(result["records"], key=lambda r: r["n"]):
        if r["policy"] in _POLICIES and r["model"] != "recall":
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
    for r in sorted(result["records"], key=lambda r: (r["n"], -r["block"])):
        cells = [f"{r['n']:,}", f"{r['block']}", f"{r['density']:.1%}", ms(r["ms"]), ms(r["dense_ms"])]
        rows.append([*cells, f"{r['of_dense']:.2f}", f"{r['rate']:.2f}"])
    return table(["tokens", "block", "density", "ms", "dense ms", "of dense", "a block"], rows)


def _frontier(result: Fields) -> str:
    """Choices over all texts of a length that were measured with them, from the fewest blocks."""
    found: dict[tuple[int, str], list[Fields]] = {}
    alone: dict[tuple[int, int, str], float] = {}
    for r in result["records"]:
        which = r["part"].partition("-")[0]
        if which == "search":
            continue
        if not r["dynamic_layers"]:
            alone[r["n"], r["text"], which] = r["nll"]
        else:
            found.setdefault((r["n"], r["choice"]), []).append(r)
    rows = []
    for (n, choice), records in found.items():
        changes = [r["nll"] - alone[n, r["text"], r["part"].partition("-")[0]] for r in records]
        density, kl = (statistics.fmean(r[name] for r in records) for name in ("density_outside", "kl"))
        told = f"{math.expm1(changes[0]):+.1%}"
        if len(changes) > 1:
            mean, lower, upper = interval(changes, exponent=True).as_list()
            told = f"{mean:+.1%} ({lower:+.1%} to {upper:+.1%})"
        rows.append((n, density, [f"{n:,}", f"{len(records)}", choice, f"{density:.1%}", told, f"{kl:.4f}"]))
    head = [
        "tokens",
        "texts",
        "dynamic layers",
        "density",
        "perplexity over triangle alone, 95%",
        "divergence from dense",
    ]
    return table(head, [row for _, _, row in sorted(rows, key=lambda row: row[:2])])


def _kernels(result: Fields) -> str:
    """The kernels over the same lists by length and density; one that does not agree has no time."""
    rows = []
    for r in sorted(result["records"], key=lambda r: (r["n"], r["density"])):
        cells = [f"{r['n']:,}", f"{r['density']:.1%}", r["kernel"]]
        if r["ms"] is None:
            rows.append([*cells, "-", "-", "-", "-", "-"])
            continue
        whole = f"{r['whole_of_dense']:.2f}" if "whole_of_dense" in r else "-"
        rows.append([*cells, ms(r["ms"]), f"{r['of_dense']:.2f}", whole, f"{r['rate']:.2f}", f"{r['rate_tflops']:.0f}"])
    return table(["tokens", "density", "kernel", "ms", "of dense", "with choosing", "a block", "TFLOP/s"], rows)


def _coverage(result: Fields) -> str:
    """The estimates by what they lose at equal numbers of blocks, the best first."""
    rows = []
    for r in sorted(result["records"], key=lambda r: (r["model"], r["wanted"], r["error"])):
        model = r["model"].replace("smollm2", "SmolLM2")
        rows.append(
            [model, f"{r['density']:.0%}", r["estimate"], f"{r['cost']:.1%}", f"{r['lost']:.1%}", f"{r['error']:.3f}"]
        )
    return table(["model", "blocks", "estimate", "products", "attention lost", "error"], rows)


def _timed(result: Fields) -> str:
    """The recall model by its layers: answers, density of the dynamic layers, time to the first token."""
    rows = []
    for r in result["records"]:
        if r["share"] == 0.9 and r["ms"] is not None:
            # Between the others, and the page is long.
            continue
        each = r.get("density_by_layer") or []
        told = ", ".join(f"{x:.0%}" for x in each) or ("-" if r["density"] is None else f"{r['density']:.0%}")
        right = [f"{share:.1%}" for share in r["accuracy"].values()]
        times = ["-", "-"] if r["ms"] is None else [ms(r["ms"]), f"{r['of_dense']:.2f}"]
        rows.append([f"{r['n']:,}", r["variant"], told, *right, *times])
    names = [name.replace("hops", "names away") for name in result["records"][0]["accuracy"]]
    return table(["tokens", "dynamic layers", "density by layer", *names, "ms", "of dense"], rows)


def _mixes(result: Fields) -> str:
    """The recall model's mixes: dense, the triangle layers alone, the chosen one, and those that no other beats."""
    records = result["records"]
    rows: list[list[str]] = []
    seen: list[tuple[object, ...]] = []
    for r in sorted(records, key=lambda r: (-(r["ms"] or 0), len(r["triangle_layers"]), -r["density"])):
        beaten = r["ms"] is not None and any(x["ms"] <= r["ms"] and _least(x) > _least(r) for x in records)
        known = r["variant"] in ("dense", "triangle 3-4-5")
        # Several ways of choosing blocks propose the same triangle layers.
        layers = r["triangle_layers"], r["dynamic_layers"], r["share"], r["way"]
        if layers in seen or not (known or r["chosen"] or (not beaten and _least(r) >= 0.9)):
            continue
        seen.append(layers)
        shares = [f"{layer} at {share:g}" for layer, share in zip(r["dynamic_layers"], r["share"], strict=True)]
        way = "-" if r["way"] is None else "{} {}, {}".format(*r["way"])
        triangle = ", ".join(map(str, r["triangle_layers"])) or "-"
        each = ", ".join(f"{x:.0%}" for x in r["density_by_layer"]) or "-"
        right = [f"{min(r['choosing_accuracy'].values()):.1%}", *(f"{x:.1%}" for x in r["accuracy"].values())]
        name = "**chosen**" if r["chosen"] else r["variant"] if known else ""
        times = ["-", "-"] if r["ms"] is None else [ms(r["ms"]), f"{r['of_dense']:.2f}"]
        rows.append([name, triangle, ", ".join(shares) or "-", way, each, *right, *times])
    names = [name.replace("hops", "names away") for name in records[0]["accuracy"]]
    head = ["", "triangle", "dynamic", "method, block", "their density", "worst of those that choose", *names]
    return table([*head, "ms", "of dense"], rows)


def _least(record: Fields) -> float:
    return float(min(record["accuracy"].values()))


def _selection(result: Fields) -> str:
    """What choosing costs by method, over dense attention."""
    rows = []
    for r in result["records"]:
        if r["tile"] is None:
            cells = [f"{r['n']:,}", f"{r['block']}", f"{r['method']} {r['group']}", ms(r["ms"]), f"{r['of_dense']:.1%}"]
            rows.append([*cells, ms(r["call_ms"]), f"{r['call_of_dense']:.1%}"])
    return table(["tokens", "block", "method, group", "GPU ms", "of dense", "call ms", "of dense"], rows)


def _whole(result: Fields) -> str:
    """Whole models by form, length and variant; what was saved beside what ``advise`` would have told."""
    rows = []
    for r in sorted(result["records"], key=lambda r: (r["form"], r["n"])):
        saved, told = r["saved_ms"], r.get("told_ms")
        density = "-" if r["density"] is None else f"{r['density']:.1%}"
        name = r["variant"].replace("dense-causal", "dense").partition("-")[0]
        rows.append(
            [
                f"{r['n']:,}",
                r["form"],
                name,
                density,
                ms(r["ms"]),
                "-" if r["of_dense"] is None else f"{r['of_dense']:.2f}",
            ]
            + ["-" if x is None or name == "dense" else ms(x) for x in (saved, told)]
        )
    return table(["tokens", "form", "layers", "density", "ms", "of dense", "saved ms", "told ms"], rows)


def _skip(result: Fields) -> str:
    """What the kernel skips and takes, over the same kernel that skips nothing."""
    timed = [r for r in result["records"] if "ms" in r]
    plain = {(r["n"], r["data"]): r["ms"] for r in timed if r["threshold"] is None}
    rows = []
    most = max(r["threshold"] or 0.0 for r in timed)
    for r in timed:
        if not r["skipped"] and r["threshold"] not in (None, most):
            # As the greatest threshold, which skips nothing either.
            continue
        before = plain[r["n"], r["data"]]
        told = _threshold(r["threshold"], r["near_first"])
        cells = [f"{r['n']:,}", r["data"], told, f"{r['skipped']:.1%}", ms(r["ms"]), f"{r['ms'] / before:.2f}"]
        rows.append([*cells, f"{r['ms'] / r['dense_ms']:.2f}", f"{r['error']:.1e}"])
    head = ["tokens", "tensors", "threshold", "skipped", "ms", "of itself", "of the best dense", "error"]
    return table(head, rows)


def _threshold(nats: float | None, near_first: bool) -> str:
    return "none" if nats is None else f"{nats:g}, {'near' if near_first else 'far'} first"


def _skip_model(result: Fields) -> str:
    """What real weights skip."""
    rows = []
    found: dict[tuple[Any, ...], list[Fields]] = {}
    for r in result["records"]:
        found.setdefault((r["data"], r["n"], r["threshold"], r["near_first"]), []).append(r)
    for (data, n, threshold, near_first), records in found.items():
        told = _threshold(threshold, near_first)
        skipped = statistics.fmean(r["skipped"] for r in records)
        cost = (
            f"{records[0]['accuracy']['2 hops']:.1%}"
            if "accuracy" in records[0]
            else (f"{statistics.fmean(r['kl'] for r in records):.4f}")
        )
        rows.append([data, f"{n:,}", told, f"{skipped:.1%}", cost])
    return table(["model", "tokens", "threshold", "skipped", "divergence, or right two names away"], rows)
