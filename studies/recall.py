"""What sparse layers cost a model that recalls nearly perfectly: accuracy by task, layers, geometry and length.

The model is the one that ``recall_model.py`` trained, the tasks are those of ``recall_tasks.py``. All questions stand
in the last rows of the prompt, which attend to everything: what is lost was lost in the rows of the middle.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch

from benchmarks.common import RESULTS, Case, Parts, Records, note
from studies import recall_model
from studies.recall_model import QUESTIONS, TASKS
from studies.recall_tasks import COPY, HOPS, LISTED, Batch, evaluation
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import CapturedModel, Inputs, Sample
from tmx_compile.analysis.judge.language_model import call_arguments
from tmx_compile.mask.geometry import Geometry

FOLDER = RESULTS / "recall"
SEED = 20261122
FULL: dict[str, Any] = {
    "lengths": [1024, 2048, 4096, 8192],
    "geometries": [[4, 32, 64], [8, 64, 128], [8, 512, 128]],
    "policies": ["gradient", "direct", "deepest", "first", "random0", "random1", "random2"],
    "sequences": 32,
    "batch": 8,
    "calibration_sequences": 32,
}
QUICK: dict[str, Any] = FULL | {
    "lengths": [512],
    "geometries": [[4, 16, 64]],
    "policies": ["gradient", "direct", "deepest"],
    "sequences": 2,
    "batch": 2,
    "calibration_sequences": 2,
}


def names(quick: bool) -> list[str]:
    plan = QUICK if quick else FULL
    return [f"{n}/{Geometry(*g).slug}" for n in plan["lengths"] for g in plan["geometries"]]


def settings(quick: bool) -> dict[str, Any]:
    return {
        **(QUICK if quick else FULL),
        "model": f"a Llama trained on the tasks, {recall_model.RECORD}; bfloat16"
        if not quick
        else "untrained, float32: shows that the steps work",
        "questions": QUESTIONS,
        "listed": LISTED,
        "seed": SEED,
        "accuracy": "the share of answers that are the most likely token, dense and sparse on the same sequences",
        "policies_by": "gradient and direct: calibrate() at the same length and geometry, on other sequences; random: "
        "by seed",
    }


def measure(name: str, quick: bool) -> Records:
    length, slug = name.split("/")
    return _lab(quick).evaluate(int(length), Geometry(*map(int, slug.split("-"))))


@functools.lru_cache(maxsize=1)
def _lab(quick: bool) -> Lab:
    plan = QUICK if quick else FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = recall_model.build(recall_model.QUICK_SHAPE).eval() if quick else recall_model.load(FOLDER)
    return Lab(plan, model.to(device), device)


class Lab:
    """The model, captured once."""

    def __init__(self, plan: dict[str, Any], model: Any, device: torch.device) -> None:
        self.plan, self.model, self.device = plan, model, device
        self.depth = model.config.num_hidden_layers
        self.captured = CapturedModel(model, TriangleMixConfig())

    def evaluate(self, tokens: int, geometry: Geometry) -> Records:
        """Every policy, number of layers and task at one length and geometry."""
        self.captured.geometry = geometry
        note(f"recall: ranking layers at {tokens} tokens, {geometry}")
        policies = [policy for policy in self.plan["policies"] if policy in ("gradient", "direct")]
        rankings = {policy: self._ranking(tokens, geometry, policy) for policy in policies}
        sets = {
            (policy, count): self._layers(policy, count, rankings)
            for policy in self.plan["policies"]
            for count in range(1, self.depth + 1)
        }
        # All layers are the same layers for every policy.
        wanted = {("dense", 0): (), **{k: v for k, v in sets.items() if k[1] < self.depth or k[0] == "deepest"}}
        found: dict[tuple[str, int], dict[str, float]] = {key: {} for key in wanted}
        for task, hops in TASKS.items():
            note(f"recall: {task}, {tokens} tokens, {len(wanted)} choices")
            batches = self._batches(tokens, hops)
            right = {layers: self._accuracy(batches, layers) for layers in dict.fromkeys(wanted.values())}
            for key, layers in wanted.items():
                found[key][task] = right[layers]
        return [
            {
                "tokens": tokens,
                "geometry": list(geometry.counts),
                "policy": policy,
                "count": count,
                "indices": list(wanted[policy, count]),
                "accuracy": accuracy,
                "dense": found["dense", 0],
            }
            for (policy, count), accuracy in found.items()
        ]

    def _layers(self, policy: str, count: int, rankings: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        if policy in rankings:
            return tuple(sorted(rankings[policy][:count]))
        if policy == "first":
            return tuple(range(count))
        if policy == "deepest":
            return tuple(range(self.depth - count, self.depth))
        return tuple(sorted(random.Random(f"{policy}/{count}").sample(range(self.depth), count)))

    def _batches(self, tokens: int, hops: int) -> list[Batch]:
        size, count = self.plan["batch"], self.plan["sequences"]
        generator = torch.Generator(self.device).manual_seed(SEED + 10 * tokens + hops)
        return [evaluation(size, tokens, QUESTIONS, hops, generator) for _ in range(count // size)]

    def _accuracy(self, batches: list[Batch], layers: tuple[int, ...]) -> float:
        right = []
        for batch in batches:
            asked = batch.targets >= 0
            # Questions and lists stand at the end.
            keep = batch.ids.shape[1] - int(asked.any(0).nonzero()[0])
            inputs = Inputs(kwargs={"input_ids": batch.ids, **call_arguments(self.model, keep)})
            with torch.no_grad():
                likely = self.captured.run(inputs, layers).logits.argmax(-1)
            right.append((likely == batch.targets[:, -keep:])[asked[:, -keep:]])
        return float(torch.cat(right).float().mean())

    def _ranking(self, tokens: int, geometry: Geometry, estimator: str) -> tuple[int, ...]:
        """Layers by the gradient or by the divergence at a last question, all tasks in turn.

        There alone: the model was never trained on what follows other tokens.
        """
        extra = call_arguments(self.model, 1)
        samples = []
        for i in range(self.plan["calibration_sequences"]):
            generator = torch.Generator(self.device).manual_seed(SEED - 1 - i)
            batch = evaluation(1, tokens, QUESTIONS, i % HOPS if i % (HOPS + 1) < HOPS else COPY, generator)
            end = int((batch.targets[0] >= 0).nonzero()[-1])
            inputs = {"input_ids": batch.ids[:, : end + 1].clone(), **extra}
            samples.append(Sample(Inputs(kwargs=inputs), batch.targets[0, end : end + 1].clone()))
        greedy = {} if estimator == "gradient" else {"greedy": self.depth - 1, "positions": 1}
        config = TriangleMixConfig(*geometry.counts)
        found = calibrate(self.model, samples, config=config, estimator=estimator, progress=False, **greedy)
        return tuple(found.ranking)


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("part", "policy", "count", "accuracy", "dense")
CASE = Case("recall", "recall.json", None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
