"""Collects the Middle-section contribution of each layer and ranks the layers by it.

The measure is the paper's (TriangleMix, arXiv 2507.21526, which counts layers from 1; here they count from
0): the gradient of the answer's logit with respect to the attention of the Middle section. A layer where it
is small loses little when that section is skipped. How the gradient is obtained is the caller's business.
"""

from __future__ import annotations

import math
import numbers
import statistics
from typing import Any

import torch

from tmx_compile.config import as_count


class TriangleMixAnalyzer:
    """Records Middle-section gradients and picks the layers that need that section least.

    The measure is the paper's (TriangleMix, arXiv 2507.21526). :func:`tmx_compile.calibrate` records a model's.

    Attributes:
        num_layers: layers of the model.
        middle_qk_gradients: by layer (counted from 0), its recorded magnitudes; one never recorded has no entry.

    Raises:
        ValueError: ``num_layers`` is no positive integer.

    >>> from tmx_compile import TriangleMixAnalyzer
    >>> analyzer = TriangleMixAnalyzer(3)
    >>> for layer, gradient in enumerate([0.5, 0.1, -0.2]):
    ...     analyzer.record_middle_qk_gradient(layer, gradient)
    >>> analyzer.get_triangle_layers(2)
    [1, 2]
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = as_count("num_layers", num_layers, minimum=1)
        self.middle_qk_gradients: dict[int, list[float]] = {}

    def record_middle_qk_gradient(self, layer_idx: int, gradient: torch.Tensor | float) -> None:
        """Record one measurement of layer ``layer_idx``; any number per layer.

        Args:
            layer_idx: the layer, counted from 0.
            gradient: a number, which counts by its absolute value, or a tensor of any shape, which counts by the mean
                of its absolute values, taken in float64.

        Raises:
            ValueError: a layer that the model does not have, an empty or boolean tensor, something that is no number,
                or a value that is not finite; names layer and value.

        >>> import torch
        >>> from tmx_compile import TriangleMixAnalyzer
        >>> analyzer = TriangleMixAnalyzer(1)
        >>> analyzer.record_middle_qk_gradient(0, torch.tensor([[-1.0, 3.0]]))
        >>> analyzer.middle_qk_gradients
        {0: [2.0]}
        """
        layer_idx = as_count("layer_idx", layer_idx)
        if layer_idx >= self.num_layers:
            raise ValueError(f"layer_idx must be less than num_layers={self.num_layers}, got {layer_idx}")
        magnitude = _magnitude(layer_idx, gradient)
        self.middle_qk_gradients.setdefault(layer_idx, []).append(magnitude)

    def get_triangle_layers(self, num_triangle_layers: int) -> list[int]:
        """Return the ``num_triangle_layers`` layers with the lowest mean recorded contribution, ascending.

        Layers that tie are taken from the deep end, where skipping is known to cost least. A layer never
        recorded is never chosen: asking for more layers than were recorded is a ``ValueError``.

        >>> from tmx_compile import TriangleMixAnalyzer
        >>> analyzer = TriangleMixAnalyzer(4)
        >>> for layer in range(4):
        ...     analyzer.record_middle_qk_gradient(layer, 0.1)
        >>> analyzer.get_triangle_layers(2)
        [2, 3]
        """
        count = as_count("num_triangle_layers", num_triangle_layers)
        # The exact mean: neither the order of the records nor rounding may decide between equal layers.
        means = {layer: statistics.mean(values) for layer, values in self.middle_qk_gradients.items() if values}
        if count > len(means):
            raise ValueError(
                f"num_triangle_layers must be at most the number of recorded layers, {len(means)} of "
                f"{self.num_layers}, got {count}"
            )
        ranked = sorted(means, key=lambda layer: (means[layer], -layer))
        return sorted(ranked[:count])

    def reset(self) -> None:
        """Forget every record.

        >>> from tmx_compile import TriangleMixAnalyzer
        >>> analyzer = TriangleMixAnalyzer(4)
        >>> analyzer.record_middle_qk_gradient(0, 1.0)
        >>> analyzer.reset()
        >>> analyzer.middle_qk_gradients
        {}
        """
        self.middle_qk_gradients.clear()


def _magnitude(layer_idx: int, gradient: Any) -> float:
    if isinstance(gradient, torch.Tensor):
        if gradient.numel() == 0 or gradient.dtype is torch.bool:
            raise ValueError(
                f"gradient of layer {layer_idx} must be a non-empty numeric tensor, "
                f"got shape {tuple(gradient.shape)}, dtype {gradient.dtype}"
            )
        wide = torch.complex128 if gradient.is_complex() else torch.float64
        value = float(gradient.detach().to(wide).abs().mean())
    elif not isinstance(gradient, bool) and isinstance(gradient, numbers.Real):
        try:
            value = abs(float(gradient))
        except OverflowError:
            value = math.inf
    else:
        raise ValueError(f"gradient of layer {layer_idx} must be a number or a tensor, got {gradient!r}")
    if not math.isfinite(value):
        raise ValueError(f"gradient of layer {layer_idx} must be finite, got {value}")
    return value
