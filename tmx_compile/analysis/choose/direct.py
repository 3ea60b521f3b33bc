"""Layers by what happens: the divergence of the output when they go sparse, one by one and then greedily together.

The estimate is the Kullback-Leibler divergence of the next-token distributions, dense to sparse, averaged over the last
positions of the prompts. It needs a run per candidate, of the layers from the candidate on.

Greedy: to the layers chosen so far comes the one with which the divergence is lowest. Trying all that are left in every
round would take as many runs as there are pairs of layers, so each round tries a few, those that looked cheapest when
they were last tried.

A layer whose blocks are chosen while it runs is judged by the same divergence, alone, at each share of the estimate
that it may keep.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tmx_compile.analysis.capture.capture import CapturedModel, Trace
from tmx_compile.analysis.capture.samples import Sample, final_logits
from tmx_compile.analysis.journal import Journal
from tmx_compile.mask.selection import Selection


@dataclass(frozen=True)
class DirectScores:
    """What was measured.

    Attributes:
        single: the divergence (nats) with one layer sparse, by layer, for each sample.
        greedy: the layers in the order in which they were chosen, each with the divergence of all up to it.
    """

    single: Mapping[int, tuple[float, ...]]
    greedy: tuple[tuple[int, float], ...]

    def ranking(self) -> tuple[int, ...]:
        """All layers from the one needed least: as chosen, then the others by their own divergence."""
        chosen = [layer for layer, _ in self.greedy]
        rest = [layer for layer in self.single if layer not in chosen]
        # Layers that tie are taken from the deep end, as the analyzer does.
        return (*chosen, *sorted(rest, key=lambda layer: (statistics.mean(self.single[layer]), -layer)))


@dataclass(frozen=True)
class ShareScores:
    """Layers one by one, with blocks chosen while they run, at one share.

    Attributes:
        share: of the estimated attention that is kept.
        divergence: by layer, the mean over samples (nats).
        density: by layer, the mean share of blocks that were visited.

    >>> from tmx_compile.analysis import ShareScores
    >>> ShareScores(0.9, divergence={0: 0.03, 1: 0.01, 2: 0.0}, density={0: 0.4, 1: 0.5, 2: 1.0}).ranking
    (1, 0, 2)
    """

    share: float
    divergence: Mapping[int, float]
    density: Mapping[int, float]

    @property
    def ranking(self) -> tuple[int, ...]:
        """The layers from the one that gives its blocks away most cheaply: by divergence for the blocks left out."""

        def price(layer: int) -> float:
            left_out = 1 - self.density[layer]
            return max(self.divergence[layer], 0.0) / left_out if left_out > 0 else math.inf

        return tuple(sorted(self.divergence, key=lambda layer: (price(layer), -layer)))


@dataclass
class DirectMeasurement:
    """The divergence of sets of sparse layers, remembered by a journal.

    Args:
        captured: the model.
        samples: the prompts, each with the name by which the journal knows it.
        positions: how many last positions are compared.
        journal: what is known already.
        tick: called after each divergence, known or measured.
    """

    captured: CapturedModel
    samples: Sequence[tuple[str, Sample]]
    positions: int
    journal: Journal
    tick: Callable[[], None] = lambda: None
    _dense: dict[str, Tensor] = field(default_factory=dict)

    def run(self, layers: Sequence[int], count: int, shortlist: int) -> DirectScores:
        """Every layer of ``layers`` by itself, then ``count`` of them greedily with ``shortlist`` tried per round."""
        single = self.divergences((), layers)
        latest = {layer: statistics.mean(values) for layer, values in single.items()}
        chosen: list[tuple[int, float]] = []
        while len(chosen) < count:
            before = tuple(layer for layer, _ in chosen)
            left = sorted((layer for layer in layers if layer not in before), key=lambda x: (latest[x], -x))
            tried = left[:shortlist] if before else left[:1]
            found = self.divergences(before, tried)
            total = {layer: statistics.mean(values) for layer, values in found.items()}
            best = min(tried, key=lambda layer: (total[layer], -layer))
            base = chosen[-1][1] if chosen else 0.0
            latest.update({layer: total[layer] - base for layer in tried})
            chosen.append((best, total[best]))
        return DirectScores(single, tuple(chosen))

    def divergences(self, base: Sequence[int], candidates: Iterable[int]) -> dict[int, tuple[float, ...]]:
        """For each candidate, the divergence of ``base`` and it sparse together, by sample."""
        wanted = list(candidates)
        found: dict[int, list[float]] = {layer: [] for layer in wanted}
        for name, sample in self.samples:
            trace: Trace | None = None
            for layer in wanted:
                sparse = tuple(sorted((*base, layer)))
                key = f"{name}/{','.join(map(str, sparse))}"
                value = self.journal.get(key)
                if value is None:
                    trace = trace or self._base(name, sample, base)
                    value = self._divergence(name, self.captured.rerun(trace, sparse), sample)
                    self.journal.put(key, value)
                found[layer].append(value)
                self.tick()
        return {layer: tuple(values) for layer, values in found.items()}

    def shares(self, layers: Sequence[int], selections: Sequence[Selection]) -> tuple[ShareScores, ...]:
        """Every layer of ``layers`` by itself with blocks chosen in each way of ``selections``: of different shares."""
        found: dict[tuple[Selection, int], list[tuple[float, float]]] = {}
        for name, sample in self.samples:
            trace: Trace | None = None
            for layer in layers:
                for way in selections:
                    key = f"{name}/{layer}/{way.method}-{way.block}-{way.share}"
                    value = self.journal.get(key)
                    if value is None:
                        trace = trace or self._base(name, sample, ())
                        output = self.captured.rerun(trace, (), {layer: way})
                        value = [self._divergence(name, output, sample), self.captured.densities[layer]]
                        self.journal.put(key, value)
                    found.setdefault((way, layer), []).append((value[0], value[1]))
                    self.tick()

        def mean(way: Selection, which: int) -> dict[int, float]:
            return {layer: statistics.fmean(x[which] for x in found[way, layer]) for layer in layers}

        return tuple(ShareScores(way.share, mean(way, 0), mean(way, 1)) for way in selections)

    def _base(self, name: str, sample: Sample, base: Sequence[int]) -> Trace:
        """A trace with the base sparse; the dense output is kept for comparison."""
        output, trace = self.captured.trace(sample.inputs, base)
        if name not in self._dense:
            dense = output if not base else self.captured.rerun(trace, ())
            self._dense[name] = final_logits(dense, sample.inputs, self.positions).double().log_softmax(-1)
        return trace

    def _divergence(self, name: str, output: object, sample: Sample) -> float:
        sparse = final_logits(output, sample.inputs, self.positions).double().log_softmax(-1)
        return divergence(self._dense[name], sparse)


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """The mean over positions of the KL divergence (nats) of two tensors (..., V) of log-probabilities.

    ``ValueError`` where it is not finite.
    """
    # A token that dense attention rules out adds nothing.
    terms = (dense.exp() * (dense - sparse)).masked_fill(dense == float("-inf"), 0.0)
    value = float(terms.sum(-1).mean())
    if not value < float("inf"):
        raise ValueError(f"the divergence of the model's output is {value}: its logits are not finite")
    return value
