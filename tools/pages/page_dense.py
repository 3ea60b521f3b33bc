"""The tables of docs/dense.md: what FlashAttention-4 gives the layers that stay dense."""

from __future__ import annotations

from pathlib import Path

from tools.pages.blocks import filled
from tools.pages.markdown import Fields, ms, slashed, table, times
from tools.pages.results import load, origin

PAGE = "dense.md"
LAYER, MODEL = "dense.json", "ttft_fa4.json"
_SHOWN = (4096, 8192, 32768, 131072)


def generate(results: Path, docs: Path) -> str | None:
    """The page of ``docs`` with its blocks from files in ``results``; None where nothing was measured.

    Raises:
        ValueError: the page is missing or lacks the marks, or a result file lacks a field.
    """
    if not (results / LAYER).is_file():
        return None
    layer, model = load(results / LAYER), load(results / MODEL)
    return filled(
        docs / PAGE,
        {
            "layer": f"{_layer(layer)}\n\n<sub>{origin(layer, LAYER)}</sub>",
            "model": f"{_model(model)}\n\n<sub>{origin(model, MODEL)}</sub>",
        },
    )


def _layer(result: Fields) -> str:
    """One layer by length and head dim: the best SDPA backend, and both kernels under each kind of mask."""
    settings, records = result["settings"], result["records"]
    found = {(r["head_dim"], r["n"], r["padding"], r["lowering"]): r for r in records}
    kinds = list(dict.fromkeys(r["padding"] for r in records))
    rows = []
    for head_dim in settings["head_dims"]:
        for n in _SHOWN:
            of = [found[head_dim, n, kind, name] for kind in kinds for name in ("fa4", "triton")]
            cells = [f"{ms(r['ms'])} ({times(r['over_dense'])})" for r in of]
            rows.append([f"{head_dim}", f"{n:,}", ms(of[0]["dense_ms"]), *cells])
    head = [f"{kind}: `{name}`" for kind in kinds for name in ("fa4", "triton")]
    return (
        f"Milliseconds, {settings['heads']}/{settings['kv_heads']} heads, {settings['dtype']}, batch "
        f"{settings['batch']}; in brackets over the best SDPA backend without a mask "
        f"({records[0]['dense_backend']}).\n\n" + table(["head dim", "tokens", "SDPA", *head], rows)
    )


def _model(result: Fields) -> str:
    """Time to first token of whole models with FlashAttention-4 in both, dense and with triangle layers."""
    settings, records = result["settings"], result["records"]
    found = {(r["model"], r["variant"], r["tokens"]): r for r in records}
    geometry = slashed(next(r["geometry"] for r in records if r["geometry"]))
    variant = f"triangle-{geometry.replace('/', '-')}"
    told, rows = [], []
    for model in dict.fromkeys(r["model"] for r in records):
        own = [r for r in records if r["model"] == model]
        told.append(f"{max(r['triangle_layers'] for r in own)} of {own[0]['layers']} layers of {model}'s")
        for n in settings["lengths"]:
            names = ("dense-causal", variant, f"{variant}+mask")
            dense, plain, masked = (found.get((model, name, n)) for name in names)
            if dense is None:
                continue
            cells = [
                "-" if r is None else f"{r['ms'] / 1e3:.3g} ({r['ms'] / dense['ms'] - 1:+.0%})" for r in (plain, masked)
            ]
            rows.append([model, f"{n:,}", f"{dense['ms'] / 1e3:.3g}", *cells])
    head = ["model", "tokens", "dense", "triangle", "triangle, with the mask that `generate` passes"]
    return f"Seconds to the first token, {geometry} in the deepest {' and the deepest '.join(told)} shape.\n\n" + table(
        head, rows
    )
