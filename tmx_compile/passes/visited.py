"""A graph's own count of the blocks that its dynamic layers visited in the last run, for the report to read."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from tmx_compile.graph.nodes import fake_mode_of, tensor_of, written
from tmx_compile.lowering.block_sparse import OPERATORS
from tmx_compile.passes.plan import Plan


def count(plan: Plan) -> Plan:
    """Let the graph return its counts, (sites, 2) int64, behind its own results: :func:`counted` takes them off.

    A buffer that it writes to would be none of the model's, which AOTAutograd does not take.
    """
    graph = plan.gm.graph
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in OPERATORS]
    if not calls:
        return plan
    fake_mode = fake_mode_of(plan.gm)
    mine: list[Node] = []
    for call in calls:
        with graph.inserting_after(call):
            mine.append(written(graph.call_function(operator.getitem, (call, 1)), call, fake_mode))
    output = graph.output_node()
    with graph.inserting_before(output):
        together = written(graph.call_function(torch.stack, (mine,)), calls[-1], fake_mode)
    output.args = ((*output.args[0], together),)  # type: ignore[misc]
    like = tensor_of(together)
    assert like is not None
    with unset_fake_temporarily():
        return replace(plan, visited=torch.zeros(len(calls), 2, dtype=torch.int64, device=like.device))


def counted(compiled: Callable[..., Any], visited: Tensor) -> Callable[..., Any]:
    """What runs a graph that returns its counts, and keeps them in ``visited``: on the device, nothing waits for it."""

    def run(*args: Any) -> Any:
        *results, counts = compiled(*args)
        visited.copy_(counts)
        return tuple(results)

    return run
