"""What sparse layers cost in quality: SmolLM2-135M, dense against triangle, by layers, geometry, length and task.

``python -m studies.run quality`` measures part by part, each into the result file as soon as it is known; ``--only
'prompt-2048/*'``, ``--missing`` and ``--minutes`` choose a piece. The rankings come first: they calibrate the model for
each geometry. Then, for every prompt length and geometry, ``ranked`` holds the policies that begin deep, with dense and
with streaming decode, and ``contrast`` those that do not; ``ablations`` changes one count of the geometry at a time,
and ``turns`` takes the end of the prompt as a new turn of a conversation.

The model runs as calibration captures it (``tmx_compile.analysis.judge.compare``): nothing is compiled per cell, and
only the layers from the first sparse one on run again.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Case, Parts, Records, device, note
from benchmarks.models import smollm2
from benchmarks.texts import EVALUATION, token_stream
from studies.quality_tasks import CUE, DIGITS, FOLLOWING, LISTED, Item, continuations, copies, digest, needles
from studies.texts import CALIBRATION
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import CapturedModel, Change, Choice, Continued, compare
from tmx_compile.analysis.judge.intervals import interval
from tmx_compile.analysis.judge.language_model import call_arguments, sample_at
from tmx_compile.mask.geometry import Geometry

PROFILES = RESULTS / "profiles"
FINAL = 64
"""Last positions of a prompt that are compared beside what follows it."""
# A CPU has time for few items.
ITEMS = {"cpu": {"texts": 8, "needles": 6, "copies": 4}, "cuda": {"texts": 20, "needles": 20, "copies": 12}}
_DIRECT = {"cpu": 2, "cuda": 8}
_GEOMETRIES = [[4, 32, 64], [8, 64, 128], [8, 512, 128]]
_DIRECT_FOR = {"cpu": [[8, 64, 128]], "cuda": _GEOMETRIES}
FULL: dict[str, Any] = {
    "layers": 30,
    "prompts": [2048, 4096, 7680],
    "geometries": _GEOMETRIES,
    "counts": [3, 5, 9, 15, 21],
    "contrast_counts": [9, 15],
    "streaming_counts": [3, 9, 15],
    # At one number of deepest layers: what sinks, window and last rows each buy.
    "ablations": [[8, 64, 128], [0, 64, 128], [8, 0, 128], [8, 64, 0], [8, 64, 16], [8, 256, 128], [64, 64, 128]],
    "ablation_count": 15,
    # Deepest layers, and how long the new turn of a conversation is.
    "turn_geometries": [[8, 64, 128], [8, 512, 128]],
    "turn_counts": [9, 15],
    "turns": [256, 1024],
    "following": FOLLOWING,
    "calibration": {"tokens": 2048, "gradient": 16, "greedy": 15},
}
QUICK: dict[str, Any] = {
    "layers": 3,
    "prompts": [256],
    "geometries": [[4, 16, 64]],
    "direct_for": [[4, 16, 64]],
    "counts": [1, 2],
    "contrast_counts": [2],
    "streaming_counts": [1],
    "ablations": [[4, 16, 0]],
    "ablation_count": 2,
    "turn_geometries": [[4, 16, 64]],
    "turn_counts": [2],
    "turns": [96],
    "texts": 2,
    "needles": 2,
    "copies": 2,
    "following": 16,
    "calibration": {"tokens": 192, "gradient": 2, "direct": 1, "greedy": 2},
}
DRAWS = 3
RANKED = ("gradient", "direct", "deepest")
CONTRAST = ("first", *(f"random{i}" for i in range(DRAWS)))


def plan_of(quick: bool) -> dict[str, Any]:
    if quick:
        return QUICK
    kind = device().type
    calibration = FULL["calibration"] | {"direct": _DIRECT[kind]}
    return FULL | ITEMS[kind] | {"direct_for": _DIRECT_FOR[kind], "calibration": calibration}


def names(quick: bool) -> list[str]:
    plan = plan_of(quick)
    found = [f"ranking/{Geometry(*g).slug}/gradient" for g in plan["geometries"]]
    found += [f"ranking/{Geometry(*g).slug}/direct" for g in plan["direct_for"]]
    for prompt in plan["prompts"]:
        for geometry in plan["geometries"]:
            found += [f"prompt-{prompt}/{Geometry(*geometry).slug}/{group}" for group in ("ranked", "contrast")]
        found += [f"prompt-{prompt}/ablations", f"prompt-{prompt}/turns"]
    return found


def settings(quick: bool) -> dict[str, Any]:
    return {
        **plan_of(quick),
        "device": device().type,
        "model": "SmolLM2-135M-Instruct (4-bit weights, computed in bfloat16)",
        "final": FINAL,
        "policies": "gradient and direct: calibrated for the geometry at other text; random: three draws by seed",
        "text": "pydoc_data.topics, chapters kept for evaluation; it goes on for 'following' tokens after the prompt",
        "needle": f"a number of {DIGITS} digits stated once; right where every one of its tokens is the most likely",
        "copy": f"{LISTED} random tokens, repeated from the {CUE} first; the share of the others that is most likely",
        "kl": "KL(dense || sparse) of the next-token distributions in nats: 'final' over the prompt's last positions, "
        "'following' over the tokens after it",
        "ppl": "perplexity over dense perplexity less 1, of the same tokens",
        "following_by": "teacher forcing; with decode 'dense' the rows after the prompt attend to all of it, with "
        "'streaming' to sinks and window alone in the sparse layers",
        "turns_are": "the prompt's last tokens as a new turn, what comes before as a prompt of its own: with the mask "
        "of the whole conversation ('sparse') or with dense attention in the turn's rows ('dense')",
        "interval": "95%, bootstrap over items (2,000 draws), paired with dense",
    }


# One cell.


@dataclass(frozen=True)
class Cell:
    """The geometry, the policy, the number of sparse layers, how they decode, and what the prompt's last turn is.

    ``turn``: tokens of a new turn, 0 for one prompt; its rows are "sparse" or "dense" in the sparse layers.
    """

    geometry: Geometry
    policy: str
    count: int
    decode: str = "dense"
    turn: int = 0
    rows: str = "sparse"

    def choice(self, depth: int) -> Choice:
        """What is compared with dense attention."""
        common = (self.geometry, self.layers(depth), self.decode == "streaming")
        return Continued(*common, turn=self.turn, dense_turn=self.rows == "dense") if self.turn else Choice(*common)

    def layers(self, depth: int) -> tuple[int, ...]:
        """The sparse layers."""
        if self.policy in ("first", "all"):
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


def cells(plan: dict[str, Any], name: str) -> tuple[int, list[Cell]]:
    """The prompt length of a part, tokens, and its cells."""
    prompt, *rest = name.split("/")
    tokens = int(prompt.removeprefix("prompt-"))
    if rest == ["ablations"]:
        return tokens, [Cell(Geometry(*g), "deepest", plan["ablation_count"]) for g in plan["ablations"]]
    if rest == ["turns"]:
        ways = [(0, "sparse"), *((turn, rows) for turn in plan["turns"] for rows in ("sparse", "dense"))]
        deepest = [(Geometry(*g), "deepest", n) for g in plan["turn_geometries"] for n in plan["turn_counts"]]
        return tokens, [Cell(*common, turn=turn, rows=rows) for common in deepest for turn, rows in ways]
    geometry = _geometry(rest[0])
    if rest[1] == "ranked":
        policies = [policy for policy in RANKED if policy != "direct" or list(geometry.counts) in plan["direct_for"]]
        found = [Cell(geometry, policy, count) for policy in policies for count in plan["counts"]]
        streamed = [(policy, count) for policy in ("gradient", "deepest") for count in plan["streaming_counts"]]
        return tokens, found + [Cell(geometry, *which, "streaming") for which in streamed]
    found = [Cell(geometry, policy, count) for policy in CONTRAST for count in plan["contrast_counts"]]
    return tokens, [*found, Cell(geometry, "all", plan["layers"])]


def _geometry(slug: str) -> Geometry:
    return Geometry(*map(int, slug.split("-")))


def profile_path(geometry: Geometry, estimator: str, depth: int) -> Path:
    """The profile of a geometry; one of fewer layers is for trying out and stays out of the results."""
    folder = PROFILES / "cuda" if device().type == "cuda" else PROFILES
    folder = folder if depth == FULL["layers"] else PROFILES / "quick"
    return folder / f"smollm2-135m-{geometry.slug}-{estimator}.json"


def measure(name: str, quick: bool) -> Records:
    lab = _lab(quick)
    if name.startswith("ranking/"):
        _, geometry, estimator = name.split("/")
        return [lab.rank(_geometry(geometry), estimator)]
    return lab.evaluate(*cells(lab.plan, name))


@functools.lru_cache(maxsize=1)
def _lab(quick: bool) -> Lab:
    return Lab(plan_of(quick))


class Lab:
    """The model, captured once, and the text that it is evaluated on."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.device = device()
        model, self.tokenizer = smollm2(plan["layers"])
        self.model = model.to(self.device, torch.bfloat16)
        self.captured = CapturedModel(self.model, TriangleMixConfig())
        self.text = token_stream(self.tokenizer, EVALUATION)

    def rank(self, geometry: Geometry, estimator: str) -> dict[str, Any]:
        """Calibrate for a geometry, and leave the profile where :class:`Cell` finds it."""
        how = self.plan["calibration"]
        tokens, depth = how["tokens"], self.plan["layers"]
        stream = token_stream(self.tokenizer, CALIBRATION)
        keep = 1 if estimator == "gradient" else min(FINAL, geometry.last)
        extra = call_arguments(self.model, keep)
        samples = [sample_at(stream, i * (tokens + 1), tokens, self.device, extra) for i in range(how[estimator])]
        greedy = {} if estimator == "gradient" else {"greedy": how["greedy"]}
        config = TriangleMixConfig(*geometry.counts)
        found = calibrate(self.model, samples, config=config, estimator=estimator, progress=False, **greedy)
        path = profile_path(geometry, estimator, depth)
        path.parent.mkdir(parents=True, exist_ok=True)
        found.to_profile(path, depth // 2)
        return {"geometry": list(geometry.counts), "policy": estimator, "ranking": list(found.ranking)}

    def evaluate(self, prompt: int, wanted: Sequence[Cell]) -> Records:
        """All tasks at one prompt length, with the layers of each cell sparse, against dense."""
        depth = self.plan["layers"]
        choices = [cell.choice(depth) for cell in wanted]
        # Policies may agree on the layers.
        different = list(dict.fromkeys(choices))
        items = self.items(prompt)
        found: dict[Choice, dict[str, list[Change]]] = {choice: {} for choice in different}
        for number, item in enumerate(items):
            note(f"quality: {prompt} tokens, item {number + 1} of {len(items)} ({item.task}), {len(different)} choices")
            changes = compare(self.captured, item.ids, different, final=FINAL, following=item.following)
            for choice, change in zip(different, changes, strict=True):
                found[choice].setdefault(item.task, []).append(change)
        return [
            {
                "prompt": prompt,
                "geometry": list(cell.geometry.counts),
                "policy": cell.policy,
                "count": cell.count,
                "decode": cell.decode,
                **({"turn": cell.turn, "rows": cell.rows} if any(each.turn for each in wanted) else {}),
                "indices": list(choice.layers),
                "items": digest(items),
                **summary(found[choice]),
            }
            for cell, choice in zip(wanted, choices, strict=True)
        ]

    def items(self, prompt: int) -> list[Item]:
        """The items of one prompt length."""
        plan = self.plan
        return [
            *continuations(self.text, prompt, plan["texts"], plan["following"]),
            *needles(self.tokenizer, self.text, prompt, plan["needles"]),
            *copies(self.text, prompt, plan["copies"], self.model.config.vocab_size),
        ]


def _spread(values: Sequence[float], *, exponent: bool = False) -> list[float]:
    return interval(values, exponent=exponent).as_list()


def summary(tasks: dict[str, list[Change]]) -> dict[str, Any]:
    """The figures of a cell, each as [mean, lower, upper]."""
    text, needle, copy = tasks["text"], tasks["needle"], tasks["copy"]
    return {
        "nll_dense_final": statistics.fmean(x.dense_nll_final for x in text),
        "nll_dense_following": statistics.fmean(x.dense_nll_following for x in text),
        "kl_final": _spread([x.kl_final for x in text]),
        "kl_following": _spread([x.kl_following for x in text]),
        "ppl_final": _spread([x.nll_final - x.dense_nll_final for x in text], exponent=True),
        "ppl_following": _spread([x.nll_following - x.dense_nll_following for x in text], exponent=True),
        "needle": _spread([float(x.right == 1.0) for x in needle]),
        "needle_dense": statistics.fmean(float(x.dense_right == 1.0) for x in needle),
        "needle_nll": _spread([x.nll_following - x.dense_nll_following for x in needle]),
        "copy": _spread([x.right for x in copy]),
        "copy_dense": statistics.fmean(x.dense_right for x in copy),
        "copy_nll": _spread([x.nll_following - x.dense_nll_following for x in copy]),
    }


def finish(records: Records) -> None:
    """Every record stands for itself."""


COLUMNS = ("part", "policy", "count", "decode", "kl_final", "ppl_final", "ppl_following", "needle", "copy")


def _file() -> str:
    return "quality_cuda.json" if torch.cuda.is_available() else "quality.json"


CASE = Case("quality", _file, None, COLUMNS, Parts(names, settings, measure, finish), on_request=True)
