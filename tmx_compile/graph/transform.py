"""Which nodes of a graph stand inside a ``torch.func`` transform: vmap, grad, vjp, jvp, functionalize.

Dynamo writes a transform as calls around the nodes that it applies to: one that raises the level of nesting, and one
that lowers it. Inside, tensors are wrapped: a batched one has other shapes than it shows.
"""

from __future__ import annotations

from torch.fx import Graph, Node

_BEGINS, _ENDS = "_increment_nesting", "_decrement_nesting"


def transforms(graph: Graph) -> dict[Node, tuple[str, ...]]:
    """The transforms around each node that has any, outermost first: "vmap", "grad" (also of a vjp), "jvp", "func"."""
    around: dict[Node, tuple[str, ...]] = {}
    level: tuple[str, ...] = ()
    for node in graph.nodes:
        target = node.target
        name = getattr(target, "__name__", "")
        ours = node.op == "call_function" and str(getattr(target, "__module__", "")).startswith("torch.")
        if ours and name.endswith(_BEGINS):
            level = (*level, name.removesuffix(_BEGINS).strip("_"))
        elif ours and name.endswith(_ENDS):
            level = level[:-1]
        elif level:
            around[node] = level
    return around
