"""A model with real structure, timed: the trained recall model, with dynamic layers whose density is what it needs.

Dense, with its three deepest layers as triangle layers, and with dynamic layers beside those, through the attention
implementation of Transformers: right answers by task, density by layer, and the time to the first token of a batch.
The lists of ``exact peaks`` come from exact scores (:mod:`studies.stacked_peaks`), others from estimates that are no
part of the package (:mod:`studies.stacked_estimates`): these are not timed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import RESULTS, Case, Parts, Records, device, free, note
from benchmarks.shapes import check_layers
from studies import recall_model
from studies.recall_model import QUESTIONS, TASKS
from studies.recall_tasks import Batch, evaluation
from studies.stacked_board import GEOMETRY, Board, Layers
from studies.stacked_estimates import ESTIMATES
from tmx_compile import TriangleMixConfig
from tmx_compile.bench.timing import interleaved
from tmx_compile.integrations.transformers import register_attention
from tmx_compile.mask.selection import Selection

SEED = 20261128
TRIANGLE = (3, 4, 5)
# Method, tokens of a group, block.
WAYS = (("sampled", 16, 64), ("pooled", 16, 64), ("sampled", 32, 128))
FULL: dict[str, Any] = {
    "lengths": [8192],
    "sequences": 16,
    "ways": WAYS,
    "shares": [0.9, 0.95, 0.98],
    "lists": ["exact peaks", *ESTIMATES],
    "list_shares": [0.6, 0.8, 0.9],
    "dynamic": [[0, 1, 2], [0, 2], [0]],
    "tasks": list(TASKS),
    "dtype": "bfloat16",
    "rounds": [2.0, 5, 20],
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [1024],
    "sequences": 1,
    "ways": WAYS[:1],
    "shares": [0.9],
    "list_shares": [0.8],
    "dynamic": [[0, 1, 2]],
    "dtype": "float32",
    "rounds": [0.0, 1, 1],
}


def names(quick: bool) -> list[str]:
    plan = QUICK if quick else FULL
    return [f"{n}/{form}" for n in plan["lengths"] for form in ("timed", "lists")]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        "model": f"a Llama of 6 layers trained on the tasks, {recall_model.RECORD}",
        "geometry": list(GEOMETRY),
        "questions": QUESTIONS,
        "seed": SEED,
        "accuracy": "the share of answers that are the most likely token, the same sequences for every choice",
        "density": "blocks that each dynamic layer visited over those of dense causal attention, mean over the tasks",
        "density_outside": "the same of the layers that are no triangle layers, dense ones counting 1",
        "ms": "time to the logits of the last positions, all sequences in one batch, calls in turn with the others",
    }


def measure(part: str, quick: bool) -> Records:
    plan = QUICK if quick else FULL
    length, form = part.split("/")
    tasks = _tasks(int(length), plan)
    return (_timed if form == "timed" else _by_lists)(int(length), tasks, plan)


def _tasks(tokens: int, plan: dict[str, Any]) -> dict[str, Batch]:
    found = {}
    for name in plan["tasks"]:
        generator = torch.Generator(device()).manual_seed(SEED + 10 * tokens + TASKS[name])
        found[name] = evaluation(plan["sequences"], tokens, QUESTIONS, TASKS[name], generator)
    return found


def keep_of(batch: Batch) -> int:
    """Last positions from the first that is asked."""
    return batch.ids.shape[1] - int((batch.targets >= 0).any(0).nonzero()[0])


def right_answers(batch: Batch, logits: torch.Tensor) -> float:
    targets = batch.targets[:, -logits.shape[1] :]
    asked = targets >= 0
    return float((logits.argmax(-1) == targets)[asked].float().mean())


def _timed(tokens: int, tasks: dict[str, Batch], plan: dict[str, Any]) -> Records:
    """Dense, triangle, and every choice of dynamic layers."""
    model: Any = recall(plan["dtype"])
    records: Records = []
    runs: dict[str, Callable[[], Any]] = {}
    first = tasks[plan["tasks"][0]]
    for name, config in _configs(plan).items():
        attention = None
        if config is not None:
            attention = register_attention(config, name=f"study_{name}", strict=True)
        which = "sdpa" if attention is None else attention.name
        accuracy, density = {}, []
        for task, batch in tasks.items():
            accuracy[task] = right_answers(batch, logits_by(model, which, batch))
            if attention is not None:
                found = {x.layer: attention.report.density(x) for x in attention.report if x.decision == "dynamic"}
                density.append(found)
        if attention is not None and config is not None:
            check_layers(attention, list(config.triangle_layer_indices or ()))
            check_layers(attention, list(config.dynamic_layer_indices or ()), "dynamic")
        records.append(_record(tokens, plan, name, config, accuracy, density))
        note(f"stacked_recall: {records[-1]}")
        runs[name] = functools.partial(logits_by, model, which, first)
        free()
    budget, least, most = plan["rounds"]
    times = interleaved(runs, budget_s=budget, least=least, most=most)
    for record in records:
        record |= {"ms": times[record["variant"]].median, "ms_min": times[record["variant"]].min}
        note(f"stacked_recall: {tokens}, {record['variant']}: {record['ms']:.2f} ms")
    return records


def _configs(plan: dict[str, Any]) -> dict[str, TriangleMixConfig | None]:
    """By name; None is dense."""
    found: dict[str, TriangleMixConfig | None] = {"dense": None}
    words: dict[str, Any] = {"triangle_layer_indices": TRIANGLE, "min_seq_len": 512}
    found["triangle"] = TriangleMixConfig(*GEOMETRY, **words)
    for layers in plan["dynamic"]:
        for method, group, block in plan["ways"]:
            for share in plan["shares"]:
                how = {"dynamic_method": method, "dynamic_group": group, "dynamic_block": block}
                name = f"{'-'.join(map(str, layers))} {method} {group} {block} {share}"
                found[name] = TriangleMixConfig(
                    *GEOMETRY, dynamic_layer_indices=layers, dynamic_share=share, **how, **words
                )
    return found


def _record(
    tokens: int,
    plan: dict[str, Any],
    name: str,
    config: TriangleMixConfig | None,
    accuracy: dict[str, float],
    density: list[dict[int, float]],
) -> dict[str, Any]:
    dynamic = [] if config is None else list(config.dynamic_layer_indices or ())
    each = {layer: statistics.fmean(found[layer] for found in density) for layer in dynamic}
    others = 6 - len(TRIANGLE) if config is not None else 6
    return {
        "variant": name,
        "n": tokens,
        "model": "recall",
        "sequences": plan["sequences"],
        "triangle_layers": [] if config is None else list(TRIANGLE),
        "dynamic_layers": dynamic,
        "share": config.dynamic_share if config is not None and dynamic else None,
        "density": statistics.fmean(each.values()) if each else None,
        "density_by_layer": list(each.values()),
        "density_outside": 1 - sum(1 - x for x in each.values()) / others,
        "accuracy": accuracy,
    }


def _by_lists(tokens: int, tasks: dict[str, Batch], plan: dict[str, Any]) -> Records:
    """Lists from exact scores and from estimates, one sequence at a time."""
    board = Board(recall(plan["dtype"]), "study_stacked_recall")
    records: Records = []
    layers = plan["dynamic"][0]
    for name in plan["lists"]:
        for share in plan["list_shares"]:
            which = {"peaks": True} if name == "exact peaks" else {"estimate": name}
            way = Layers(TRIANGLE, tuple(layers), Selection("pooled", share, 64, 16, *GEOMETRY[::2]), **which)
            accuracy, density = {}, []
            for task, batch in tasks.items():
                right = []
                for place in range(plan["sequences"]):
                    one = Batch(*(x[place : place + 1] for x in (batch.ids, batch.targets, batch.kind)))
                    logits, visited = board.logits(one.ids, keep_of(one), way)
                    right.append(right_answers(one, logits))
                    density.append(dict.fromkeys(layers, visited))
                accuracy[task] = statistics.fmean(right)
            each = statistics.fmean(next(iter(x.values())) for x in density)
            records.append(
                {
                    "variant": f"{'-'.join(map(str, layers))} {name} 64 {share}",
                    "n": tokens,
                    "model": "recall",
                    "sequences": plan["sequences"],
                    "triangle_layers": list(TRIANGLE),
                    "dynamic_layers": list(layers),
                    "share": share,
                    "density": each,
                    "density_outside": 1 - (1 - each) * len(layers) / 3,
                    "accuracy": accuracy,
                    "ms": None,
                }
            )
            note(f"stacked_recall: {records[-1]}")
    return records


def logits_by(model: Any, attention: str, batch: Batch) -> torch.Tensor:
    model.set_attn_implementation(attention)
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=batch.ids, use_cache=False, logits_to_keep=keep_of(batch)).logits
    return out


@functools.lru_cache(maxsize=1)
def recall(dtype: str) -> Any:
    return recall_model.load(RESULTS / "recall").to(device(), getattr(torch, dtype)).eval()


def finish(records: Records) -> None:
    """Each over the dense one of its length."""
    dense = {x["n"]: x["ms"] for x in records if x["variant"] == "dense"}
    for record in records:
        before = record["dense_ms"] = dense.get(record["n"])
        record["of_dense"] = None if before is None or record["ms"] is None else record["ms"] / before


COLUMNS = ("n", "variant", "density_outside", "accuracy", "ms", "dense_ms", "of_dense")
CASE = Case(
    "stacked_recall", "stacked_recall.json", None, COLUMNS, Parts(names, settings, measure, finish), needs_cuda=True
)
