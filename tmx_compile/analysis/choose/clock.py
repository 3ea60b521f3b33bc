"""What a choice saves: measured times of dense and triangle layers, and prices of dynamic ones by their density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tmx_compile.analysis.judge.choice import DynamicLayers
from tmx_compile.analysis.judge.evaluation import Evaluation, Record
from tmx_compile.bench.dynamic_times import DynamicTimes
from tmx_compile.bench.layer_times import AttentionShape, LayerTime, measure_times, time_plan
from tmx_compile.lowering.fa4_lists import kernel_of
from tmx_compile.mask.geometry import Geometry


def measured(
    shapes: Sequence[AttentionShape],
    geometries: Sequence[Geometry],
    tokens: int,
    dtype: str,
    device: str,
    seconds: float,
    note: Callable[[str], object],
) -> list[LayerTime]:
    """The times of layers of these shapes, measured here; ``ValueError`` for what cannot be."""
    found: list[LayerTime] = []
    # All are checked first, and where nothing fits too: a refusal must not depend on what was measured.
    for shape in shapes:
        checked = geometries or [Geometry(0, 0, 0)]
        time_plan(shape, checked, tokens=tokens, dtype=dtype, device=device, seconds=seconds)
    for shape in shapes if geometries else ():
        found += measure_times(shape, geometries, tokens=tokens, dtype=dtype, device=device, seconds=seconds, note=note)
    return found


def found_in(
    times: Sequence[LayerTime],
    shapes: Sequence[AttentionShape],
    geometries: Sequence[Geometry],
    tokens: int,
    dtype: str,
) -> dict[tuple[AttentionShape, Geometry], LayerTime]:
    """The times that are needed; ``ValueError`` for one that is missing."""
    known = {(x.shape, x.geometry): x for x in times if x.tokens == tokens and x.dtype == dtype}
    wanted = [(shape, geometry) for shape in shapes for geometry in geometries]
    for shape, geometry in wanted:
        if (shape, geometry) not in known:
            held = sorted({f"{x.shape}, {x.geometry}, {x.tokens}, {x.dtype}" for x in times})
            raise ValueError(
                f"times must hold {shape}, {geometry}, {tokens} tokens, {dtype}; they hold "
                f"{'; '.join(held) or 'nothing'}"
            )
    return {key: known[key] for key in wanted}


@dataclass(frozen=True)
class Clock:
    """What a choice saves.

    Attributes:
        evaluation: its layers' shapes and densities.
        times: of dense and triangle layers.
        dynamic: what dynamic layers take of the dense time.
        tokens: length of the prompt.
        upper: the upper end of a density's interval counts, not its mean.
    """

    evaluation: Evaluation
    times: dict[tuple[AttentionShape, Geometry], LayerTime]
    dynamic: DynamicTimes
    tokens: int
    upper: bool

    def saved(self, record: Record) -> float:
        """Milliseconds, over all sparse layers; of a dynamic layer without a price, nothing."""
        choice, dynamic = record.choice, record.choice.dynamic
        found = [time.saved_ms for layer in choice.layers for time in self._calls(layer, choice.geometry)]
        for layer, density in zip(dynamic.layers, record.densities, strict=True):
            share = self.of_dense(dynamic, density.upper if self.upper else density.mean)
            if share is not None:
                known = filter(_has_gpu, self._calls(layer, choice.geometry))
                found += [time.dense_ms * (1 - share) for time in known]
        return math.fsum(found)

    def of_dense(self, dynamic: DynamicLayers, density: float) -> float | None:
        """The part of the dense time that a dynamic layer of a density takes."""
        way = dynamic.method, dynamic.group, dynamic.block
        return self.dynamic.of_dense(self.tokens, *way, density, kernel_of(dynamic.block))

    def notes(self, choices: Sequence[DynamicLayers]) -> tuple[str, ...]:
        """What is to be said of these dynamic layers' times."""
        if not choices:
            return ()
        if not any(map(_has_gpu, self.times.values())) or all(self.of_dense(x, 1.0) is None for x in choices):
            shortest, longest = self.dynamic.lengths
            machines = ", ".join(sorted({time.machine for time in self.times.values()}))
            return (
                f"dynamic layers count as saving nothing: they have times on a GPU alone, of {shortest:,} to "
                f"{longest:,} tokens and some blocks, not at {self.tokens:,} on {machines}",
            )
        return (
            f"dynamic layers take the part of dense attention that they took on {self.dynamic.machine} in "
            f"{self.dynamic.dtype}, by density; the densities are those of the evaluated prompts",
        )

    def _calls(self, layer: int, geometry: Geometry) -> list[LayerTime]:
        return [self.times[call, geometry] for call in self.evaluation.shapes[layer] if call.can_be_timed]


def _has_gpu(time: LayerTime) -> bool:
    return "NVIDIA" in time.machine
