"""The serving form of the configuration, as the original API has it, with its presets and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.profile import GEOMETRY
from tmx_compile.config.values import as_bool, as_layer_indices
from tmx_compile.legacy.environment import VARIABLES

# Decoder layers of the published Qwen3 models (num_hidden_layers of their configurations).
_QWEN3_LAYERS = {
    "0.6B": 28,
    "1.7B": 28,
    "4B": 36,
    "8B": 36,
    "14B": 40,
    "32B": 64,
    "30B-A3B": 48,
    "235B-A22B": 94,
}
# Sizes with a recommendation of their own; the rest follow the rule in for_qwen3.
_QWEN3_RECOMMENDED = {"14B": 12, "32B": 16}


@dataclass(frozen=True)
class TriangleMixInferenceConfig:
    """The serving form of the configuration: a switch, the triangle parameters and the NPU options.

    Args:
        enable_trianglemix: the switch; while False, :meth:`to_trianglemix_config` returns None.
        num_triangle_layers: as in :class:`TriangleMixConfig`.
        triangle_layer_indices: as in :class:`TriangleMixConfig`, except that an empty one means not given.
            Stored as a sorted tuple.
        num_sink_tokens: as in :class:`TriangleMixConfig`.
        sliding_window_size: as in :class:`TriangleMixConfig`.
        num_last_tokens: as in :class:`TriangleMixConfig`.
        use_npu_optimization: compile models on an NPU with torchair, to CANN's fused attention. With False an NPU is
            like any other device.
        npu_block_size: rows and columns of a block on NPU (tokens, positive; 32-256 recommended).
        use_gradient_analysis: ask for the layers to be chosen by recorded Middle gradients rather than by position:
            :func:`tmx_compile.calibrate` takes such a configuration, and its result gives it back with the layers. A
            backend that gets it without layers warns.
        analysis_warmup_steps: batches to record before that choice.

    Raises:
        ValueError: as :class:`TriangleMixConfig`; also a switch that is no bool, or a block size of 0.

    >>> from tmx_compile import TriangleMixInferenceConfig
    >>> config = TriangleMixInferenceConfig(enable_trianglemix=True, triangle_layer_indices=[30, 31])
    >>> config.to_trianglemix_config().layers(), config.npu_block_size
    ((30, 31), 64)
    """

    enable_trianglemix: bool = False
    num_triangle_layers: int | None = None
    triangle_layer_indices: Sequence[int] = ()
    num_sink_tokens: int = TriangleMixConfig.num_sink_tokens
    sliding_window_size: int = TriangleMixConfig.sliding_window_size
    num_last_tokens: int = TriangleMixConfig.num_last_tokens
    use_npu_optimization: bool = True
    npu_block_size: int = 64
    use_gradient_analysis: bool = False
    analysis_warmup_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("enable_trianglemix", "use_npu_optimization", "use_gradient_analysis"):
            as_bool(name, getattr(self, name))
        indices = () if self.triangle_layer_indices is None else self.triangle_layer_indices
        checked: dict[str, Any] = {
            "triangle_layer_indices": as_layer_indices("triangle_layer_indices", indices),
            "npu_block_size": as_count("npu_block_size", self.npu_block_size, minimum=1),
            "analysis_warmup_steps": as_count("analysis_warmup_steps", self.analysis_warmup_steps),
        }
        if self.num_triangle_layers is not None:
            checked["num_triangle_layers"] = as_count("num_triangle_layers", self.num_triangle_layers)
        for name in GEOMETRY:
            checked[name] = as_count(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def to_trianglemix_config(self) -> TriangleMixConfig | None:
        """Return the triangle parameters as a :class:`TriangleMixConfig`, or None while disabled.

        >>> from tmx_compile import TriangleMixInferenceConfig
        >>> TriangleMixInferenceConfig().to_trianglemix_config() is None
        True
        """
        if not self.enable_trianglemix:
            return None
        return TriangleMixConfig(
            num_sink_tokens=self.num_sink_tokens,
            sliding_window_size=self.sliding_window_size,
            num_last_tokens=self.num_last_tokens,
            num_triangle_layers=self.num_triangle_layers,
            triangle_layer_indices=self.triangle_layer_indices or None,
        )

    @classmethod
    def for_ascend_npu(
        cls, num_triangle_layers: int = 12, enable_gradient_analysis: bool = False
    ) -> TriangleMixInferenceConfig:
        """Return an enabled configuration for Ascend NPUs; the *first* n layers are triangle layers.

        Args:
            num_triangle_layers: n.
            enable_gradient_analysis: sets ``use_gradient_analysis``.

        Raises:
            ValueError: no count, or no bool.

        >>> from tmx_compile import TriangleMixInferenceConfig
        >>> TriangleMixInferenceConfig.for_ascend_npu(3).to_trianglemix_config().layers()
        (0, 1, 2)
        """
        as_bool("enable_gradient_analysis", enable_gradient_analysis)
        return cls(
            enable_trianglemix=True,
            num_triangle_layers=num_triangle_layers,
            use_npu_optimization=True,
            use_gradient_analysis=enable_gradient_analysis,
        )

    @classmethod
    def for_qwen3(cls, model_size: str = "14B", num_triangle_layers: int | None = None) -> TriangleMixInferenceConfig:
        """Return an enabled configuration for a published Qwen3 model, with its *first* n layers sparse.

        n is 12 for 14B, 16 for 32B and about three layers in ten, within 4-20, for the other sizes;
        ``num_triangle_layers`` overrides it. The depths are those of the published models.

        Args:
            model_size: 0.6B, 1.7B, 4B, 8B, 14B, 32B, 30B-A3B or 235B-A22B, in any case.
            num_triangle_layers: n; None: see above.

        Raises:
            ValueError: an unknown size, or a count beyond the model.

        >>> from tmx_compile import TriangleMixInferenceConfig
        >>> TriangleMixInferenceConfig.for_qwen3("32B").num_triangle_layers
        16
        """
        size = model_size.upper() if isinstance(model_size, str) else None
        if size not in _QWEN3_LAYERS:
            raise ValueError(f"model_size must be one of {', '.join(_QWEN3_LAYERS)}, got {model_size!r}")
        depth = _QWEN3_LAYERS[size]
        if num_triangle_layers is None:
            num_triangle_layers = _QWEN3_RECOMMENDED.get(size, min(max(round(0.3 * depth), 4), 20))
        config = cls(enable_trianglemix=True, num_triangle_layers=num_triangle_layers)
        TriangleMixConfig(num_triangle_layers=config.num_triangle_layers).check_layers(depth)
        return config

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> TriangleMixInferenceConfig:
        """Return the configuration that the environment (``os.environ`` unless given) describes.

        - ``VLLM_TRIANGLEMIX_ENABLED``, ``VLLM_NPU_OPTIMIZATION``: 1/true/yes/on or 0/false/no/off, any case.
        - ``VLLM_TRIANGLEMIX_LAYERS``: a lone integer is a *count*, ``12`` = the first 12 layers. With a comma
          or a range it is a *list* of layers counted from 0: ``20,21,22``, ``16-31``, ``0,16-31``, and
          ``12,`` = layer 12 alone.
        - ``VLLM_NPU_BLOCK_SIZE``: a positive integer.
        - ``VLLM_TRIANGLEMIX_GRADIENT_ANALYSIS``: as the first; ``use_gradient_analysis``.

        A variable that is unset or empty leaves the default.

        Args:
            environ: what to read; None: ``os.environ``.

        Raises:
            ValueError: a bad value, named with its variable.

        >>> from tmx_compile import TriangleMixInferenceConfig
        >>> settings = {"VLLM_TRIANGLEMIX_ENABLED": "1", "VLLM_TRIANGLEMIX_LAYERS": "0,29-31"}
        >>> TriangleMixInferenceConfig.from_env(settings).triangle_layer_indices
        (0, 29, 30, 31)
        """
        source = os.environ if environ is None else environ
        settings: dict[str, Any] = {}
        for variable, read in VARIABLES.items():
            text = source.get(variable, "").strip()
            if not text:
                continue
            try:
                name, value = read(text)
                settings[name] = value
                # One setting alone, so that a refusal is blamed on the variable it came from.
                cls(**{name: value})
            except ValueError as error:
                raise ValueError(f"{variable}={text!r}: {error}") from error
        return cls(**settings)
