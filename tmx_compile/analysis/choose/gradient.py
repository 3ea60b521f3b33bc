"""Layers by the gradient of their Middle section: how much the answer's logit would move with that section.

The measure of the method's authors (TriangleMix, arXiv 2507.21526v1, on prompts of about 2,000 tokens): the derivative
of the first answer token's logit with respect to a multiplier on each attention probability, averaged over the Middle
section. One forward and one backward pass give it for all layers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tmx_compile.analysis.capture.capture import CapturedModel
from tmx_compile.analysis.capture.samples import Sample, final_logits
from tmx_compile.analysis.capture.sections import MEASURES, SectionSums
from tmx_compile.analysis.journal import Journal


@dataclass(frozen=True)
class LayerGradients:
    """One layer's Middle section in one sequence.

    Attributes:
        heads: for each of ``sections.MEASURES``, the mean over the section, per query head.
        cells: how many (row, key) pairs the section has.
    """

    heads: Mapping[str, tuple[float, ...]]
    cells: int

    def score(self, measure: str) -> float:
        """The layer's magnitude: the absolute value of the mean over heads."""
        values = self.heads[measure]
        return abs(sum(values) / len(values))


SequenceGradients = Mapping[int, LayerGradients]
"""All layers of one sequence."""


def measure_gradients(captured: CapturedModel, sample: Sample, key: str, journal: Journal) -> list[SequenceGradients]:
    """The gradients of every sequence of a sample; known ones come from the journal.

    Raises:
        ValueError: the prompt is so short that the geometry leaves nothing out, or an answer is no token.
    """
    known = journal.get(key)
    if known is None:
        known = _run(captured, sample)
        journal.put(key, known)
    return [
        {
            int(layer): LayerGradients({name: tuple(values) for name, values in found["heads"].items()}, found["cells"])
            for layer, found in sequence.items()
        }
        for sequence in known
    ]


def _run(captured: CapturedModel, sample: Sample) -> list[dict[str, dict[str, object]]]:
    sums: dict[int, SectionSums] = {}

    def record(layer: int, found: SectionSums) -> None:
        before = sums.get(layer)
        if before is not None:
            found = SectionSums(before.sums + found.sums, before.cells + found.cells)
        sums[layer] = found

    def number(output: object) -> Tensor:
        return answer_logits(final_logits(output, sample.inputs, 1)[:, 0], sample.answer).sum()

    captured.gradients(sample.inputs, number, record)
    cells = torch.stack([found.cells for found in sums.values()]).cpu()
    if not bool(cells.any()):
        sink, window, last = captured.config.geometry.counts
        raise ValueError(f"no prompt of the batch is long enough to have a Middle section at {sink}/{window}/{last}")
    for layer in captured.layers:
        # A layer that the answer does not depend on gets no gradient: nothing of it is needed.
        sums.setdefault(layer, _nothing(next(iter(sums.values()))))
    sequences = []
    for b in range(cells.shape[1]):
        if not bool(cells[:, b].any()):
            continue
        mean = {layer: found.sums[:, b] / found.cells[b].clamp(min=1) for layer, found in sums.items()}
        sequences.append(
            {
                str(layer): {
                    "heads": {name: mean[layer][place].tolist() for place, name in enumerate(MEASURES)},
                    "cells": int(sums[layer].cells[b]),
                }
                for layer in sorted(sums)
            }
        )
    return sequences


def _nothing(like: SectionSums) -> SectionSums:
    return SectionSums(torch.zeros_like(like.sums), torch.zeros_like(like.cells))


def answer_logits(logits: Tensor, answer: Tensor | None) -> Tensor:
    """The logit of each sequence's answer, (B,), out of (B, V); the largest where no answer is given.

    ``ValueError`` for answers of another batch or outside the vocabulary.
    """
    batch, vocabulary = logits.shape
    if answer is None:
        answer = logits.detach().argmax(-1)
    if answer.shape != (batch,):
        raise ValueError(f"answers must be one token for each of {batch} sequences, got shape {tuple(answer.shape)}")
    if bool(((answer < 0) | (answer >= vocabulary)).any()):
        raise ValueError(f"answers must be tokens below {vocabulary}, got {answer.tolist()}")
    return logits.gather(1, answer.to(logits.device)[:, None])[:, 0]
