"""Reading what users hand over: counts, switches, layers. Bad values are a ``ValueError`` with name and value."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Counts become 32-bit kernel arguments.
_COUNT_LIMIT = 2**31


def as_count(name: str, value: Any, minimum: int = 0) -> int:
    """Return ``value`` as a plain ``int``, at least ``minimum`` (0 or 1) and below 2**31.

    Accepts whatever implements ``__index__`` (NumPy integers too), except booleans. Anything else is a
    ``ValueError`` that names the parameter and shows the value.
    """
    # A boolean tensor implements __index__, so the type alone does not give it away.
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        count = None if is_bool else int(operator.index(value))
    except TypeError:
        count = None
    if count is None or count < minimum:
        kind = "a positive integer" if minimum else "a non-negative integer"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    if count >= _COUNT_LIMIT:
        raise ValueError(f"{name} must be less than 2**31, got {count}")
    return count


def as_bool(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")


def as_layer_indices(name: str, value: Any) -> tuple[int, ...]:
    """Return layers, counted from 0, ascending; a negative or repeated one is refused."""
    try:
        if isinstance(value, (str, bytes, bytearray, Mapping)):
            raise TypeError
        items = list(value)
    except TypeError:
        raise ValueError(f"{name} must be a sequence of layer indices, got {value!r}") from None
    indices = sorted(as_count(f"{name}[{place}]", index) for place, index in enumerate(items))
    repeated = sorted({index for index, following in itertools.pairwise(indices) if index == following})
    if repeated:
        listed = ", ".join(map(str, repeated))
        raise ValueError(f"{name} must not repeat a layer, got {listed} more than once")
    return tuple(indices)


def refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names of parameters that do not exist."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {', '.join(unknown)}; known here: {', '.join(known)}")
