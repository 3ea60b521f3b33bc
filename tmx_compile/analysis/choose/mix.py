"""What each layer is to do: dense, triangle or dynamic, as the divergence that it costs alone buys most time.

Every layer has a few options, each with a cost and a saving. Of those the convex hull is kept: a further step never
costs less for what it saves than the one before. All steps of all layers, from the cheapest for its saving, are one
chain of mixes, each the greedy answer to some budget (the multiple-choice knapsack problem by its linear relaxation;
Sinha and Zoltners 1979). Costs of single layers only propose: what a mix costs as a whole is measured by ``evaluate``,
and ``advise`` chooses among those.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tmx_compile.analysis.choose.direct import ShareScores
from tmx_compile.analysis.judge.choice import Choice, DynamicLayers
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.dynamic import ONLY_GROUP
from tmx_compile.lowering.fa4_lists import kernel_of
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.intervals import pair_counts
from tmx_compile.mask.selection import (
    Selection,
    checked_block,
    checked_group,
    checked_method,
    checked_share,
    usual_group,
)


@dataclass(frozen=True)
class Scores:
    """What each layer costs alone, as a calibration by "direct" measured it.

    Attributes:
        geometry: of triangle layers; its sinks and last rows are also those of dynamic ones.
        triangle: by layer, the divergence (nats) as a triangle layer.
        dynamic: by share, that of dynamic layers, and their densities.
        method: how these choose.
        block: side of their blocks (tokens).
        group: tokens that the estimate takes together; None: as in a configuration.

    >>> from tmx_compile.analysis import Scores
    >>> from tmx_compile.mask import Geometry
    >>> scores = Scores(Geometry(8, 512, 128), triangle={0: 0.3, 1: 0.01})  # what mixes() chooses by
    >>> min(scores.triangle, key=scores.triangle.get)
    1
    """

    geometry: Geometry
    triangle: Mapping[int, float]
    dynamic: tuple[ShareScores, ...] = ()
    method: str = Selection.method
    block: int = Selection.block
    group: int | None = None

    def __post_init__(self) -> None:
        if self.group is None:
            object.__setattr__(self, "group", usual_group(self.method, self.block))


@dataclass(frozen=True)
class _Option:
    """One thing that a layer can do: its cost (nats), what it saves (of the time of dense attention), and its share."""

    cost: float
    saved: float
    share: float | None = None


def mixes(
    scores: Mapping[str, Scores],
    *,
    num_layers: int,
    counts: Sequence[int],
    tokens: int,
    streaming: bool = False,
    times: DynamicTimes | None = None,
) -> dict[str, Choice]:
    """Mixes of triangle, dynamic and dense layers worth evaluating: for each of ``scores`` with shares, and each count.

    A triangle layer is taken to save the share of pairs that it leaves out; a dynamic one what its density saves by
    ``times``, of the nearest length that these have. Every layer counts alike.

    Args:
        scores: by name, one geometry each; :func:`read_scores`. Those without dynamic layers are left out.
        num_layers: layers of the model.
        counts: how many layers are not dense.
        tokens: the prompt length to be fast at.
        streaming: each mix with streaming decode too.
        times: of dynamic layers; None: those that this project measured.

    Returns:
        By name, such as "mine/8-512-128/mix/6"; fewer than asked for where fewer layers save anything.

    Raises:
        ValueError: no count; a layer that the model lacks.

    Layer 2 costs least as a triangle layer, layer 1 with blocks chosen, and layer 0 is dense:

    >>> from tmx_compile.analysis import Scores, ShareScores, mixes
    >>> from tmx_compile.mask import Geometry
    >>> dynamic = ShareScores(0.9, {0: 0.5, 1: 0.001, 2: 0.02}, {0: 0.3, 1: 0.2, 2: 0.3})
    >>> scores = {"mine": Scores(Geometry(8, 512, 128), {0: 0.4, 1: 0.3, 2: 0.0}, (dynamic,))}
    >>> found = mixes(scores, num_layers=3, counts=[2], tokens=32768)["mine/8-512-128/mix/2"]
    >>> found.layers, found.dynamic.layers, found.dynamic.shares
    ((2,), (1,), (0.9,))
    """
    num_layers, tokens = as_count("num_layers", num_layers, minimum=1), as_count("tokens", tokens, minimum=1)
    if not counts:
        raise ValueError("counts must not be empty")
    wanted = [as_count("counts", count, minimum=1) for count in counts]
    times = times or DynamicTimes.measured()
    found: dict[Choice, str] = {}
    for label, given in scores.items():
        reached: set[int] = set()
        for ways in _chain(given, tokens, times) if given.dynamic else ():
            choice, count = _choice(given, ways), len(ways)
            choice.config().check_layers(num_layers)
            if count in reached:
                # A step within a layer: the mix is of another budget, and of a count that is there.
                continue
            reached.add(count)
            name = f"{label}/{given.geometry.slug}/mix/{count}"
            if count in wanted:
                found.setdefault(choice, name)
                if streaming and choice.layers:
                    found.setdefault(Choice.of(choice.config(), streaming=True), f"{name}/streaming")
    return {name: choice for choice, name in found.items()}


def _choice(scores: Scores, ways: Mapping[int, _Option]) -> Choice:
    triangle = tuple(sorted(layer for layer, option in ways.items() if option.share is None))
    shares = {layer: x.share for layer, x in sorted(ways.items()) if x.share is not None}
    dynamic = DynamicLayers(tuple(shares), tuple(shares.values()), scores.method, scores.block, scores.group)
    return Choice(scores.geometry, triangle, dynamic=dynamic if shares else DynamicLayers())


def _chain(scores: Scores, tokens: int, times: DynamicTimes) -> Iterator[dict[int, _Option]]:
    """The mixes, each with one step more than the one before: what every layer does that is not dense."""
    steps = []
    for layer, options in _options(scores, tokens, times).items():
        for before, option in itertools.pairwise(_hull(options)):
            price = (option.cost - before.cost) / (option.saved - before.saved)
            # Of those that tie the one that saves most, then from the deep end. Within a layer no two tie.
            steps.append((price, before.saved - option.saved, -layer, layer, option))
    ways: dict[int, _Option] = {}
    for *_, layer, option in sorted(steps, key=lambda step: step[:3]):
        ways[layer] = option
        yield dict(ways)


def _options(scores: Scores, tokens: int, times: DynamicTimes) -> dict[int, list[_Option]]:
    attended, causal = pair_counts(scores.geometry, tokens, tokens)
    found = {layer: [_Option(max(cost, 0.0), 1 - attended / causal)] for layer, cost in scores.triangle.items()}
    shortest, longest = times.lengths
    for x in scores.dynamic:
        for layer, cost in x.divergence.items():
            length = min(max(tokens, shortest), longest)
            way = scores.method, scores.group, scores.block
            time = times.of_dense(length, *way, x.density[layer], kernel_of(scores.block))
            # Without a price, what is left out.
            saved = 1 - (x.density[layer] if time is None else time)
            found.setdefault(layer, []).append(_Option(max(cost, 0.0), saved, x.share))
    return found


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """Dense, then the options on the lower convex hull of cost over saving, by saving."""
    hull = [_Option(0.0, 0.0)]
    for option in sorted(options, key=lambda x: (x.saved, -x.cost)):
        if option.saved <= 0:
            continue
        while len(hull) > 1 and (
            hull[-1].saved >= option.saved
            or (hull[-1].cost - hull[-2].cost) * (option.saved - hull[-1].saved)
            >= (option.cost - hull[-1].cost) * (hull[-1].saved - hull[-2].saved)
        ):
            hull.pop()
        hull.append(option)
    return hull


def read_scores(path: str | os.PathLike[str], *, num_layers: int, model: nn.Module | None = None) -> Scores | None:
    """The costs of single layers in a calibration's profile; None where it has none of dynamic layers.

    Args:
        path: the file that ``Calibration.to_profile`` wrote.
        num_layers: layers of the model.
        model: the model; None: whether the profile is for it cannot be told.

    Raises:
        ValueError: what :meth:`tmx_compile.TriangleMixConfig.from_profile` refuses; scores that are none.
        OSError: the file cannot be read.

    >>> import tempfile
    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, calibrate
    >>> from tmx_compile.analysis import read_scores
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> batches = [torch.randint(0, 50, (1, 60)) for _ in range(2)]
    >>> how = {"config": TriangleMixConfig(2, 6, 5, dynamic_block=16), "estimator": "direct", "shares": [0.5]}
    >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
    ...     calibrate(model, batches, progress=False, **how).to_profile(file.name, n=1)
    ...     scores = read_scores(file.name, num_layers=3, model=model)
    >>> scores.block, sorted(scores.triangle), [x.share for x in scores.dynamic]
    (16, [1, 2], [0.5])
    """
    config = TriangleMixConfig.from_profile(path, num_layers=num_layers, model=model)
    content = json.loads(Path(path).read_bytes()).get("calibration", {})
    if "dynamic" not in content:
        return None
    try:
        section = content["dynamic"]
        shares = tuple(
            ShareScores(checked_share("share", x["share"]), _layers(x["divergence"]), _layers(x["density"]))
            for x in section["shares"]
        )
        if any(x.divergence.keys() != x.density.keys() for x in shares):
            raise ValueError("divergence and density must be of the same layers")
        method, block = checked_method("method", section["method"]), checked_block("block", section["block"])
        group = checked_group("group", section.get("group", ONLY_GROUP), block)
        return Scores(config.geometry, _layers(content["scores"]["divergence"]), shares, method, block, group)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"cannot use profile {os.fspath(path)}: calibration of dynamic layers: {why}") from error


def _layers(values: Mapping[str, float]) -> dict[int, float]:
    return {int(layer): float(value) for layer, value in values.items()}
