"""Captured graphs: the one attention of a graph, and what in a graph has rows and keys."""

import torch

from tmx_compile.find import find_attention
from tmx_compile.graph.nodes import op_name, value_of
from tmx_compile.testing import captured_graphs


def found_in(call, *args, dynamic=False):
    (gm,) = captured_graphs(call, *args, dynamic=dynamic)
    (found,) = find_attention(gm)
    return found


def squares(gm, n):
    """The tensors that have rows and keys: none may be left."""
    values = [(node, value_of(node)) for node in gm.graph.nodes]
    return [x.name for x, v in values if isinstance(v, torch.Tensor) and sum(bool(s == n) for s in v.shape) > 1]


def called(node):
    """The bare name of what a node calls."""
    return op_name(node).rpartition(".")[2]
