"""Putting a function of ours in the place of one of vLLM's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "trianglemix_wraps"


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method by what ``make`` makes of it, once in a process. ``inspect`` still shows its own parameters.

    Args:
        owner: the class.
        name: the method.
        make: takes the method, and returns a function that calls it.
    """
    plain = getattr(owner, name)
    if not hasattr(plain, _MARK):
        made = functools.wraps(plain)(make(plain))
        setattr(made, _MARK, plain)
        setattr(owner, name, made)
