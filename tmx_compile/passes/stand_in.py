"""What stands in for a compiled graph where nothing is to run: zeros of the right shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from tmx_compile.graph.nodes import value_of
from tmx_compile.passes.lengths import hint


def zeros_of(gm: GraphModule) -> Callable[..., Any]:
    """A stand-in for a compiled graph: its inputs where it returns them, else zeros that take no memory."""
    placeholders = {node: i for i, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    outputs = gm.graph.output_node().args[0]

    def run(*args: Any) -> Any:
        def result(node: torch.fx.Node) -> Any:
            if node in placeholders:
                return args[placeholders[node]]
            value = value_of(node)
            if not isinstance(value, torch.Tensor):
                return hint(value) if isinstance(value, torch.SymInt) else value
            if any(isinstance(size, torch.SymInt) and not size.node.has_hint() for size in value.shape):
                raise ValueError(f"explain cannot tell the shape of {node.name} without running the model")
            shape = [hint(size) for size in value.shape]
            return torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)

        return torch.fx.node.map_arg(outputs, result)

    return run
