"""A graph of one row serves decode steps; where that row belongs to a prompt, a second form of the graph does.

Without this, a chunk of one token would be taken for a decode step. The second form runs as it is, uncompiled: such
chunks are rare (the remainder of a prompt), and decode steps keep their own graph to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from tmx_compile.errors import StrictModeError
from tmx_compile.graph.copies import copy_graph
from tmx_compile.graph.sizes import SizeInput, size_inputs
from tmx_compile.lowering.table import Role
from tmx_compile.operator.prefill import current_chunk
from tmx_compile.passes import pipeline
from tmx_compile.proof.constants import watched
from tmx_compile.proof.own_key import OwnKey
from tmx_compile.report import Reason, log
from tmx_compile.request import Host, Request

_ELSEWHERE = (Reason.NOT_SELECTED, Reason.FEW_KEYS, Reason.LAYER_UNKNOWN, Reason.LAYER_AMBIGUOUS)


@dataclass(frozen=True)
class OneRow:
    """The second form of a graph of one row, and how to tell from a call's arguments how many tokens it sees.

    ``form`` is None where strict mode forbids what the call would get: ``refused`` tells why.
    """

    form: Callable[..., Any] | None
    refused: str
    keys: Any
    sizes: Mapping[Any, SizeInput]

    def seen(self, args: Sequence[Any]) -> int | None:
        """Number of keys of one call, or None where the arguments do not tell."""
        if self.keys is None:
            return None
        return int(self.keys.xreplace({symbol: where.read(args) for symbol, where in self.sizes.items()}))

    def beside(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled graph for decode steps, and this form for rows of a prompt."""

        def run(*args: Any) -> Any:
            chunk = current_chunk()
            if chunk is None:
                return compiled(*args)
            seen = self.seen(args) if chunk.totals is not None else None
            if seen is not None and chunk.totals is not None and seen > max(chunk.totals):
                return compiled(*args)
            if self.form is None:
                raise StrictModeError(f"one row of a prompt that cannot go sparse: {self.refused}")
            return self.form(*args)

        return run


def one_row_chunk(gm: GraphModule, request: Request, host: Host, example_inputs: Sequence[Any]) -> OneRow | None:
    """The second form of a graph, or None where it is no graph of one row; the graph itself stays as it is."""
    lenient = replace(request, strict=False)
    plan = pipeline.decide(gm, lenient, host, example_inputs, row_of_prompt=True)
    rows = [item for item in plan.sites if item.role is Role.ROW_OF_PROMPT and item.selected]
    if not rows or len(rows) != sum(item.selected for item in plan.sites):
        return None
    refused = ""
    for item in rows:
        if item.why is not None and item.why.reason not in _ELSEWHERE:
            refused = f"{item.layer.path}: {item.why}"
            log.warning("one row is a decode step even in prefill(...): %s", refused)
    if request.strict and refused:
        return OneRow(None, refused, None, {})
    if not plan.triangle:
        return None
    first = plan.triangle[0]
    assert first.site is not None
    keys = first.site.kv_len
    # A static cache has more keys than tokens: there only the operator finds out.
    growing = first.own_key is OwnKey.LAST
    expression = keys.node.expr if growing and isinstance(keys, torch.SymInt) else None
    told = size_inputs(gm.graph)
    if expression is not None and not all(symbol in told for symbol in expression.free_symbols):
        expression = None
    sizes = {} if expression is None else {symbol: told[symbol] for symbol in expression.free_symbols}
    as_written = copy_graph(gm).forward if plan.known and not request.strict else None
    form = pipeline.rewrite(plan, gm).graph.forward
    return OneRow(watched(form, plan.known, as_written), refused, expression, sizes)
