"""``calibrate``: which layers of a live model can go sparse."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tmx_compile.analysis.capture.capture import CapturedModel
from tmx_compile.analysis.capture.samples import Batch, Sample, samples_of
from tmx_compile.analysis.capture.sections import MEASURES
from tmx_compile.analysis.choose.calibration import Calibration, from_divergences, from_gradients
from tmx_compile.analysis.choose.direct import DirectMeasurement, DirectScores, ShareScores
from tmx_compile.analysis.choose.gradient import SequenceGradients, measure_gradients
from tmx_compile.analysis.journal import Journal
from tmx_compile.analysis.progress import device_of, dtype_of, progress_bar
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.fingerprint import ModelFingerprint
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.mask.selection import Selection, checked_share
from tmx_compile.version import __version__

ESTIMATORS = ("gradient", "direct")
_MOST_POSITIONS = 64


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: TriangleMixConfig | TriangleMixInferenceConfig | None = None,
    estimator: str = "gradient",
    measure: str = "absolute",
    samples: int | None = None,
    greedy: int | None = None,
    shortlist: int = 4,
    positions: int | None = None,
    shares: Sequence[float] = (),
    num_layers: int | None = None,
    assume_causal: bool = False,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Measure which layers need the Middle section of their attention least.

    The result makes a :class:`tmx_compile.TriangleMixConfig` of them, with :meth:`tmx_compile.Calibration.to_config`.
    The model is captured as ``tmx_backend`` would capture it and runs in eager mode; its code, weights and settings
    stay as they are. Every layer whose attention can be proven takes part. Memory is O(N) in the prompt's length: for
    "gradient" that of a forward pass with gradients of the activations alone.

    Args:
        model: the model, on the device and in the dtype it is to be measured in.
        batches: prompts as long as those in use: token ids (B, N), or keyword arguments of the model, or a pair of one
            of these and the token ids (B,) of the answers. Without an answer the model's own most likely token counts.
            Models that take ``logits_to_keep`` save work when it is among the arguments.
        config: the geometry to calibrate for. A :class:`tmx_compile.TriangleMixInferenceConfig` must have
            ``use_gradient_analysis``; its ``analysis_warmup_steps`` is then the number of batches.
        estimator: "gradient" (one forward and one backward pass per batch) or "direct" (the divergence of the output
            when a layer goes sparse: about half a forward pass per layer and batch, and more for ``greedy``).
        measure: what ranks the layers by gradient: "signed" and "absolute" are the derivative with respect to
            multipliers on the attention probabilities (TriangleMix, arXiv 2507.21526v1), "renormalized" and
            "renormalized_absolute" the same with the rows normalised again, as sparse attention does. All are recorded.
        samples: how many batches to use; None: all of them.
        greedy: for "direct", how many layers to choose one after the other; None: half of those that were calibrated.
        shortlist: for "direct", how many layers each of these rounds tries.
        positions: for "direct", how many last positions are compared; None: as many as are last rows, at most 64.
        shares: for "direct", also measure every layer with blocks chosen while it runs (docs/dynamic.md), alone, at
            each of these shares; ``dynamic_method``, ``dynamic_block`` and ``dynamic_group`` of ``config`` tell how. It
            takes as long again as the divergences of the layers for each share.
        num_layers: layers of the model; None: one more than the deepest layer with attention.
        assume_causal: as in :func:`tmx_compile.tmx_backend`.
        resume: a file that remembers what is measured. With it an interrupted calibration goes on where it stopped,
            given the same model, settings and batches.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: a bad argument or batch; fewer batches than ``samples``; prompts too short for a Middle section.
        TriangleMixError: no attention of the model could be proven.

    Layers 1 and 2 of this model have attention:

    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, calibrate
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> batches = [torch.randint(0, 50, (1, 60)) for _ in range(2)]
    >>> found = calibrate(model, batches, config=TriangleMixConfig(2, 6, 5), progress=False)
    >>> found.ranking  # the last layer has no later one to tell of its Middle section
    (2, 1)
    >>> found.to_config(1).layers()
    (2,)
    """
    geometry, samples = _settings(config, estimator, samples)
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    greedy = None if greedy is None else as_count("greedy", greedy)
    shortlist = as_count("shortlist", shortlist, minimum=1)
    if positions is None:
        positions = max(1, min(_MOST_POSITIONS, geometry.num_last_tokens))
    positions = as_count("positions", positions, minimum=1)
    ways = _ways(geometry, estimator, shares)
    num_layers = None if num_layers is None else as_count("num_layers", num_layers, minimum=1)
    if samples is not None and isinstance(batches, Sized) and len(batches) < samples:
        raise ValueError(f"batches must be at least samples={samples}, got {len(batches)}")
    fingerprint = ModelFingerprint.of(model)
    header: dict[str, Any] = {
        "model": fingerprint.to_dict(),
        "dtype": dtype_of(model),
        "geometry": list(geometry.geometry.counts),
        "estimator": estimator,
    }
    if estimator == "direct":
        header["positions"] = positions
    journal = Journal(resume, header)
    run = _Run(CapturedModel(model, geometry, assume_causal=assume_causal), journal, samples, progress)
    if estimator == "gradient":
        gradients = run.gradients(batches)
        return from_gradients(gradients, measure, **run.about(fingerprint, geometry, num_layers))
    found, dynamic = run.divergences(batches, positions, greedy, shortlist, ways)
    about = run.about(fingerprint, geometry, num_layers, positions=positions, shortlist=shortlist)
    return from_divergences(found, dynamic=dynamic, **about)


def _ways(geometry: TriangleMixConfig, estimator: str, shares: Sequence[float]) -> tuple[Selection, ...]:
    """How dynamic layers choose at each share."""
    if not isinstance(shares, (list, tuple)):
        raise ValueError(f"shares must be a list of numbers, got {shares!r}")
    if shares and estimator != "direct":
        raise ValueError(f"shares must be given with estimator='direct', which measures them, got {estimator!r}")
    found = [checked_share(f"shares[{place}]", share) for place, share in enumerate(shares)]
    if len({*found}) < len(found):
        raise ValueError(f"shares must differ, got {list(shares)}")
    return tuple(geometry.replace(dynamic_layer_indices=(0,), dynamic_share=share).selection(0) for share in found)


def _settings(
    config: TriangleMixConfig | TriangleMixInferenceConfig | None, estimator: str, samples: int | None
) -> tuple[TriangleMixConfig, int | None]:
    """The geometry without layers, and the number of batches."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if isinstance(config, TriangleMixInferenceConfig):
        if not config.use_gradient_analysis:
            raise ValueError("config must have use_gradient_analysis=True to be calibrated, got False")
        if estimator != "gradient":
            raise ValueError(f"estimator must be 'gradient' for use_gradient_analysis, got {estimator!r}")
        samples = config.analysis_warmup_steps if samples is None else samples
        geometry = TriangleMixConfig(config.num_sink_tokens, config.sliding_window_size, config.num_last_tokens)
    elif config is None or isinstance(config, TriangleMixConfig):
        nothing = {"num_triangle_layers": None, "triangle_layer_indices": None, "dynamic_layer_indices": None}
        geometry = (config or TriangleMixConfig()).replace(**nothing, dynamic_share=Selection.share)
    else:
        raise ValueError(f"config must be a TriangleMixConfig or TriangleMixInferenceConfig, got {config!r}")
    return geometry, None if samples is None else as_count("samples", samples, minimum=1)


@dataclass
class _Run:
    """One calibration in progress, and what it has seen."""

    captured: CapturedModel
    journal: Journal
    samples: int | None
    progress: bool
    tokens: set[int] = field(default_factory=set)
    batches: int = 0
    depth: int = 0

    def gradients(self, batches: Iterable[Batch]) -> tuple[SequenceGradients, ...]:
        """The gradients of every sequence."""
        total = self.samples or (len(batches) if isinstance(batches, Sized) else None)
        found: list[SequenceGradients] = []
        with progress_bar("gradients", total, self.progress) as tick:
            for name, sample in self._named(batches):
                self._layers(sample)
                found += measure_gradients(self.captured, sample, name, self.journal)
                tick()
        return tuple(found)

    def divergences(
        self,
        batches: Iterable[Batch],
        positions: int,
        greedy: int | None,
        shortlist: int,
        ways: Sequence[Selection],
    ) -> tuple[DirectScores, tuple[ShareScores, ...]]:
        """The divergences of every layer, and of the greedy choice; and of every layer that is dynamic, by share."""
        samples = list(self._named(batches))
        layers = self._layers(samples[0][1])
        count = len(layers) // 2 if greedy is None else greedy
        if count > len(layers):
            raise ValueError(f"greedy must be at most the number of calibrated layers, {len(layers)}, got {count}")
        tried = 0 if count == 0 else 1 + sum(min(shortlist, len(layers) - i) for i in range(1, count))
        dynamic = self._dynamic(samples[0][1]) if ways else []
        total = len(samples) * (len(layers) + tried + len(dynamic) * len(ways))
        with progress_bar("divergences", total, self.progress) as tick:
            measurement = DirectMeasurement(self.captured, samples, positions, self.journal, tick)
            return measurement.run(layers, count, shortlist), measurement.shares(dynamic, ways)

    def about(
        self, fingerprint: ModelFingerprint, geometry: TriangleMixConfig, num_layers: int | None, **more: int
    ) -> dict[str, Any]:
        """The fields of :class:`Calibration` that do not depend on the estimator."""
        if num_layers is not None and num_layers < self.depth:
            raise ValueError(f"num_layers must be at least {self.depth}, the layers that were found, got {num_layers}")
        model = self.captured.model
        about = {
            "class": type(model).__name__,
            "dtype": dtype_of(model),
            "batches": self.batches,
            "tokens": [min(self.tokens), max(self.tokens)] if self.tokens else [],
            **more,
            "device": device_of(model),
            "torch": str(torch.__version__),
            "tmx_compile": __version__,
        }
        return {
            "config": geometry,
            "num_layers": num_layers or self.depth,
            "fingerprint": fingerprint,
            "about": about,
        }

    def _named(self, batches: Iterable[Batch]) -> Iterator[tuple[str, Sample]]:
        """The batches with names that tell their place and their values."""
        for number, sample in enumerate(itertools.islice(samples_of(batches), self.samples)):
            self.batches += 1
            self.tokens.update(sample.lengths())
            yield f"{number}:{sample.digest()}", sample
        if self.batches == 0:
            raise ValueError("batches must hold at least one prompt, got none")
        if self.samples is not None and self.batches < self.samples:
            raise ValueError(f"batches must be at least samples={self.samples}, they ended after {self.batches}")

    def _layers(self, sample: Sample) -> list[int]:
        """The layers that can go sparse; runs the model once where nothing is known yet."""
        known = self.journal.get("layers")
        if known is None:
            self.captured.run(sample.inputs)
            seen = [site.layer for site in self.captured.report if site.layer is not None]
            known = {"calibrated": list(self.captured.layers), "depth": 1 + max(seen)}
            self.journal.put("layers", known)
        self.depth = int(known["depth"])
        return [int(layer) for layer in known["calibrated"]]

    def _dynamic(self, sample: Sample) -> list[int]:
        """Of the layers those that can choose blocks while they run; likewise."""
        known = self.journal.get("dynamic layers")
        if known is None:
            self.captured.run(sample.inputs)
            known = list(self.captured.dynamic_layers)
            self.journal.put("dynamic layers", known)
        return [int(layer) for layer in known]
