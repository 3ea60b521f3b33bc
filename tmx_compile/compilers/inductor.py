"""Inductor, with the user's mode and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx import GraphModule


class Compiler(Protocol):
    """What turns a graph into code: Inductor or torchair."""

    def compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], needed: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The compiled graph."""


class Inductor:
    """Compiles graphs as ``torch.compile`` does by default.

    Args:
        mode: as for ``torch.compile``.
        options: Inductor's settings by name.
    """

    def __init__(self, mode: str | None, options: Mapping[str, Any]) -> None:
        self._patches: dict[str, Any] = {}
        if mode is not None and mode != "default":
            self._patches.update(torch._inductor.list_mode_options(mode))
        self._patches.update({name.replace("-", "_"): value for name, value in options.items()})

    def compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], needed: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """Compile with the user's settings, over which a lowering's needs win (it could not compile without)."""
        from torch._inductor.compile_fx import compile_fx

        patches = {**self._patches, **(needed or {})}
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches or None)
        return compiled
