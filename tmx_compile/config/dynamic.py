"""The part of a configuration that is about layers whose blocks are chosen at run time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tmx_compile.config.values import as_layer_indices
from tmx_compile.mask.selection import (
    Selection,
    checked_block,
    checked_group,
    checked_method,
    checked_share,
    usual_group,
)

DYNAMIC = ("dynamic_layer_indices", "dynamic_share", "dynamic_method", "dynamic_block", "dynamic_group")
"""The parameters of dynamic layers, in order."""
ONLY_GROUP = 16
"""What files from before there was a choice of groups mean."""


def checked(values: Mapping[str, Any], triangle: Sequence[int]) -> dict[str, Any]:
    """The parameters of :data:`DYNAMIC` as they are kept; ``ValueError`` also where a layer is to be both."""
    given = values["dynamic_layer_indices"]
    # Read once: it may be an iterator, and shares are in its order.
    given = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping)) else given
    indices = None if given is None else as_layer_indices("dynamic_layer_indices", given)
    both = [layer for layer in indices or () if layer in triangle]
    if both:
        raise ValueError(f"dynamic_layer_indices must name no triangle layer, got {', '.join(map(str, both))}")
    method = checked_method("dynamic_method", values["dynamic_method"])
    block = checked_block("dynamic_block", values["dynamic_block"])
    group = values["dynamic_group"]
    return {
        "dynamic_layer_indices": indices,
        "dynamic_share": _shares(values["dynamic_share"], given or ()),
        "dynamic_method": method,
        "dynamic_block": block,
        "dynamic_group": usual_group(method, block) if group is None else checked_group("dynamic_group", group, block),
    }


def _shares(shares: Any, layers: Sequence[Any]) -> float | tuple[float, ...]:
    """One share for all layers; or, where they differ, one for each in the order of the layers when these ascend."""
    if not isinstance(shares, (list, tuple)):
        return checked_share("dynamic_share", shares)
    if len(shares) != len(layers):
        raise ValueError(
            f"dynamic_share must be a number, or one for each of the {len(layers)} layers of dynamic_layer_indices, "
            f"got {len(shares)}"
        )
    found = [checked_share(f"dynamic_share[{place}]", share) for place, share in enumerate(shares)]
    ordered = tuple(found[place] for place in sorted(range(len(layers)), key=lambda place: int(layers[place])))
    return ordered[0] if len({*ordered}) == 1 else ordered or Selection.share


def profile_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``dynamic`` of a profile: empty where there are no dynamic layers."""
    if not values["dynamic_layer_indices"]:
        return {}
    return {"dynamic": {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}}


def from_profile_section(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments out of a profile's section, which need not be there."""
    if "dynamic" not in profile:
        return {}
    section = profile["dynamic"]
    if not isinstance(section, dict) or {*section, "dynamic_group"} != set(DYNAMIC):
        raise ValueError(f"dynamic must hold {', '.join(DYNAMIC)} and no more, got {section!r}")
    return {"dynamic_group": ONLY_GROUP, **section}
