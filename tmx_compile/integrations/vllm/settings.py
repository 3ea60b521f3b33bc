"""What the user asks of the plugin: environment variables and ``--additional-config``, read in this one place.

The values are checked in the process that the user starts, before the engine. What comes out is plain data in vLLM's
own configuration (``additional_config``), so that every process and vLLM's compile cache see the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from tmx_compile.config import TriangleMixConfig
from tmx_compile.config.prices import first_n_message
from tmx_compile.config.profile import GEOMETRY
from tmx_compile.config.values import as_bool, as_count
from tmx_compile.integrations.vllm import pages
from tmx_compile.legacy.inference import TriangleMixInferenceConfig
from tmx_compile.lowering.table import CHUNK_LOWERINGS
from tmx_compile.lowering.worth import break_even, least_length

KEY = "trianglemix"
"""The plugin's key in ``additional_config``."""

PROFILE_VARIABLE = "VLLM_TRIANGLEMIX_PROFILE"
_SWITCH, _VARIABLE = "enable_trianglemix", "VLLM_TRIANGLEMIX_ENABLED"
_INFERENCE = tuple(field.name for field in fields(TriangleMixInferenceConfig))
_OWN = ("profile", "min_seq_len", "lowering", "strict", "stats_log_interval")
_LOWERINGS = (*CHUNK_LOWERINGS, pages.NAME)
_RESOLVED = "_num_layers"  # only what a process has written for the others has it
_ANALYSIS = (
    "use_gradient_analysis asks for layers chosen by gradients, and there is no profile: calibrate the model with "
    "Transformers (tmx calibrate) and give the file as 'profile'"
)


@dataclass(frozen=True)
class Settings:
    """What every process of an engine goes by.

    Attributes:
        config: the triangle layers and the geometry; its layers are spelled out, and exist in the model.
        num_layers: decoder layers of the model.
        lowering: what computes streaming rows; "auto": the platform's, and dense where that is no slower.
        strict: whether a triangle layer that cannot go sparse is an error.
        stats_log_interval: seconds between two lines of counters in the log; 0: none.
    """

    config: TriangleMixConfig
    num_layers: int
    lowering: str = "auto"
    strict: bool = False
    stats_log_interval: float = 60.0

    def limit(self, device: str) -> int:
        """Up to which length a prompt stays dense on a type of device; "auto" leaves it so where it would lose."""
        geometry, least = self.config.geometry, self.config.min_seq_len
        if device == "cpu" and self.lowering == "auto":
            # The share that a GPU has; ours lost no case that was measured (benchmarks/results/vllm_cpu.json).
            return max(least, break_even(geometry) - 1)
        return least_length(self.lowering, torch.device(device), least, geometry)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, for :func:`handed_over`."""
        config = self.config
        return {
            _RESOLVED: self.num_layers,
            "triangle_layer_indices": list(config.layers()),
            **{name: getattr(config, name) for name in (*GEOMETRY, "min_seq_len")},
            "lowering": self.lowering,
            "strict": self.strict,
            "stats_log_interval": self.stats_log_interval,
        }


def handed_over(additional: Any) -> Settings | None:
    """The settings that another process, or an earlier look, left in ``additional_config``; None: there are none."""
    found = additional.get(KEY) if isinstance(additional, Mapping) else None
    if not isinstance(found, Mapping) or _RESOLVED not in found:
        return None
    names = (*GEOMETRY, "min_seq_len", "triangle_layer_indices")
    config = TriangleMixConfig(**{name: found[name] for name in names})
    rest = {name: found[name] for name in ("lowering", "strict", "stats_log_interval")}
    return Settings(config, found[_RESOLVED], **rest)


@dataclass(frozen=True)
class Asked:
    """What the user gave, checked as far as it can be without a model.

    Attributes:
        inference: the values under the names of the original API.
        given: the names that the user gave a value for.
        own: the values of the plugin's own keys that the user gave.
    """

    inference: TriangleMixInferenceConfig
    given: frozenset[str]
    own: Mapping[str, Any]

    def resolve(self, num_layers: int) -> tuple[Settings | None, list[str]]:
        """The settings for a model of ``num_layers`` decoder layers, and warnings; None: no layer goes sparse.

        Raises:
            ValueError: a layer that the model does not have, or a profile that does not fit it.
        """
        config, warnings = self._config(num_layers)
        if not config.layers():
            return None, [*warnings, "the configuration selects no triangle layer: every layer stays dense"]
        if config.dynamic_layers():
            warnings = [*warnings, f"layers {list(config.dynamic_layers())} choose no blocks here: they stay dense"]
        plain = config.replace(
            num_triangle_layers=None, triangle_layer_indices=config.layers(), dynamic_layer_indices=None
        )
        rest = {name: self.own[name] for name in ("lowering", "strict", "stats_log_interval") if name in self.own}
        return Settings(plain, num_layers, **rest), warnings

    def _config(self, num_layers: int) -> tuple[TriangleMixConfig, list[str]]:
        shorter = {"min_seq_len": self.own["min_seq_len"]} if "min_seq_len" in self.own else {}
        profile = self.own.get("profile")
        if profile is not None:
            overrides = {name: getattr(self.inference, name) for name in GEOMETRY if name in self.given}
            count = self.inference.num_triangle_layers
            try:
                config = TriangleMixConfig.from_profile(
                    profile, num_layers=num_layers, num_triangle_layers=count, **overrides, **shorter
                )
            except OSError as error:
                raise ValueError(f"profile={profile!r} cannot be read: {error}") from error
            return config, []
        found = self.inference.to_trianglemix_config()
        assert found is not None  # read() gives nothing while it is switched off
        config = found.replace(**shorter)
        config.check_layers(num_layers)
        warnings = (
            [_ANALYSIS] if self.inference.use_gradient_analysis and not self.inference.triangle_layer_indices else []
        )
        if config.uses_first_n:
            warnings.append(first_n_message(config.num_triangle_layers or 0))
        return config, warnings


def read(environ: Mapping[str, str], additional: Any) -> Asked | None:
    """What the environment and ``additional_config`` ask for; None: TriangleMix is off.

    ``additional_config`` may hold a mapping under ``"trianglemix"``: the names of
    :class:`~tmx_compile.legacy.inference.TriangleMixInferenceConfig`, and profile (a path), min_seq_len, lowering,
    strict, stats_log_interval (seconds). It switches TriangleMix on unless it says ``enable_trianglemix: false``, and
    its values go before the environment's.

    Raises:
        ValueError: a bad value, with the variable or key and the value.
    """
    mapping = additional.get(KEY) if isinstance(additional, Mapping) else None
    switch = {_VARIABLE: environ.get(_VARIABLE, "")}
    if mapping is None and not TriangleMixInferenceConfig.from_env(switch).enable_trianglemix:
        # Off: what else the environment says is nobody's business.
        return None
    from_environment = TriangleMixInferenceConfig.from_env(environ)
    defaults = TriangleMixInferenceConfig()
    values = {
        name: getattr(from_environment, name)
        for name in _INFERENCE
        if getattr(from_environment, name) != getattr(defaults, name)
    }
    path = environ.get(PROFILE_VARIABLE, "").strip()
    if path:
        values["profile"] = path
    if mapping is not None:
        checked = _checked(mapping)
        values = {_SWITCH: True, **_without_layers(values, checked), **checked}
    if not values.get(_SWITCH, False):
        return None
    own = {name: values[name] for name in _OWN if values.get(name) is not None}
    inference = TriangleMixInferenceConfig(**{name: values[name] for name in values if name in _INFERENCE})
    if own.get("profile") is not None and inference.triangle_layer_indices:
        raise ValueError(
            f"profile={own['profile']!r} and triangle_layer_indices={list(inference.triangle_layer_indices)} both name "
            "layers: give one of them"
        )
    return Asked(inference, frozenset(values), own)


def _without_layers(values: Mapping[str, Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The environment's values, without its layers where the configuration says which they are."""
    layers = ("num_triangle_layers", "triangle_layer_indices", "profile")
    chosen = any(name in mapping for name in layers)
    return {name: value for name, value in values.items() if not (chosen and name in layers)}


def _checked(mapping: Any) -> dict[str, Any]:
    """The mapping in ``additional_config``, each value looked at by itself, so that a refusal names its key."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{KEY} in additional_config must be a mapping, got {mapping!r}")
    for name, value in mapping.items():
        try:
            _check(name, value)
        except ValueError as error:
            raise ValueError(f"{KEY}.{name} in additional_config: {error}") from error
    return dict(mapping)


def _check(name: str, value: Any) -> None:
    if name in _INFERENCE:
        TriangleMixInferenceConfig(**{name: value})
    elif name == "profile":
        if not (value is None or (isinstance(value, str) and value)):
            raise ValueError(f"profile must be the path of a file, got {value!r}")
    elif name == "min_seq_len":
        as_count(name, value)
    elif name == "lowering":
        if value not in _LOWERINGS:
            raise ValueError(f"lowering must be one of {', '.join(_LOWERINGS)}, got {value!r}")
    elif name == "strict":
        as_bool(name, value)
    elif name == "stats_log_interval":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 <= value < float("inf")):
            raise ValueError(f"stats_log_interval must be a number of seconds from 0 on, got {value!r}")
    else:
        raise ValueError(f"unknown key, value {value!r}; known here: {', '.join((*_INFERENCE, *_OWN))}")
