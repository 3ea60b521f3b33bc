"""The outcome of a calibration: scores per layer, the ranking, the configuration it suggests, and its file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tmx_compile.analysis.capture.sections import MEASURES
from tmx_compile.analysis.choose.direct import DirectScores, ShareScores
from tmx_compile.analysis.choose.gradient import SequenceGradients
from tmx_compile.analysis.choose.recorder import TriangleMixAnalyzer
from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.fingerprint import ModelFingerprint
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.mask.geometry import Geometry


@dataclass(frozen=True)
class Calibration:
    """Which layers of a model need their Middle section least.

    Attributes:
        config: the geometry that was calibrated, and no layers yet.
        num_layers: layers of the model.
        fingerprint: of the model.
        estimator: "gradient" or "direct".
        measure: which of ``scores`` ranks the layers.
        scores: by measure, the mean over sequences per layer. Gradients are absolute values of the mean per attended
            pair of the Middle section, in logits; a divergence is in nats.
        ranking: the calibrated layers, from the one needed least. A layer that cannot go sparse is not in it.
        analyzer: one record per sequence and layer, of ``measure``.
        about: plain data on how it was made, which the profile holds too.
        gradients: all layers of every sequence, per head, for the estimator "gradient".
        greedy: the layers in the order in which they were chosen, each with the divergence (nats) of all up to it, for
            the estimator "direct".
        dynamic: what each layer costs with blocks chosen while it runs, at each share that was asked for.

    >>> import tempfile
    >>> import torch
    >>> import torch.nn.functional as F
    >>> from tmx_compile import TriangleMixConfig, TriangleMixInferenceConfig, calibrate
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x):
    ...         x = x[:, None]
    ...         return (x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]
    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), Layer(), Layer(), torch.nn.Linear(16, 50))
    >>> batches = [torch.randint(0, 50, (1, 60)) for _ in range(2)]
    >>> found = calibrate(model, batches, config=TriangleMixConfig(2, 6, 5), progress=False)
    >>> found.num_layers, found.layers(1), sorted(found.scores["absolute"])
    (3, (2,), [1, 2])
    >>> found.apply(TriangleMixInferenceConfig(True, 1, (), 2, 6, 5)).triangle_layer_indices
    (2,)
    >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
    ...     found.to_profile(file.name, n=1)
    ...     TriangleMixConfig.from_profile(file.name, num_layers=3, model=model).layers()
    (2,)
    """

    config: TriangleMixConfig
    num_layers: int
    fingerprint: ModelFingerprint
    estimator: str
    measure: str
    scores: Mapping[str, Mapping[int, float]]
    ranking: tuple[int, ...]
    analyzer: TriangleMixAnalyzer
    about: Mapping[str, Any]
    gradients: tuple[SequenceGradients, ...] = field(default=(), repr=False)
    greedy: tuple[tuple[int, float], ...] = ()
    dynamic: tuple[ShareScores, ...] = ()

    def layers(self, n: int) -> tuple[int, ...]:
        """The ``n`` layers needed least, ascending; ``ValueError`` for more than were calibrated."""
        n = as_count("n", n)
        if n > len(self.ranking):
            raise ValueError(f"n must be at most the number of calibrated layers, {len(self.ranking)}, got {n}")
        return tuple(sorted(self.ranking[:n]))

    def to_config(self, n: int) -> TriangleMixConfig:
        """A configuration with the ``n`` layers needed least sparse, for prompts over the usual ``min_seq_len``.

        ``ValueError`` for more layers than were calibrated.
        """
        return self.config.replace(triangle_layer_indices=self.layers(n))

    def apply(self, config: TriangleMixInferenceConfig) -> TriangleMixInferenceConfig:
        """``config`` with the layers chosen here, as many as its ``num_triangle_layers`` asks for.

        Raises:
            ValueError: it does not ask, or has another geometry than the one that was calibrated.
        """
        if config.num_triangle_layers is None:
            raise ValueError("config must tell num_triangle_layers, got None")
        geometry = Geometry(config.num_sink_tokens, config.sliding_window_size, config.num_last_tokens)
        if geometry != self.config.geometry:
            raise ValueError(f"config must have the calibrated geometry {self.config.geometry}, got {geometry}")
        return replace(config, triangle_layer_indices=self.layers(config.num_triangle_layers))

    def to_profile(self, path: str | os.PathLike[str], n: int) -> None:
        """Save as a profile with ``n`` sparse layers, for :meth:`tmx_compile.TriangleMixConfig.from_profile`.

        The file is what :meth:`tmx_compile.TriangleMixConfig.to_profile` writes, and beside it the model's fingerprint,
        the ``ranking`` (from which ``from_profile`` takes another number of layers if asked to) and, under
        ``calibration``, the scores per layer and how they were obtained. :func:`tmx_compile.analysis.read_scores`
        reads those of "direct", from which :func:`tmx_compile.analysis.mixes` proposes what each layer does.

        Args:
            path: the file; one that exists is written over.
            n: how many layers.

        Raises:
            ValueError: more layers than were calibrated.
            OSError: the file cannot be written.
        """
        self.to_config(n).to_profile(path, num_layers=self.num_layers)
        profile = json.loads(Path(path).read_text(encoding="utf-8"))
        profile["model"]["fingerprint"] = self.fingerprint.to_dict()
        profile["ranking"] = list(self.ranking)
        profile["calibration"] = {
            **self.about,
            "estimator": self.estimator,
            "measure": self.measure,
            "scores": {name: _written(values) for name, values in self.scores.items()},
        }
        if self.greedy:
            steps = [{"layer": layer, "divergence": float(f"{value:.6g}")} for layer, value in self.greedy]
            profile["calibration"]["greedy"] = steps
        if self.dynamic:
            profile["calibration"]["dynamic"] = {
                "method": self.config.dynamic_method,
                "block": self.config.dynamic_block,
                "group": self.config.dynamic_group,
                "shares": [
                    {"share": x.share, "divergence": _written(x.divergence), "density": _written(x.density)}
                    for x in self.dynamic
                ],
            }
        Path(path).write_text(readable(profile), encoding="utf-8")


def _written(values: Mapping[int, float]) -> dict[str, float]:
    return {str(layer): float(f"{value:.6g}") for layer, value in values.items()}


def from_gradients(gradients: tuple[SequenceGradients, ...], measure: str, **about: Any) -> Calibration:
    """A calibration from recorded gradients; ``about`` are the other fields of :class:`Calibration`."""
    layers = sorted(gradients[0])
    analyzer = TriangleMixAnalyzer(about["num_layers"])
    for sequence in gradients:
        for layer in layers:
            analyzer.record_middle_qk_gradient(layer, sequence[layer].score(measure))
    scores = {
        name: {layer: statistics.mean(sequence[layer].score(name) for sequence in gradients) for layer in layers}
        for name in MEASURES
    }
    ranking = _ranking(analyzer, len(layers))
    return Calibration(
        estimator="gradient",
        measure=measure,
        scores=scores,
        ranking=ranking,
        analyzer=analyzer,
        gradients=gradients,
        **about,
    )


def from_divergences(found: DirectScores, **about: Any) -> Calibration:
    """A calibration from measured divergences; ``about`` are the other fields of :class:`Calibration`."""
    analyzer = TriangleMixAnalyzer(about["num_layers"])
    for layer, values in found.single.items():
        for value in values:
            analyzer.record_middle_qk_gradient(layer, value)
    scores = {"divergence": {layer: statistics.mean(values) for layer, values in found.single.items()}}
    return Calibration(
        estimator="direct",
        measure="divergence",
        scores=scores,
        ranking=found.ranking(),
        analyzer=analyzer,
        greedy=found.greedy,
        **about,
    )


def _ranking(analyzer: TriangleMixAnalyzer, count: int) -> tuple[int, ...]:
    """The order in which the analyzer adds layers as it is asked for more."""
    ranked: list[int] = []
    for n in range(1, count + 1):
        ranked += [layer for layer in analyzer.get_triangle_layers(n) if layer not in ranked]
    return tuple(ranked)


def readable(profile: Mapping[str, Any]) -> str:
    """JSON with one short line per list or innermost table."""

    def written(value: Any, depth: int) -> str:
        flat = json.dumps(value)
        if not isinstance(value, dict) or len(flat) + depth <= 100:
            return flat
        inner = ",\n".join(f"{' ' * (depth + 1)}{json.dumps(k)}: {written(v, depth + 1)}" for k, v in value.items())
        return "{\n" + inner + "\n" + " " * depth + "}"

    return written(profile, 0) + "\n"
