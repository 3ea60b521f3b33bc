"""Copies of a graph that share its parameters."""

from __future__ import annotations

import copy

from torch.fx import Graph, GraphModule, Node

from tmx_compile.graph.nodes import INSERTED

_SOURCE = "_dynamo_source"


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy with a graph of its own; parameters, child graphs, hooks and example values are shared."""
    graph = Graph()
    moved: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, moved)
    graph.output(output).meta = dict(gm.graph.output_node().meta)
    for node in graph.nodes:
        # What an earlier rewriting inserted is part of the graph by now.
        node.meta.pop(INSERTED, None)
    keep_names(gm.graph, graph)
    return with_graph(gm, graph)


def keep_names(before: Graph, after: Graph) -> None:
    """Give inputs their names and sources back: a copy names none as a builtin (``input``), and signatures need it."""
    for old, new in zip(before.find_nodes(op="placeholder"), after.find_nodes(op="placeholder"), strict=True):
        new.name = old.name
        # AOTAutograd asks every input of a graph of Dynamo's where it comes from.
        if hasattr(old, _SOURCE):
            setattr(new, _SOURCE, getattr(old, _SOURCE))


def with_graph(gm: GraphModule, graph: Graph) -> GraphModule:
    """The same module with another graph."""
    graph.set_codegen(copy.deepcopy(gm.graph._codegen))
    made = GraphModule(gm, graph, gm.__class__.__name__)
    made.meta = dict(gm.meta)
    made.training = gm.training
    for name, value in gm.__dict__.items():
        # Hooks, and what torch.export keeps on its modules (guards, replaced train and eval).
        if name not in made.__dict__:
            made.__dict__[name] = value
        elif name.endswith("_hooks") or name.startswith(("_forward_hooks", "_forward_pre_hooks")):
            made.__dict__[name] = copy.copy(value)
    return made
