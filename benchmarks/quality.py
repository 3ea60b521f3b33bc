"""What sparse layers cost in quality: SmolLM2-135M, dense against triangle, by layers, geometry, length and task.

``python -m benchmarks.run quality`` measures cells (length / geometry / policy / number of layers) one by one, each
into the result file as soon as it is known; ``--only 'prompt-2048/*'``, ``--missing`` and ``--minutes`` choose a piece.
The first cells to run are the rankings, which calibrate the model for each geometry.

The model runs as calibration captures it (``tmx_compile.analysis.CapturedModel``): nothing is compiled per cell.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, Case, Parts, Records, note
from benchmarks.models import smollm2
from benchmarks.quality_tasks import CUE, DIGITS, FOLLOWING, LISTED, Item, continuations, copies, digest, needles
from benchmarks.texts import CALIBRATION, EVALUATION, token_stream
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import CapturedModel, Inputs, Sample

Geometry = tuple[int, int, int]

PROFILES = RESULTS / "profiles"
FINAL = 64
"""Last positions of a prompt that are compared beside what follows it."""
FULL: dict[str, Any] = {
    "layers": 30,
    "prompts": [2048, 4096, 7680],
    "geometries": [[4, 32, 64], [8, 64, 128], [8, 512, 128]],
    "counts": [5, 9, 15, 21],
    # At one number of deepest layers: what sinks, window and last rows each buy.
    "ablations": [[0, 64, 128], [8, 0, 128], [8, 64, 0], [8, 64, 16], [8, 256, 128], [64, 64, 128]],
    "ablation_count": 15,
    "texts": 12,
    "needles": 10,
    "copies": 8,
    "following": FOLLOWING,
    "calibration": {"tokens": 2048, "gradient": 16, "direct": 4},
}
QUICK: dict[str, Any] = {
    "layers": 3,
    "prompts": [256],
    "geometries": [[4, 16, 64]],
    "counts": [1, 2],
    "ablations": [[4, 16, 0]],
    "ablation_count": 2,
    "texts": 2,
    "needles": 2,
    "copies": 2,
    "following": 16,
    "calibration": {"tokens": 192, "gradient": 2, "direct": 1},
}
DRAWS = 3
POLICIES = ("gradient", "direct", "first", "deepest", *(f"random{i}" for i in range(DRAWS)))


def _plan(quick: bool) -> dict[str, Any]:
    return QUICK if quick else FULL


def _slug(geometry: Sequence[int]) -> str:
    return "-".join(map(str, geometry))


def names(quick: bool) -> list[str]:
    plan = _plan(quick)
    found = [f"ranking/{_slug(g)}/{kind}" for g in plan["geometries"] for kind in ("gradient", "direct")]
    for prompt in plan["prompts"]:
        found.append(f"prompt-{prompt}/dense")
        for geometry in plan["geometries"]:
            cell = f"prompt-{prompt}/{_slug(geometry)}"
            found += [f"{cell}/{policy}/{count}" for count in plan["counts"] for policy in POLICIES]
            found.append(f"{cell}/all/{plan['layers']}")
        found += [f"prompt-{prompt}/{_slug(g)}/deepest/{plan['ablation_count']}" for g in plan["ablations"]]
    return found


def settings(quick: bool) -> dict[str, Any]:
    return {
        **_plan(quick),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "model": "SmolLM2-135M-Instruct (4-bit weights, computed in bfloat16)",
        "final": FINAL,
        "policies": "gradient and direct: calibrated for the geometry at other text; random: three draws by seed",
        "text": "pydoc_data.topics, chapters kept for evaluation; it goes on for 'following' tokens after the prompt",
        "needle": f"a number of {DIGITS} digits stated once; right where every one of its tokens is the most likely",
        "copy": f"{LISTED} random tokens, repeated from the {CUE} first; the share of the others that is most likely",
        "kl": "KL(dense || sparse) of the next-token distributions in nats: 'final' over the prompt's last positions, "
        "'following' over the tokens after it",
        "ppl": "perplexity over dense perplexity less 1, of the same tokens",
        "following": "teacher forcing with dense attention to the whole prompt, as in decoding",
        "interval": "95%, bootstrap over items (2,000 draws), paired with dense",
    }


# One cell.


@dataclass(frozen=True)
class Cell:
    """Where a record stands: the prompt's length, the geometry, the policy and the number of sparse layers."""

    prompt: int
    geometry: Geometry
    policy: str
    count: int

    @classmethod
    def of(cls, name: str) -> Cell:
        prompt, *rest = name.split("/")
        tokens = int(prompt.removeprefix("prompt-"))
        if rest == ["dense"]:
            return cls(tokens, (0, 0, 0), "dense", 0)
        geometry, policy, count = rest
        return cls(tokens, _geometry(geometry), policy, int(count))

    def layers(self, depth: int) -> tuple[int, ...]:
        """The sparse layers."""
        if self.policy in ("dense", "first", "all"):
            return tuple(range(self.count))
        if self.policy == "deepest":
            return tuple(range(depth - self.count, depth))
        if self.policy.startswith("random"):
            draw = random.Random(f"{self.policy}/{self.count}")
            return tuple(sorted(draw.sample(range(depth), self.count)))
        path = profile_path(self.geometry, self.policy, depth)
        if not path.is_file():
            raise RuntimeError(f"{path.name} is missing: run `quality --only 'ranking/*'` first")
        config = TriangleMixConfig.from_profile(path, num_layers=depth, num_triangle_layers=self.count)
        return config.layers()


def _geometry(slug: str) -> Geometry:
    sink, window, last = map(int, slug.split("-"))
    return sink, window, last


def profile_path(geometry: Geometry, estimator: str, depth: int) -> Path:
    """The profile of a geometry; one of fewer layers is for trying out and stays out of the results."""
    folder = PROFILES if depth == FULL["layers"] else PROFILES / "quick"
    return folder / f"smollm2-135m-{_slug(geometry)}-{estimator}.json"


def measure(name: str, quick: bool) -> Records:
    lab = _lab(quick)
    if name.startswith("ranking/"):
        _, geometry, estimator = name.split("/")
        return [lab.rank(_geometry(geometry), estimator)]
    cell = Cell.of(name)
    return [lab.evaluate(cell)]


@functools.lru_cache(maxsize=1)
def _lab(quick: bool) -> Lab:
    return Lab(_plan(quick))


@dataclass(frozen=True)
class Outcome:
    """What the model says about one item; log-probabilities (positions, V) of the final and the following tokens."""

    final: Tensor
    following: Tensor
    nll_final: float
    nll_following: float
    right: float
    all_right: bool


class Lab:
    """The model, captured once, the items of one prompt length and what dense attention says about them."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, self.tokenizer = smollm2()
        model.model.layers = model.model.layers[: plan["layers"]]
        model.config.num_hidden_layers = plan["layers"]
        self.model = model.to(self.device, torch.bfloat16)
        self.captured = CapturedModel(self.model, TriangleMixConfig())
        self.text = token_stream(self.tokenizer, EVALUATION)

    def rank(self, geometry: Geometry, estimator: str) -> dict[str, Any]:
        """Calibrate for a geometry, and leave the profile where :class:`Cell` finds it."""
        how = self.plan["calibration"]
        tokens, depth = how["tokens"], self.plan["layers"]
        stream = token_stream(self.tokenizer, CALIBRATION)
        keep = 1 if estimator == "gradient" else min(FINAL, geometry[2])
        samples = []
        for i in range(how[estimator]):
            piece = stream[i * (tokens + 1) : (i + 1) * (tokens + 1)].to(self.device)
            inputs = {"input_ids": piece[None, :-1].clone(), "use_cache": False, "logits_to_keep": keep}
            samples.append(Sample(Inputs(kwargs=inputs), piece[-1:].clone()))
        greedy = {} if estimator == "gradient" else {"greedy": max(self.plan["counts"])}
        config = TriangleMixConfig(*geometry)
        found = calibrate(self.model, samples, config=config, estimator=estimator, progress=False, **greedy)
        path = profile_path(geometry, estimator, depth)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.to_profile(path, depth // 2)
        return {"geometry": list(geometry), "policy": estimator, "ranking": list(found.ranking)}

    def evaluate(self, cell: Cell) -> dict[str, Any]:
        """All tasks with the layers of a cell sparse, against dense."""
        layers = cell.layers(self.plan["layers"])
        items, dense = self._dense(cell.prompt)
        record: dict[str, Any] = {
            "prompt": cell.prompt,
            "geometry": list(cell.geometry),
            "policy": cell.policy,
            "count": cell.count,
            "indices": list(layers),
            "items": digest(items),
        }
        # Each outcome is dropped as soon as it is compared: a distribution per position is large.
        found = [
            _compared(base, self._run(item, cell.geometry, layers)) for item, base in zip(items, dense, strict=True)
        ]
        for task in ("text", "needle", "copy"):
            record |= _summary(task, [x for item, x in zip(items, found, strict=True) if item.task == task])
        return record

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _dense(self, prompt: int) -> tuple[list[Item], list[Outcome]]:
        plan = self.plan
        items = [
            *continuations(self.text, prompt, plan["texts"], plan["following"]),
            *needles(self.tokenizer, self.text, prompt, plan["needles"]),
            *copies(self.text, prompt, plan["copies"], self.model.config.vocab_size),
        ]
        note(f"quality: dense, {prompt} tokens, {len(items)} items")
        return items, [self._run(item, (0, 0, 0), ()) for item in items]

    def _run(self, item: Item, geometry: Geometry, layers: Sequence[int]) -> Outcome:
        sink, window, last = geometry
        following = item.following
        # The tokens after the prompt are rows that attend to everything.
        self.captured.geometry = (sink, window, last + following)
        keep = FINAL + following + 1
        inputs = Inputs(kwargs={"input_ids": item.ids.to(self.device), "use_cache": False, "logits_to_keep": keep})
        with torch.no_grad():
            logits = self.captured.run(inputs, layers).logits[0, :-1].float()
            log_probs = logits.log_softmax(-1)
            targets = item.ids[0, -FINAL - following :].to(self.device)
            nll = -log_probs.gather(1, targets[:, None])[:, 0]
            right = log_probs.argmax(-1)[-following:] == targets[-following:]
        return Outcome(
            log_probs[:FINAL],
            log_probs[FINAL:],
            float(nll[:FINAL].mean()),
            float(nll[FINAL:].mean()),
            float(right.float().mean()),
            bool(right.all()),
        )


@dataclass(frozen=True)
class Compared:
    """One item, dense and sparse."""

    dense: Outcome
    sparse: tuple[float, float, float, bool]
    kl_final: float
    kl_following: float


def _compared(dense: Outcome, sparse: Outcome) -> Compared:
    values = (sparse.nll_final, sparse.nll_following, sparse.right, sparse.all_right)
    return Compared(dense, values, _kl(dense.final, sparse.final), _kl(dense.following, sparse.following))


def _kl(dense: Tensor, sparse: Tensor) -> float:
    return float((dense.exp() * (dense - sparse)).sum(-1).mean())


def _summary(task: str, found: list[Compared]) -> dict[str, Any]:
    """The figures of one task, each as [mean, lower, upper]."""
    if task == "needle":
        return {
            "needle": _interval([float(x.sparse[3]) for x in found]),
            "needle_dense": statistics.fmean(float(x.dense.all_right) for x in found),
            "needle_nll": _interval([x.sparse[1] - x.dense.nll_following for x in found]),
        }
    if task == "copy":
        return {
            "copy": _interval([x.sparse[2] for x in found]),
            "copy_dense": statistics.fmean(x.dense.right for x in found),
            "copy_nll": _interval([x.sparse[1] - x.dense.nll_following for x in found]),
        }
    return {
        "nll_dense_final": statistics.fmean(x.dense.nll_final for x in found),
        "nll_dense_following": statistics.fmean(x.dense.nll_following for x in found),
        "kl_final": _interval([x.kl_final for x in found]),
        "kl_following": _interval([x.kl_following for x in found]),
        "ppl_final": _interval([x.sparse[0] - x.dense.nll_final for x in found], exponent=True),
        "ppl_following": _interval([x.sparse[1] - x.dense.nll_following for x in found], exponent=True),
    }


def _interval(values: Sequence[float], *, exponent: bool = False, draws: int = 2000) -> list[float]:
    """The mean with its 95% bootstrap interval; of differences of logs, as a ratio less 1."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(draws))
    found = [statistics.fmean(values), means[int(0.025 * draws)], means[int(0.975 * draws) - 1]]
    return [math.expm1(value) for value in found] if exponent else found


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("part", "kl_final", "ppl_final", "ppl_following", "needle", "copy")


def _file() -> str:
    return "quality_cuda.json" if torch.cuda.is_available() else "quality.json"


CASE = Case("quality", _file, None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
