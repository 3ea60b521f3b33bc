"""The file of a saved calibration: its format, and what a configuration takes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tmx_compile.config.values import as_count

if TYPE_CHECKING:
    from torch import nn

PROFILE_FORMAT = "tmx-profile-1"
GEOMETRY = ("num_sink_tokens", "sliding_window_size", "num_last_tokens")
"""The parameters that a geometry is made of, in order."""


def profile_values(profile: Any, num_layers: int, wanted: int | None) -> dict[str, Any]:
    """Constructor arguments out of a parsed profile; the caller adds the path to a refusal."""
    if not isinstance(profile, dict) or profile.get("format") != PROFILE_FORMAT:
        found = profile.get("format") if isinstance(profile, dict) else type(profile).__name__
        raise ValueError(f"format must be {PROFILE_FORMAT!r}, got {found!r}")
    model, geometry = profile.get("model"), profile.get("geometry")
    if not isinstance(model, dict) or not isinstance(geometry, dict):
        raise ValueError("it lacks a model or a geometry section")
    made_for = as_count("model.num_layers", model.get("num_layers"), minimum=1)
    if made_for != num_layers:
        raise ValueError(f"it is for a model of {made_for} layers, this one has num_layers={num_layers}")
    if set(geometry) != set(GEOMETRY):
        raise ValueError(f"geometry must hold {', '.join(GEOMETRY)} and no more, got {', '.join(geometry)}")
    name = "triangle_layer_indices" if wanted is None else "ranking"
    layers = profile.get(name)
    if not isinstance(layers, list):
        raise ValueError(f"{name} must be a list, got {layers!r}")
    if wanted is not None:
        if wanted > len(layers):
            raise ValueError(f"num_triangle_layers must be at most the {len(layers)} layers it ranks, got {wanted}")
        layers = layers[:wanted]
    optional = {"min_seq_len": profile["min_seq_len"]} if "min_seq_len" in profile else {}
    return {**geometry, **optional, "triangle_layer_indices": layers}


def check_model(described: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a profile whose ``model`` section describes another model than the one at hand."""
    # Here and not above: only this needs more than the standard library.
    from tmx_compile.config.fingerprint import ModelFingerprint

    if "fingerprint" not in described:
        raise ValueError("it has no fingerprint, so whether it is for this model cannot be told")
    ModelFingerprint.from_dict(described["fingerprint"]).check(model)
