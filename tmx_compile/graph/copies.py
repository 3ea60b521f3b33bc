"""Copies of a graph that share its parameters."""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy of the graph that shares parameters and example values with the original."""
    graph = Graph()
    moved: dict[Node, Node] = {}
    output = graph.graph_copy(gm.graph, moved)
    graph.output(output).meta = dict(gm.graph.output_node().meta)
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy
