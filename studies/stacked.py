"""What blocks chosen at run time cost in quality, alone and beside triangle layers: SmolLM2 and the recall model.

``python -m studies.run stacked`` measures part by part. The models run as an attention implementation of Transformers
that is switched layer by layer. All scored positions are in the last rows, which attend to everything: what is lost was
lost in the rows before. ``density`` is the share of blocks that the dynamic layers visit, ``density_outside`` that of
all layers which are no triangle layers, dense ones counting 1.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, Case, Parts, Records, device, note
from benchmarks.models import smollm2
from benchmarks.texts import EVALUATION, token_stream
from studies import recall_model
from studies.recall_model import QUESTIONS, TASKS
from studies.recall_tasks import evaluation
from studies.stacked_board import GEOMETRY, Board, Layers
from studies.texts import CALIBRATION
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis import CapturedModel, Inputs, Sample, Scores, ShareScores, mixes
from tmx_compile.analysis.choose.direct import DirectMeasurement, divergence
from tmx_compile.analysis.journal import Journal
from tmx_compile.analysis.judge.intervals import interval
from tmx_compile.mask import Geometry
from tmx_compile.mask.selection import Selection

SCORED = 64
"""Last positions of a prompt that are compared, as in the study of triangle layers."""
SEED = 20261127
# (method, stride, block)
WAYS = [("pooled", 16, 64), ("pooled", 64, 64), ("antidiagonal", 16, 64), ("pooled", 16, 128)]
SHARES = [0.8, 0.9, 0.95]
PEAK_SHARES = [0.5, 0.6, 0.7, 0.8, 0.9]
"""Of lists from exact scores."""
# A CPU has time for the first way, one share and few texts.
FULL: dict[str, Any] = {
    "smollm2": [[2048, 2], [4096, 2]],
    "recall": [[8192, 3]],
    "triangle": 15,
    "layers": 30,
    "shares": [0.9],
    "ways": 1,
    "counts": [6],
    "calibration": None,
    "calibrated": {"calibration": [2048, 1], "shares": [0.9, 0.8], "counts": [8], "evaluation": [[4096, 3], [2048, 4]]},
}
CUDA: dict[str, Any] = {
    "smollm2": [[2048, 12], [4096, 8], [7680, 4]],
    "recall": [[4096, 16], [8192, 16]],
    "shares": SHARES,
    "ways": len(WAYS),
    "counts": [3, 6, 9, 12],
    "calibration": [4096, 3],
    "calibrated": {"calibration": [4096, 3], "shares": [0.9, 0.8, 0.95], "counts": [6, 8, 10],
                   "evaluation": [[4096, 8], [7680, 4]]},
}  # fmt: skip
QUICK: dict[str, Any] = FULL | {"smollm2": [[256, 1]], "recall": [], "triangle": 2, "layers": 4, "counts": [1],
                                "calibration": [256, 1],
                                "calibrated": {"calibration": [256, 1], "shares": [0.9, 0.8], "counts": [1],
                                               "evaluation": [[256, 2]]}}  # fmt: skip
# Of the layers that are no triangle layers, from the one whose Middle section is needed least: a calibration for the
# same geometry (profiles/cuda/smollm2-135m-8-512-128-gradient.json).
RANKED = (13, 12, 11, 14, 10, 9, 4, 2, 6, 5, 3, 8, 1, 7, 0)


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL | (CUDA if device().type == "cuda" else {})


def names(quick: bool) -> list[str]:
    plan = _plan(quick)
    found = [f"{model}-{tokens}" for model in ("recall", "smollm2") for tokens, _ in plan[model]]
    calibrated = plan["calibrated"]
    found.append(f"calibration-{calibrated['calibration'][0]}")
    return found + [f"calibrated-{tokens}" for tokens, _ in calibrated["evaluation"]]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "geometry": list(GEOMETRY),
        "scored": SCORED,
        "seed": SEED,
        "ways": "method, stride, block",
        "smollm2_is": "SmolLM2-135M-Instruct (4-bit weights, float32 on a CPU, bfloat16 on a GPU)",
        "ppl": "perplexity over dense perplexity less 1: mean and 95% interval by bootstrap over texts",
        "ppl_over_triangle": "the same over the perplexity with the triangle layers alone",
        "chosen": "the dynamic layers whose own divergence from dense was least on other text, at share 0.9, for the "
        "blocks that they leave out; without 'calibration' those whose Middle section a gradient needs least",
        "calibration": "one dynamic layer alone on other text, as calibrate measures it; at the shares after the first "
        "the half of the layers that is cheapest at the first",
        "calibrated": "dynamic layers and their shares as mixes() proposes them from that, for the counts of layers",
        "accuracy": "the share of answers that are the most likely token",
        "always_kept": "first block, a row's own block and the one before, all blocks for the last rows",
    }


def ways(plan: dict[str, Any]) -> list[Selection]:
    """Every way and share: the first way with all shares first."""
    return [
        Selection(method, share, block, stride, GEOMETRY[0], GEOMETRY[2])
        for method, stride, block in WAYS[: plan["ways"]]
        for share in plan["shares"]
    ]


MIDDLE = Selection(*WAYS[0][:1], 0.9, *WAYS[0][:0:-1], GEOMETRY[0], GEOMETRY[2])


def measure(name: str, quick: bool) -> Records:
    model, tokens = name.rsplit("-", 1)
    if model == "calibration":
        return _smollm2(quick).calibration()
    if model == "calibrated":
        return _smollm2(quick).calibrated(int(tokens), quick)
    count = dict(map(tuple, _plan(quick)[model]))[int(tokens)]
    return (_smollm2(quick) if model == "smollm2" else _recall()).records(int(tokens), count)


@functools.lru_cache(maxsize=1)
def _smollm2(quick: bool) -> SmolLM2:
    return SmolLM2(_plan(quick))


@functools.lru_cache(maxsize=1)
def _recall() -> Recall:
    return Recall()


class SmolLM2:
    """Perplexity of the end of real texts."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan, self.depth = plan, plan["layers"]
        model, tokenizer = smollm2(self.depth)
        where = device()
        model = model.to(where, torch.bfloat16 if where.type == "cuda" else torch.float32)
        self.board = Board(model, "study-smollm2")
        self.text, self.other = (token_stream(tokenizer, which) for which in (EVALUATION, CALIBRATION))
        self.triangle = tuple(range(self.depth - plan["triangle"], self.depth))
        self.rest = tuple(range(self.depth - plan["triangle"]))
        self.ranking: list[int] = []

    def calibration(self) -> Records:
        """What each layer costs alone, at each share."""
        tokens, count = self.plan["calibrated"]["calibration"]
        texts = _pieces(self.other, tokens, count)
        self.board.model.set_attn_implementation("sdpa")
        captured = CapturedModel(self.board.model, TriangleMixConfig(*GEOMETRY))
        samples = []
        for place, ids in enumerate(texts):
            inputs = Inputs(kwargs={"input_ids": ids[:, :-1].clone(), "use_cache": False, "logits_to_keep": SCORED})
            samples.append((str(place), Sample(inputs, ids[:, -1].clone())))
        measurement = DirectMeasurement(captured, samples, SCORED, Journal(None, {}))
        found: Records = []
        layers: Sequence[int] = self.rest
        for share in self.plan["calibrated"]["shares"]:
            note(f"stacked: {tokens} tokens, layers {list(layers)} one by one, share {share}")
            way = replace(MIDDLE, share=share)
            with torch.no_grad():
                (scores,) = measurement.shares(layers, [way])
            for layer in layers:
                cost = {"density": scores.density[layer], "kl": scores.divergence[layer]}
                how = {"policy": "one layer", **_how(Layers((), (layer,), way))}
                found.append({"model": "SmolLM2-135M", "n": tokens, "texts": count, **how, **cost})
            layers = sorted((scores.ranking if len(layers) == len(self.rest) else layers)[: len(self.rest) // 2 or 1])
        self.board.model.set_attn_implementation(self.board.name)
        return found

    def calibrated(self, tokens: int, quick: bool) -> Records:
        """The layers and shares that a calibration proposes, on texts that it has not seen."""
        plan = self.plan["calibrated"]
        count = dict(map(tuple, plan["evaluation"]))[tokens]
        by_share: dict[float, Records] = {}
        for item in _stored(f"calibration-{plan['calibration'][0]}", quick) or self.calibration():
            by_share.setdefault(item["share"], []).append(item)
        shares = tuple(
            ShareScores(share, *({x["dynamic_layers"][0]: x[name] for x in items} for name in ("kl", "density")))
            for share, items in by_share.items()
        )
        scores = Scores(Geometry(*GEOMETRY), {}, shares, MIDDLE.method, MIDDLE.block)
        found = mixes({"": scores}, num_layers=self.depth, counts=plan["counts"], tokens=tokens)
        texts = _pieces(self.text, tokens, count)
        wanted = [Layers(), Layers(self.triangle)]
        wanted += [Layers(self.triangle, x.dynamic.layers, MIDDLE, x.dynamic.shares) for x in found.values()]
        runs: list[list[Any]] = [[] for _ in wanted]
        for ids in texts:
            for layers, results in zip(wanted, runs, strict=True):
                note(f"stacked: {tokens} tokens, {layers}")
                results.append(self._run(ids, layers))
        dense, alone = runs[:2]
        policies = ["deepest"] + ["calibrated"] * len(found)
        return [
            self._record(tokens, layers, results, dense, alone, policy)
            for layers, results, policy in zip(wanted[1:], runs[1:], policies, strict=True)
        ]

    def records(self, tokens: int, count: int) -> Records:
        if not self.ranking:
            self.ranking = self._rank()
        texts = _pieces(self.text, tokens, count)
        dense = [self._run(ids, Layers()) for ids in texts]
        alone = [self._run(ids, Layers(self.triangle)) for ids in texts]
        found = [self._record(tokens, Layers(self.triangle), alone, dense, alone, "deepest")]
        every = ways(self.plan)
        wanted = [("all others", Layers(self.triangle, self.rest, way)) for way in every]
        for n in self.plan["counts"]:
            least = tuple(sorted(self.ranking[:n]))
            wanted += [("chosen", Layers(self.triangle, least, way)) for way in every[: len(self.plan["shares"])]]
        if self.plan["calibration"]:
            wanted += [("alone", Layers((), self.rest, MIDDLE))]
        for policy, layers in wanted:
            note(f"stacked: {tokens} tokens, {policy}, {len(layers.dynamic)} dynamic, {layers.selection}")
            runs = [self._run(ids, layers) for ids in texts]
            found.append(self._record(tokens, layers, runs, dense, alone, policy))
        return found

    def _run(self, ids: Tensor, layers: Layers) -> tuple[Tensor, float, float]:
        """Log-probabilities (SCORED, V), the loss in nats, the density."""
        logits, density = self.board.logits(ids[:, :-1], SCORED, layers)
        loss = F.cross_entropy(logits[0], ids[0, -SCORED:])
        return logits[0].log_softmax(-1), float(loss), density

    def _rank(self) -> list[int]:
        """The layers that are no triangle layers, from the one that gives blocks away most cheaply."""
        if self.plan["calibration"] is None:
            return list(RANKED)
        tokens, count = self.plan["calibration"]
        way = MIDDLE
        texts = _pieces(self.other, tokens, count)
        dense = [self._run(ids, Layers())[0] for ids in texts]
        cost = {}
        for layer in self.rest:
            note(f"stacked: ranking layer {layer}")
            runs = [self._run(ids, Layers((), (layer,), way)) for ids in texts]
            divergences = [divergence(a, run[0]) for a, run in zip(dense, runs, strict=True)]
            # What a layer costs for the share of its blocks that it leaves out.
            cost[layer] = statistics.fmean(divergences) / max(1e-3, 1 - statistics.fmean(run[2] for run in runs))
        return sorted(cost, key=cost.__getitem__)

    def _record(self, tokens: int, layers: Layers, runs: Any, dense: Any, alone: Any, policy: str) -> dict[str, Any]:
        density = statistics.fmean(run[2] for run in runs)
        others = self.depth - len(layers.triangle)
        outside = 1 - (1 - density) * len(layers.dynamic) / others
        changes = [run[1] - before[1] for run, before in zip(runs, dense, strict=True)]
        stacked = [run[1] - before[1] for run, before in zip(runs, alone, strict=True)]
        return {
            "model": "SmolLM2-135M",
            "n": tokens,
            "texts": len(runs),
            "policy": policy,
            **_how(layers),
            "density": density,
            "density_outside": outside,
            "nll": statistics.fmean(run[1] for run in runs),
            "kl": statistics.fmean(divergence(a[0], b[0]) for a, b in zip(dense, runs, strict=True)),
            "ppl": _spread(changes),
            "ppl_over_triangle": _spread(stacked),
        }


class Recall:
    """Answers of the model that was trained to look up."""

    def __init__(self) -> None:
        model = recall_model.load(RESULTS / "recall")
        where = device()
        self.board = Board(model.to(where, torch.bfloat16 if where.type == "cuda" else torch.float32), "study-recall")
        self.depth = model.config.num_hidden_layers

    def records(self, tokens: int, count: int) -> Records:
        triangle, rest = tuple(range(3, self.depth)), tuple(range(3))
        sets = [("dense", Layers()), ("deepest", Layers(triangle))]
        for way in ways(CUDA):
            sets += [("all others", Layers(triangle, rest, way)), ("alone", Layers((), tuple(range(self.depth)), way))]
        sets += [("one layer", Layers((), (layer,), MIDDLE)) for layer in range(self.depth)]
        for share in PEAK_SHARES:
            way = replace(MIDDLE, share=share)
            sets += [("all others", Layers(triangle, rest, way, peaks=True))]
            sets += [("alone", Layers((), tuple(range(self.depth)), way, peaks=True))]
        for share in SHARES:
            way = replace(MIDDLE, share=share)
            sets += [
                ("without layer 1", Layers(triangle, (0, 2), way)),
                ("without layer 1, alone", Layers((), (0, 2, *triangle), way)),
            ]
        tasks = TASKS
        if device().type == "cpu":
            # It has time for the hardest task, and for few choices.
            tasks = {"2 hops": TASKS["2 hops"]}
            sets = [
                (policy, layers)
                for policy, layers in sets
                if policy in ("dense", "deepest")
                or (policy in ("all others", "alone") and layers.peaks and layers.of(layers.dynamic[0]).share == 0.8)
                or (policy in ("all others", "without layer 1") and not layers.peaks and layers.selection == MIDDLE)
            ]
        found = []
        for policy, layers in sets:
            accuracy, density = {}, []
            for task, hops in tasks.items():
                generator = torch.Generator(device()).manual_seed(SEED + 10 * tokens + hops)
                right = []
                for _ in range(count):
                    batch = evaluation(1, tokens, QUESTIONS, hops, generator)
                    asked = batch.targets >= 0
                    keep = tokens - int(asked.any(0).nonzero()[0])
                    logits, share = self.board.logits(batch.ids, keep, layers)
                    right.append((logits.argmax(-1) == batch.targets[:, -keep:])[asked[:, -keep:]])
                    density.append(share)
                accuracy[task] = float(torch.cat(right).float().mean())
            share = statistics.fmean(density)
            others = self.depth - len(layers.triangle)
            found.append(
                {
                    "model": "recall",
                    "n": tokens,
                    "texts": count,
                    "policy": policy,
                    **_how(layers),
                    "density": share,
                    "density_outside": 1 - (1 - share) * len(layers.dynamic) / others,
                    "accuracy": accuracy,
                }
            )
            note(f"stacked: recall {tokens}, {policy}, {layers}: {share:.3f}, {accuracy}")
        return found


def _how(layers: Layers) -> dict[str, Any]:
    way = layers.selection
    words: dict[str, Any] = {}
    if way is not None:
        share = list(layers.shares) if layers.shares else way.share
        method, stride = ("exact peaks", 1) if layers.peaks else (way.method, way.stride)
        words = {"method": method, "stride": stride, "block": way.block, "share": share}
    return {"triangle_layers": list(layers.triangle), "dynamic_layers": list(layers.dynamic), **words}


def _stored(part: str, quick: bool) -> Records:
    """The records of a part that the result file holds; none in a quick run."""
    path = RESULTS / _file()
    if quick or not path.is_file():
        return []
    return [item for item in json.loads(path.read_text(encoding="utf-8"))["records"] if item["part"] == part]


def _pieces(stream: Tensor, tokens: int, count: int) -> list[Tensor]:
    """(1, tokens + 1) pieces that do not overlap, spread evenly; as many as there are, at most ``count``."""
    whole = stream.shape[0] // (tokens + 1)
    count = min(count, whole)
    starts = [i * whole // count * (tokens + 1) for i in range(count)]
    return [stream[start : start + tokens + 1][None].to(device()) for start in starts]


def _spread(changes: Sequence[float]) -> list[float]:
    if len(changes) < 2:
        return [math.expm1(changes[0])]
    return interval(changes, exponent=True).as_list()


def finish(records: Records) -> None:
    """Every record stands for itself."""


def _file() -> str:
    return "stacked_quality_cuda.json" if torch.cuda.is_available() else "stacked_quality.json"


COLUMNS = ("part", "policy", "method", "stride", "block", "share", "density_outside", "ppl_over_triangle", "accuracy")
CASE = Case("stacked", _file, None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
