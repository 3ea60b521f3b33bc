"""Mixes of dense, triangle and dynamic layers for the recall model: chosen by measurement, judged on other sequences.

``calibrate`` measures what each layer costs alone as a triangle and as a dynamic one; ``mixes`` proposes from that;
some sets beside the proposals have fewer triangle layers. On sequences of their own the right answers and the times say
which is chosen: the fastest that answers 98% of every task. Other sequences judge it.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Case, Parts, Records, device, free, note
from studies import recall_model
from studies.recall_model import QUESTIONS, TASKS
from studies.recall_tasks import Batch, evaluation
from studies.stacked_recall import logits_by, recall, right_answers
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis import Choice, DynamicLayers, Inputs, Sample, calibrate, mixes, read_scores
from tmx_compile.bench.timing import interleaved
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.mask import Geometry

SEED = 20261202
BUDGET = 0.98
"""Right answers of every task that a choice must give on the sequences that choose."""
LAYERS = 6
FULL: dict[str, Any] = {
    "lengths": [8192],
    "batch": 16,
    "calibration": 1,
    "choosing": 2,
    "judging": 4,
    "ways": [["sampled", 16, 64], ["sampled", 32, 128], ["pooled", 16, 64]],
    "shares": [0.9, 0.95, 0.98],
    "geometries": [[8, 512, 128], [8, 2048, 128]],
    "dtype": "bfloat16",
    "rounds": [12.0, 5, 20],
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [1024],
    "batch": 1,
    "choosing": 1,
    "judging": 1,
    "ways": [["sampled", 16, 64]],
    "shares": [0.9],
    "geometries": [[8, 128, 64]],
    "dtype": "float32",
    "rounds": [0.0, 1, 1],
}


def names(quick: bool) -> list[str]:
    return [str(n) for n in (QUICK if quick else FULL)["lengths"]]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        "model": f"a Llama of {LAYERS} layers trained on the tasks, {recall_model.RECORD}",
        "questions": QUESTIONS,
        "seed": SEED,
        "budget": BUDGET,
        "calibration": "batches of each task; the divergence at the last question",
        "choosing, judging": "batches of each task",
        "accuracy": "the share of answers that are the most likely token, on the sequences that judge",
        "choosing_accuracy": "the same on those that choose",
        "density": "blocks of the layers that are no triangle layers over those of dense attention, dense ones "
        "counting 1; of the last call",
        "ms": "time to the logits of the last positions, a batch of the first task, calls in turn with the others",
        "chosen": "the fastest that keeps the budget on the sequences that choose",
    }


def measure(part: str, quick: bool) -> Records:
    plan, tokens = QUICK if quick else FULL, int(part)
    model: Any = recall(plan["dtype"])
    wanted: dict[str, Choice | None] = {"dense": None}
    first, *others = plan["geometries"]
    for geometry, way in [*((first, way) for way in plan["ways"]), *((x, plan["ways"][0]) for x in others)]:
        wanted |= _proposals(model, tokens, Geometry(*geometry), way, plan)
    for way in plan["ways"]:
        wanted |= _others(Geometry(*first), way, plan)
    choosing, judging = (_tasks(tokens, which, plan) for which in ("choosing", "judging"))
    records: Records = []
    runs: dict[str, Callable[[], Any]] = {}
    for name, choice in wanted.items():
        attention = None
        if choice is not None:
            config = choice.config().replace(min_seq_len=512)
            attention = register_attention(config, name=f"study_{name}", strict=True)
        which = "sdpa" if attention is None else attention.name
        chose, judged = ({task: _right(model, which, x) for task, x in tasks.items()} for tasks in (choosing, judging))
        densities: list[float] = []
        if attention is not None:
            densities = [attention.report.density(x) for x in attention.report if x.decision == "dynamic"]
        records.append(_record(tokens, name, choice, chose, judged, densities))
        note(f"stacked_mixes: {records[-1]}")
        runs[name] = functools.partial(logits_by, model, which, judging[next(iter(TASKS))][0])
        free()
    budget, least, most = plan["rounds"]
    times = interleaved(runs, budget_s=budget, least=least, most=most)
    for record in records:
        record |= {"ms": times[record["variant"]].median, "ms_min": times[record["variant"]].min}
    kept = [x for x in records if x["variant"] != "dense" and min(x["choosing_accuracy"].values()) >= BUDGET]
    best = min(kept, key=lambda x: x["ms"], default=None)
    for record in records:
        record["chosen"] = record is best
        note(f"stacked_mixes: {record['variant']}: {record['ms']:.2f} ms, {record['accuracy']}, {record['chosen']}")
    return records


def _proposals(model: Any, tokens: int, geometry: Geometry, way: Sequence[Any], plan: dict[str, Any]) -> dict[str, Any]:
    """By ``calibrate`` and ``mixes``; what costs least alone, for every number of layers that are not dense."""
    label = " ".join(map(str, way))
    method, group, block = way
    how = {"dynamic_method": method, "dynamic_group": group, "dynamic_block": block}
    samples = []
    for place, (task, kind) in enumerate(TASKS.items()):
        note(f"stacked_mixes: calibrating {label}, {geometry}: {task}")
        generator = torch.Generator(device()).manual_seed(SEED - 1 - place)
        for _ in range(plan["calibration"]):
            batch = evaluation(plan["batch"], tokens, QUESTIONS, kind, generator)
            end = int((batch.targets[0] >= 0).nonzero()[-1])
            inputs = {"input_ids": batch.ids[:, : end + 1].clone(), "use_cache": False, "logits_to_keep": 1}
            samples.append(Sample(Inputs(kwargs=inputs), batch.targets[:, end].clone()))
    model.set_attn_implementation("sdpa")
    config = TriangleMixConfig(*geometry.counts, min_seq_len=512, **how)
    more: dict[str, Any] = {"greedy": 0, "positions": 1, "shares": plan["shares"], "progress": False}
    found = calibrate(model, samples, config=config, estimator="direct", **more)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        found.to_profile(path, n=1)
        scores = read_scores(path, num_layers=LAYERS)
    assert scores is not None
    note(f"stacked_mixes: {scores}")
    return dict(mixes({label: scores}, num_layers=LAYERS, counts=range(1, LAYERS + 1), tokens=tokens))


def _others(geometry: Geometry, way: Sequence[Any], plan: dict[str, Any]) -> dict[str, Choice]:
    """Of the deepest layers some as triangle layers, the others and the first dynamic ones; layers 1 and 2 dense."""
    found = {}
    for count in range(4):
        for triangle in itertools.combinations((3, 4, 5), count):
            for share in plan["shares"][1:2] or plan["shares"]:
                layers = tuple(sorted({0, 3, 4, 5} - {*triangle}))
                dynamic = DynamicLayers(layers, (share,) * len(layers), way[0], way[2], way[1])
                name = f"{' '.join(map(str, way))} {share}: triangle {'-'.join(map(str, triangle)) or 'none'}"
                found[name] = Choice(geometry, triangle, dynamic=dynamic)
    found["triangle 3-4-5"] = Choice(geometry, (3, 4, 5))
    return found


def _tasks(tokens: int, which: str, plan: dict[str, Any]) -> dict[str, list[Batch]]:
    found, seed = {}, SEED + 10 * tokens + (1000 if which == "judging" else 0)
    for task, kind in TASKS.items():
        generator = torch.Generator(device()).manual_seed(seed + kind)
        found[task] = [evaluation(plan["batch"], tokens, QUESTIONS, kind, generator) for _ in range(plan[which])]
    return found


def _right(model: Any, which: str, batches: Sequence[Batch]) -> float:
    return statistics.fmean(right_answers(batch, logits_by(model, which, batch)) for batch in batches)


def _record(
    tokens: int,
    name: str,
    choice: Choice | None,
    choosing: dict[str, float],
    judging: dict[str, float],
    densities: Sequence[float],
) -> dict[str, Any]:
    triangle = () if choice is None else choice.layers
    dynamic = DynamicLayers() if choice is None else choice.dynamic
    return {
        "variant": name,
        "n": tokens,
        "model": "recall",
        "geometry": None if choice is None else list(choice.geometry.counts),
        "triangle_layers": list(triangle),
        "dynamic_layers": list(dynamic.layers),
        "way": [dynamic.method, dynamic.group, dynamic.block] if dynamic.layers else None,
        "share": list(dynamic.shares),
        "density_by_layer": list(densities),
        "density": density(densities, len(triangle)),
        "choosing_accuracy": choosing,
        "accuracy": judging,
    }


def density(dynamic: Sequence[float], triangle: int) -> float:
    """Over the layers that are no triangle layers, dense ones counting 1; 1 where there are none."""
    others = LAYERS - triangle
    return 1 - sum(1 - x for x in dynamic) / others if others else 1.0


def finish(records: Records) -> None:
    """Each over the dense one of its length."""
    dense = {x["n"]: x["ms"] for x in records if x["variant"] == "dense"}
    for record in records:
        before = record["dense_ms"] = dense.get(record["n"])
        record["of_dense"] = None if before is None else record["ms"] / before


COLUMNS = ("variant", "density", "choosing_accuracy", "accuracy", "ms", "of_dense", "chosen")
CASE = Case(
    "stacked_mixes", "stacked_mixes.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True
)
