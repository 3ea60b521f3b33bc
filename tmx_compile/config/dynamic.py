"""The part of a configuration that is about layers whose blocks are chosen at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tmx_compile.config.values import as_layer_indices
from tmx_compile.mask.selection import checked_block, checked_method, checked_share

DYNAMIC = ("dynamic_layer_indices", "dynamic_share", "dynamic_method", "dynamic_block")
"""The parameters of dynamic layers, in order."""


def checked(values: Mapping[str, Any], triangle: Sequence[int]) -> dict[str, Any]:
    """The parameters of :data:`DYNAMIC` as they are kept; ``ValueError`` also where a layer is to be both."""
    indices = values["dynamic_layer_indices"]
    if indices is not None:
        indices = as_layer_indices("dynamic_layer_indices", indices)
        both = [layer for layer in indices if layer in triangle]
        if both:
            raise ValueError(f"dynamic_layer_indices must name no triangle layer, got {', '.join(map(str, both))}")
    return {
        "dynamic_layer_indices": indices,
        "dynamic_share": checked_share("dynamic_share", values["dynamic_share"]),
        "dynamic_method": checked_method("dynamic_method", values["dynamic_method"]),
        "dynamic_block": checked_block("dynamic_block", values["dynamic_block"]),
    }


def profile_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``dynamic`` of a profile: empty where there are no dynamic layers."""
    if not values["dynamic_layer_indices"]:
        return {}
    return {"dynamic": {**values, "dynamic_layer_indices": list(values["dynamic_layer_indices"])}}


def from_profile_section(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments out of a profile's section, which need not be there."""
    if "dynamic" not in profile:
        return {}
    section = profile["dynamic"]
    if not isinstance(section, dict) or set(section) != set(DYNAMIC):
        raise ValueError(f"dynamic must hold {', '.join(DYNAMIC)} and no more, got {section!r}")
    return section
