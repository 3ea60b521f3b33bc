"""The frontier of quality against blocks left, SmolLM2 with dynamic layers beside its triangle layers, text by text.

A part is one text at one length, with all choices of dynamic layers: a run may stop after any text, and go on later.
``search`` parts compare ways of choosing blocks, on the text that calibrations read; ``frontier`` parts measure choices
that were made there, on the text that quality is measured on, ``peaks`` parts lists from exact scores on the same, and
``sampled`` parts lists from sampled rows. All scored positions are last rows, as in ``stacked``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Case, Parts, Records, device, note
from benchmarks.models import smollm2
from benchmarks.texts import EVALUATION, token_stream
from studies.stacked_board import GEOMETRY, Board, Layers
from studies.texts import CALIBRATION
from tmx_compile.analysis.choose.direct import divergence
from tmx_compile.mask.selection import Selection

SCORED = 128
"""Last positions of a prompt that are compared: all last rows of the geometry."""
DEPTH, TRIANGLE = 30, tuple(range(15, 30))
EIGHT = (1, 3, 9, 10, 11, 12, 13, 14)
"""The layers that ``stacked`` calibrated."""


def _choice(
    layers: Sequence[int],
    share: float | Mapping[int, float],
    method: str = "pooled",
    stride: int = 16,
    block: int = 64,
) -> Layers:
    """Dynamic layers beside the triangle layers; ``share`` for all, or by layer."""
    shares = tuple(share[layer] for layer in layers) if isinstance(share, Mapping) else ()
    least = min(shares) if shares else float(share)  # type: ignore[arg-type]
    return Layers(TRIANGLE, tuple(layers), Selection(method, least, block, stride, GEOMETRY[0], GEOMETRY[2]), shares)


SEARCH: dict[str, Layers] = {
    "pooled by 16, 0.8": _choice(EIGHT, 0.8),
    "pooled by 8, 0.8": _choice(EIGHT, 0.8, "pooled", 8),
    "pooled by 4, 0.8": _choice(EIGHT, 0.8, "pooled", 4),
    "antidiagonal by 16, 0.8": _choice(EIGHT, 0.8, "antidiagonal", 16),
    "antidiagonal by 8, 0.8": _choice(EIGHT, 0.8, "antidiagonal", 8),
    "pooled by 16, 0.9": _choice(EIGHT, 0.9),
    "1 for 0": _choice((0, *EIGHT[1:]), 0.8),
    "3 for 6": _choice((1, 6, *EIGHT[2:]), 0.8),
    "3 for 4": _choice((1, 4, *EIGHT[2:]), 0.8),
    "without 3 and 10": _choice((1, 9, 11, 12, 13, 14), 0.8),
    "without 3, 9 and 10": _choice((1, 11, 12, 13, 14), 0.8),
    "without 1": _choice(EIGHT[1:], 0.8),
}
# From what the search and the calibration of ``stacked`` say: cheap layers first, less to fewer blocks.
CHEAP = dict.fromkeys((1, 11, 12, 13, 14), 0.8)
NEXT = dict.fromkeys((6, 9, 10), 0.9)
FRONTIER: dict[str, Layers] = {
    "calibrated": _choice(EIGHT, {**dict.fromkeys(EIGHT, 0.8), 3: 0.9, 10: 0.9}),
    "5": _choice((1, 11, 12, 13, 14), CHEAP),
    "6": _choice((1, 9, 11, 12, 13, 14), CHEAP | {9: 0.8}),
    "8": _choice((1, 6, *range(9, 15)), CHEAP | NEXT),
}
# Lists from exact scores: what a better estimate could reach.
PEAKS: dict[str, Layers] = {
    f"{name}, exact peaks {share}": replace(_choice(layers, share), peaks=True)
    for name, layers, share in (
        ("5", tuple(CHEAP), 0.8),
        ("8", (1, 6, *range(9, 15)), 0.8),
        ("8", (1, 6, *range(9, 15)), 0.6),
        ("all others", tuple(range(15)), 0.8),
    )
}
TEN = _choice((1, 3, 4, 6, *range(9, 15)), CHEAP | NEXT | {3: 0.9, 4: 0.9})
LONG: dict[str, Layers] = {
    "8": FRONTIER["8"],
    "10": TEN,
    "10, exact peaks": replace(TEN, peaks=True),
}
# One row of each 16 or 32, against every key that it sees, in all layers that are no triangle layers.
SAMPLED: dict[str, Layers] = {
    **{f"all others, sampled {share}": _choice(tuple(range(15)), share, "sampled") for share in (0.95, 0.9)},
    "all others, sampled by 32 0.95": _choice(tuple(range(15)), 0.95, "sampled", 32),
    "all others, sampled by 32 0.95, blocks of 128": _choice(tuple(range(15)), 0.95, "sampled", 32, 128),
}
SAMPLED_MORE = SAMPLED | {"all others, sampled 0.98": _choice(tuple(range(15)), 0.98, "sampled")}
# (text, tokens, texts, choices)
FULL: list[tuple[str, int, int, Mapping[str, Layers]]] = [
    ("search", 4096, 1, SEARCH),
    ("frontier", 2048, 6, FRONTIER),
    ("frontier", 4096, 8, FRONTIER),
    ("frontier", 7680, 4, LONG),
    ("peaks", 4096, 8, PEAKS),
    ("sampled", 2048, 6, SAMPLED_MORE),
    ("sampled", 4096, 8, SAMPLED_MORE),
    ("sampled", 7680, 4, SAMPLED),
]
QUICK: list[tuple[str, int, int, Mapping[str, Layers]]] = [
    ("search", 256, 2, {"pooled by 16, 0.8": _choice((1, 2), 0.8)})
]


def _plan(quick: bool) -> list[tuple[str, int, int, Mapping[str, Layers]]]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    return [f"{which}-{tokens}-{text}" for which, tokens, texts, _ in _plan(quick) for text in range(texts)]


def settings(quick: bool) -> dict[str, Any]:
    return {
        "plan": [[which, tokens, texts, list(choices)] for which, tokens, texts, choices in _plan(quick)],
        "model": "SmolLM2-135M-Instruct, 4-bit weights, float32",
        "geometry": list(GEOMETRY),
        "scored": SCORED,
        "search": "on the text that calibrations read",
        "nll": "mean loss of the scored positions, nats",
        "kl": "mean divergence of the dense distribution from this one, nats",
        "density": "blocks that the dynamic layers visit over those of dense causal attention",
        "density_outside": "the same of all layers that are no triangle layers, dense ones counting 1",
    }


@functools.lru_cache(maxsize=1)
def _model() -> tuple[Board, Tensor, Tensor]:
    model, tokenizer = smollm2(DEPTH)
    board = Board(model.to(device()), "study-stacked-frontier")
    return board, token_stream(tokenizer, CALIBRATION), token_stream(tokenizer, EVALUATION)


def measure(part: str, quick: bool) -> Records:
    which, tokens, text = part.split("-")
    choices, texts = next((x[3], x[2]) for x in _plan(quick) if x[:2] == (which, int(tokens)))
    board, other, evaluation = _model()
    ids = _piece(other if which == "search" else evaluation, int(tokens), texts, int(text))
    dense, dense_nll, _ = _run(board, ids, Layers())
    records: Records = []
    for name, layers in {"triangle alone": Layers(TRIANGLE), **choices}.items():
        found, nll, density = _run(board, ids, layers)
        way = layers.selection
        record = {
            "choice": name,
            "n": int(tokens),
            "text": int(text),
            "dynamic_layers": list(layers.dynamic),
            "share": None if way is None else list(layers.shares) or way.share,
            "method": None if way is None else "exact peaks" if layers.peaks else f"{way.method} {way.stride}",
            "density": density,
            "density_outside": 1 - (1 - density) * len(layers.dynamic) / (DEPTH - len(TRIANGLE)),
            "nll": nll,
            "dense_nll": dense_nll,
            "kl": divergence(dense, found),
        }
        records.append(record)
        note(
            f"{part}: {name}: blocks {record['density_outside']:.3f}, nll {nll - dense_nll:+.4f}, kl {record['kl']:.5f}"
        )
    return records


def evaluation_pieces(tokens: int, texts: int) -> tuple[Board, list[Tensor]]:
    """The model and so many pieces of the text that quality is measured on, (1, tokens + 1) each."""
    board, _, evaluation = _model()
    return board, [_piece(evaluation, tokens, texts, text) for text in range(texts)]


def calibration_piece(tokens: int) -> tuple[Board, Tensor]:
    """The model and a piece (1, tokens + 1) of the text that calibrations read."""
    board, other, _ = _model()
    return board, _piece(other, tokens, 1, 0)


def _piece(stream: Tensor, tokens: int, texts: int, text: int) -> Tensor:
    """(1, tokens + 1): of as many pieces as there are ``texts``, spread evenly without overlap."""
    whole = stream.shape[0] // (tokens + 1)
    if texts > whole:
        raise ValueError(f"texts must be at most {whole} of {tokens} tokens, got {texts}")
    start = text * whole // texts * (tokens + 1)
    return stream[start : start + tokens + 1][None].to(device())


def _run(board: Board, ids: Tensor, layers: Layers) -> tuple[Tensor, float, float]:
    """Log-probabilities (SCORED, V), the loss in nats, the density."""
    logits, density = board.logits(ids[:, :-1], SCORED, layers)
    return logits[0].log_softmax(-1), float(F.cross_entropy(logits[0], ids[0, -SCORED:])), density


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("part", "choice", "method", "density_outside", "nll", "dense_nll", "kl")
CASE = Case(
    "stacked_frontier", "stacked_frontier.json", None, COLUMNS, Parts(names, settings, measure, finish), on_request=True
)
