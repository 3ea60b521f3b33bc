"""The road without a selection: dense attention that skips tiles of keys inside the running softmax.

On a GPU: what is skipped, the time and the error by threshold, on random tensors, and on tensors with a sink and a
neighbourhood. On a CPU: what SmolLM2's own queries and keys would skip, and what that costs it. A skipped tile saves
its exponentials and its product with the values; its scores have been computed by then.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, Case, Parts, Records, device, free, note
from studies import recall_model
from studies.recall_model import QUESTIONS, TASKS
from studies.recall_tasks import evaluation
from studies.stacked_board import Board, Layers
from studies.stacked_board import dense as dense_attention
from tmx_compile.analysis.choose.direct import divergence
from tmx_compile.bench.dense import dense_variants
from tmx_compile.bench.timing import describe, interleaved

FULL: dict[str, Any] = {
    "lengths": [32768, 65536],
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "dtype": "bfloat16",
    "thresholds": [10, 7, 5, 3],
    # rows, keys, warps, stages
    "tiles": [[128, 128, 8, 2], [128, 64, 8, 3]],
    "model": [[2048, 1]],
    "model_thresholds": [10, 7, 5, 3],
    # Sequences of each task.
    "recall": [8192, 16],
}
QUICK: dict[str, Any] = FULL | {"lengths": [256], "heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "float32",
                                "thresholds": [5], "tiles": [[64, 64, 4, 1]], "model": [[256, 1]],
                                "model_thresholds": [5], "recall": [512, 1]}  # fmt: skip
SCORED = 128


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def names(quick: bool) -> list[str]:
    plan = _plan(quick)
    recall = [f"recall-{plan['recall'][0]}"]
    if device().type != "cuda":
        return [f"smollm2-{n}" for n, _ in plan["model"]] + recall
    timed = [f"{data}-{n}" for n in plan["lengths"] for data in DATA]
    return timed[: len(DATA)] + recall + timed[len(DATA) :]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "threshold": "nats that every score of a tile has to lie below its row's running maximum; none: nothing is "
        "skipped",
        "skipped": "of the tiles that no mask has to look at",
        "near": "of the rows' own tiles before the others",
        "loads": "values of every tile are loaded (all), or of those that are taken (taken)",
        "ms": "median, by the fastest of the tiles and loads tried",
        "dense_ms": "F.scaled_dot_product_attention(is_causal=True) by its fastest backend",
        "error": "largest absolute difference from the same kernel that skips nothing",
        "random": "independent normal queries, keys, values",
        "structured": "the same, with a sink at the first key and a neighbourhood that every row attends to",
        "accuracy": "the recall model: the share of answers that are the most likely token; all layers skip",
        "kl": "mean divergence of the dense distribution from this one over the last 128 positions, nats; all layers "
        "skip",
    }


def measure(part: str, quick: bool) -> Records:
    data, _, n = part.partition("-")
    if data == "recall":
        return _recall(_plan(quick))
    return _model(int(n), quick) if data == "smollm2" else _timed(data, int(n), _plan(quick))


def random(tokens: int, plan: dict[str, Any]) -> list[Tensor]:
    """Query (1, H, N, D), key and value (1, Hkv, N, D), in the memory that models leave."""
    generator = torch.Generator(device()).manual_seed(tokens)
    sizes = [(tokens, heads, plan["head_dim"]) for heads in (plan["heads"], plan["kv_heads"], plan["kv_heads"])]
    found = (torch.randn(1, *size, generator=generator, device=device()).transpose(1, 2) for size in sizes)
    return [x.to(getattr(torch, plan["dtype"])) for x in found]


def structured(tokens: int, plan: dict[str, Any], sink: float = 9.0, near: float = 9.0) -> list[Tensor]:
    """The same; scores gain ``sink`` nats at the first key, and up to ``near`` at the nearest."""
    query, key, value = random(tokens, plan)
    dim = plan["head_dim"]
    # Waves of many lengths agree where positions do.
    waves = dim // 4
    rate = 2.0 ** -torch.linspace(1, 13, waves, device=query.device)
    angle = torch.arange(tokens, device=query.device)[:, None] * rate
    place = torch.cat([angle.cos(), angle.sin()], -1) * (near * dim**0.5 / waves) ** 0.5
    for x in (query, key):
        x[..., : 2 * waves] = place.to(x.dtype)
    size = (sink * dim**0.5) ** 0.5
    query[..., -1] = size
    key[..., -1] = 0
    key[:, :, 0] = 0
    key[:, :, 0, -1] = size
    return [query, key, value]


DATA = {"structured": structured, "random": random}


def _timed(data: str, tokens: int, plan: dict[str, Any]) -> Records:
    from studies.softmax_skip_kernel import attend

    query, key, value = DATA[data](tokens, plan)
    dense, _ = dense_variants(query, key, value)
    times = interleaved(dense, budget_s=0.3, least=3, most=6)
    dense_ms = min(found.median for found in times.values())
    exact, _ = attend(query, key, value, None, **_launch(plan["tiles"][0]))
    records: Records = []
    for threshold in (None, *plan["thresholds"]):
        for near_first in (False, True) if threshold is not None else (False,):
            tried: dict[str, float] = {}
            told: dict[str, Any] = {}
            for tiles in plan["tiles"]:
                # Nothing is gained by loading late where nothing is skipped, and one form is enough near first.
                for load_all in (True, False)[near_first : 1 if threshold is None else 2]:
                    name = "/".join(map(str, tiles)) + (", all" if load_all else ", taken")
                    options = {"near_first": near_first, "load_all": load_all, **_launch(tiles)}
                    run = functools.partial(attend, query, key, value, threshold, **options)
                    try:
                        out, skipped = run()
                        tried[name] = interleaved({"run": run}, budget_s=0.1, least=3, most=5)["run"].median
                    except Exception as error:
                        note(f"{name}: {describe(error)}")
                        continue
                    of = _whole_tiles(tokens, *tiles[:2]) * query.shape[1]
                    told[name] = {
                        "skipped": int(skipped.sum()) / max(of, 1),
                        "error": float((out.float() - exact.float()).abs().max()),
                    }
            best = min(tried, key=tried.__getitem__)
            record = {"n": tokens, "data": data, "threshold": threshold, "near_first": near_first, "ms": tried[best]}
            records.append(record | {"tiles": best, **told[best], "dense_ms": dense_ms, "tried_ms": tried})
            note(str(records[-1]))
    free()
    return records


def _launch(tiles: list[int]) -> dict[str, int]:
    return dict(zip(("rows", "keys", "warps", "stages"), tiles, strict=True))


def _whole_tiles(tokens: int, rows: int, keys: int) -> int:
    return sum(row * rows // keys for row in range(tokens // rows))


def attend_plain(
    query: Tensor, key: Tensor, value: Tensor, threshold: float, scale: float, *, near_first: bool, rows: int, keys: int
) -> tuple[Tensor, int, int]:
    """What the kernel computes (B, H, N, D), in plain PyTorch, the tiles left out, and those that could have been."""
    tokens, heads = query.shape[2], query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    out = torch.empty_like(query)
    skipped = possible = 0
    for low in range(0, tokens, rows):
        high = min(tokens, low + rows)
        stop = -(-high // keys) * keys
        place = torch.arange(stop, device=query.device)
        scores = query[:, :, low:high] @ F.pad(key[:, :, :high], (0, 0, 0, stop - high)).mT * scale
        scores = scores.masked_fill(place > place[low:high, None], float("-inf"))
        largest = scores.unflatten(-1, (-1, keys)).amax(-1)
        whole = low // keys
        seen = largest[..., :whole].cummax(-1).values
        before = F.pad(seen, (1, 0), value=float("-inf"))[..., :-1]
        if near_first:
            before = torch.maximum(before, largest[..., whole:].amax(-1, keepdim=True))
        matters = (largest[..., :whole] - before > -threshold).any(-2)
        skipped += int((~matters).sum())
        possible += matters.numel()
        taken = F.pad(matters, (0, stop // keys - whole), value=True).repeat_interleave(keys, -1)
        weights = torch.softmax(scores.masked_fill(~taken[..., None, :], float("-inf")), -1)
        out[:, :, low:high] = weights[..., :high] @ value[:, :, :high]
    return out, skipped, possible


def _model(tokens: int, quick: bool) -> Records:
    """SmolLM2 with the skipping in all layers."""
    # Its weights are on a CPU alone.
    from studies.stacked_frontier import evaluation_pieces

    plan = _plan(quick)
    texts = dict(map(tuple, plan["model"]))[tokens]
    board, pieces = evaluation_pieces(tokens, texts)
    records: Records = []
    for text, ids in enumerate(pieces):
        dense = board.logits(ids[:, :-1], SCORED, Layers())[0][0].log_softmax(-1)
        for threshold in plan["model_thresholds"]:
            counts: list[tuple[int, int]] = []
            board.dense = functools.partial(_counted, counts=counts, threshold=threshold, near_first=True)
            found = board.logits(ids[:, :-1], SCORED, Layers())[0][0].log_softmax(-1)
            board.dense = dense_attention
            by_layer = [skipped / max(of, 1) for skipped, of in counts]
            record = {"n": tokens, "text": text, "data": "SmolLM2-135M", "threshold": threshold, "near_first": True}
            skipped = sum(x for x, _ in counts) / max(1, sum(of for _, of in counts))
            record |= {"skipped": skipped, "kl": divergence(dense, found)}
            records.append(record | {"most_in_a_layer": max(by_layer), "least_in_a_layer": min(by_layer)})
            note(str(records[-1]))
    return records


def _recall(plan: dict[str, Any]) -> Records:
    """The recall model with the skipping in all layers."""
    tokens, count = plan["recall"]
    model = recall_model.load(RESULTS / "recall")
    # float32: a maximum in bfloat16 would be another one.
    board = Board(model.to(device(), torch.float32), "study-skip-recall")
    records: Records = []
    for threshold in (None, *plan["model_thresholds"]):
        counts: list[tuple[int, int]] = []
        if threshold is not None:
            board.dense = functools.partial(_counted, counts=counts, threshold=threshold, near_first=True)
        accuracy = {}
        for task, hops in TASKS.items():
            generator = torch.Generator(device()).manual_seed(10 * tokens + hops)
            right = []
            for _ in range(count):
                batch = evaluation(1, tokens, QUESTIONS, hops, generator)
                asked = batch.targets >= 0
                keep = tokens - int(asked.any(0).nonzero()[0])
                likely = board.logits(batch.ids, keep, Layers())[0].argmax(-1)
                right.append((likely == batch.targets[:, -keep:])[asked[:, -keep:]])
            accuracy[task] = float(torch.cat(right).float().mean())
        skipped = sum(x for x, _ in counts) / max(1, sum(of for _, of in counts))
        record = {"n": tokens, "texts": count, "data": "recall", "threshold": threshold, "near_first": True}
        records.append(record | {"skipped": skipped, "accuracy": accuracy})
        note(str(records[-1]))
    return records


def _counted(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, counts: list[tuple[int, int]], threshold: float,
    near_first: bool,
) -> Tensor:  # fmt: skip
    out, skipped, of = attend_plain(query, key, value, threshold, scale, near_first=near_first, rows=128, keys=64)
    counts.append((skipped, of))
    return out


def finish(records: Records) -> None:
    """Every record stands for itself."""


def _file() -> str:
    return "softmax_skip.json" if device().type == "cuda" else "softmax_skip_model.json"


COLUMNS = ("part", "threshold", "near_first", "skipped", "ms", "dense_ms", "error", "kl")
CASE = Case("softmax_skip", _file, None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
