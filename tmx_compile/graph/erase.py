"""Erase what nothing needs any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch.fx import Node

from tmx_compile.graph.effects import Effects
from tmx_compile.graph.nodes import op_name


def erase_dead(graph: torch.fx.Graph, roots: Iterable[Node], may_go: Collection[Node] = ()) -> int:
    """Erase the roots and what only they needed; returns how many nodes went.

    ``may_go`` are calls that may go although they do more than give a result.

    ``Graph.eliminate_dead_code`` is not used: it takes an in-place method call without users for dead.
    """
    effects = Effects()
    erased = 0
    stack = list(roots)
    gone: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in gone or not all(map(_only_asserts, node.users)) or node.op in ("placeholder", "output"):
            continue
        if node not in may_go and _does_more(node, effects):
            continue
        for assertion in list(node.users):
            graph.erase_node(assertion)
            gone.add(assertion)
        inputs = node.all_input_nodes
        graph.erase_node(node)
        gone.add(node)
        erased += 1
        stack.extend(inputs)
    return erased


def dead_ends(node: Node) -> list[Node] | None:
    """The last of the nodes that depend on ``node``, if nothing needs them; None where something does.

    :func:`erase_dead` of the last nodes erases ``node`` and all that depends on it.
    """
    effects = Effects()
    ends: list[Node] = []
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op not in ("call_function", "call_method") or _does_more(current, effects):
            return None
        stack.extend(current.users)
        ends.extend([] if current.users else [current])
    return ends


def _does_more(node: Node, effects: Effects) -> bool:
    """Whether a call does more than give a result."""
    return node.op == "call_module" or node.is_impure() or bool(effects.of(node).writes)


def _only_asserts(node: Node) -> bool:
    """Whether a node does nothing but check the dtype and device of a tensor (export asks before every cast)."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default and not node.users


def drop_unread(graph: torch.fx.Graph) -> None:
    """Erase entries of a tuple that nothing reads; they would keep the attention call that they belong to."""
    names = ("getitem", "detach", "alias")
    erase_dead(graph, [node for node in graph.nodes if not node.users and op_name(node) in names])
