"""Which estimate finds the blocks that matter: true attention lost, at equal numbers of blocks, layer by layer.

Queries, keys and values are those of real layers: SmolLM2 on text, the recall model on its hardest task. Each estimate
chooses by one share for all heads and rows of a layer, set so that the layer visits the wanted part of its blocks.
Every fourth block of rows is looked at.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Case, Parts, Records, note
from studies import recall_model, stacked_frontier
from studies.recall_model import QUESTIONS
from studies.recall_tasks import evaluation
from studies.stacked_board import Board, Layers
from studies.stacked_estimates import block_masses
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic.choice import choose
from tmx_compile.operator.dynamic.estimate import Groups
from tmx_compile.operator.dynamic.grid import Bounds, Grid, groups_of
from tmx_compile.operator.dynamic.sampled import Sampled

BLOCK, TOKENS, SEED = 64, 4096, 20261129
LAYERS = {"smollm2": (1, 3, 6, 10, 12, 14), "recall": (0, 1, 2, 4)}
DENSITIES = {"smollm2": (0.2, 0.4), "recall": (0.3, 0.5)}
# Name, method and stride of the package, products over those of all rows and keys.
OURS = {
    "pooled by 16": ("pooled", 16, 1 / 256),
    "antidiagonal by 8": ("antidiagonal", 8, 1 / 8),
    "sampled by 32": ("sampled", 32, 1 / 32),
    "sampled by 16": ("sampled", 16, 1 / 16),
    "sampled by 8": ("sampled", 8, 1 / 8),
}
OTHERS = {"box": 2 / BLOCK, "two keys": 2 / BLOCK, "two keys + sampled": 2 / BLOCK + 1 / 16}


def names(quick: bool) -> list[str]:
    return ["recall"] if quick else list(LAYERS)


def settings(quick: bool) -> dict[str, Any]:
    return {
        "block": BLOCK,
        "tokens": 512 if quick else TOKENS,
        "layers": LAYERS,
        "cost": "products of vectors that the estimate takes, over those of dense attention's scores of all pairs",
        "lost": "true attention, mean over rows and heads, that falls on blocks left out",
        "error": "of the layer's output, root mean square over that of the output; mean over the layers",
        "exact": "masses from exact scores: the mean over a block's rows, or its row that pays most",
        "other": "studies/stacked_estimates.py",
    }


def measure(part: str, quick: bool) -> Records:
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = {}
    costs: dict[str, float] = {}
    for layer, (query, key, value, scale) in _captured(part, 512 if quick else TOKENS).items():
        note(f"stacked_coverage: {part}, layer {layer}")
        grid = Grid(query.shape[2], key.shape[2], BLOCK)
        rows = torch.arange(2, grid.rows - 2, 4)
        possible, always = Bounds.of(grid, None, Selection(block=BLOCK, last=0), query.device).kept(
            rows, torch.arange(grid.columns)
        )
        weights = _weights(query, key, rows, scale)
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        out = torch.einsum("hrbn,hnd->hrbd", weights, values[0])
        cells = groups_of(weights, BLOCK, 3).sum(4)
        for name, (cost, masses) in _estimates(query, key, grid, cells, rows, scale).items():
            costs[name] = cost
            for density in DENSITIES[part]:
                chosen = _at_density(masses, possible[:, None], always[:, None], density)[0]
                kept = weights * chosen[:, :, None].repeat_interleave(BLOCK, -1)
                got = torch.einsum("hrbn,hnd->hrbd", kept / kept.sum(-1, keepdim=True), values[0])
                error = float(((got - out).square().mean() / out.square().mean()).sqrt())
                lost = float(1 - (cells * chosen[:, :, None]).sum(-1).mean())
                visited = float(chosen.sum() / possible.sum() / chosen.shape[0])
                found.setdefault((name, density), []).append((visited, lost, error))
    records: Records = []
    for (name, wanted), values_of in found.items():
        visited, lost, error = (statistics.fmean(x) for x in zip(*values_of, strict=True))
        each = [x[2] for x in values_of]
        ids = {"model": part, "n": 512 if quick else TOKENS, "estimate": name, "cost": costs[name], "wanted": wanted}
        records.append({**ids, "density": visited, "lost": lost, "error": error, "error_by_layer": each})
    return records


def _captured(part: str, tokens: int) -> dict[int, tuple[Tensor, Tensor, Tensor, float]]:
    """Query, key and value of the layers, (1, H, N, D) float32, and the scale."""
    if part == "smollm2":
        board, ids = stacked_frontier.calibration_piece(tokens)
    else:
        board = Board(recall_model.load(RESULTS / "recall").float(), "study-coverage")
        ids = evaluation(1, tokens, QUESTIONS, 2, torch.Generator().manual_seed(SEED)).ids
    taken: list[tuple[Tensor, Tensor, Tensor, float]] = []
    plain: Callable[..., Tensor] = board.dense

    def capture(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        taken.append((query.float(), key.float(), value.float(), scale))
        return plain(query, key, value, scale)

    board.dense = capture
    board.logits(ids[:, :tokens], 1, Layers())
    board.dense = plain
    return {layer: taken[layer] for layer in LAYERS[part]}


def _weights(query: Tensor, key: Tensor, rows: Tensor, scale: float) -> Tensor:
    """The softmax (H, rows, BLOCK, N) of some blocks of rows."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)[0]
    some = groups_of(query[0], BLOCK, 1)[:, rows]
    position = rows[:, None] * BLOCK + torch.arange(BLOCK)
    scores = torch.einsum("hrbd,hnd->hrbn", some, keys) * scale
    return torch.softmax(scores.masked_fill(torch.arange(keys.shape[1]) > position[..., None], float("-inf")), -1)


def _estimates(
    query: Tensor, key: Tensor, grid: Grid, cells: Tensor, rows: Tensor, scale: float
) -> dict[str, tuple[float, Tensor]]:
    """Cost and masses (1, H, rows, C) of every estimate; ``cells`` are the true ones of each row."""
    found = {"exact, mean": (1.0, cells.mean(2)[None]), "exact, most": (1.0, cells.amax(2)[None])}
    for name, (method, stride, cost) in OURS.items():
        selection = Selection(method, 0.9, BLOCK, stride)
        form = Sampled if method == "sampled" else Groups
        estimate = form(query, key, None, grid, selection, scale)
        found[name] = cost, torch.cat([estimate.masses(int(r), int(r) + 1) for r in rows], 2)
    for name, cost in OTHERS.items():
        parts = [block_masses(name, query, key, grid, int(r), int(r) + 1, scale) for r in rows]
        found[name] = cost, torch.cat(parts, 2)
    return found


def _at_density(masses: Tensor, possible: Tensor, always: Tensor, density: float) -> Tensor:
    """The cells that are kept by the share which keeps this part of them."""
    masses = torch.where(possible, masses, 0.0)
    masses = masses / masses.sum(-1, keepdim=True)
    low, high = 0.0, 1.0
    wanted = density * float(possible.sum()) * masses.shape[1]
    for _ in range(14):
        share = (low + high) / 2
        if int(choose(masses, possible, always, share).sum()) > wanted:
            high = share
        else:
            low = share
    return choose(masses, possible, always, max(low, 1e-6))


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("model", "estimate", "cost", "density", "lost", "error")
CASE = Case(
    "stacked_coverage", "stacked_coverage.json", None, COLUMNS, Parts(names, settings, measure, finish), on_request=True
)
