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
from tmx_compile.graph.nodes import value_of
from tmx_compile.operator.prefill import current_chunk
from tmx_compile.passes.pipeline import Options, plan_graph, rewrite_graph
from tmx_compile.proof.constants import watched
from tmx_compile.proof.own_key import own_key
from tmx_compile.report import Reason, log

_ELSEWHERE = (Reason.NOT_SELECTED, Reason.FEW_KEYS, Reason.LAYER_UNKNOWN, Reason.LAYER_AMBIGUOUS)


@dataclass(frozen=True)
class OneRow:
    """The second form of a graph of one row, and how to tell from a call's arguments how many tokens it sees.

    ``form`` is None where strict mode forbids what the call would get: ``refused`` tells why.
    """

    form: Callable[..., Any] | None
    refused: str
    keys: Any
    sizes: Mapping[Any, tuple[int, int | None]]

    def seen(self, args: Sequence[Any]) -> int | None:
        """Number of keys of one call, or None where the arguments do not tell."""
        if self.keys is None:
            return None
        values = {
            symbol: args[position] if dim is None else args[position].shape[dim]
            for symbol, (position, dim) in self.sizes.items()
        }
        return int(self.keys.xreplace(values))

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


def one_row_chunk(gm: GraphModule, options: Options, example_inputs: Sequence[Any]) -> OneRow | None:
    """The second form of a graph, or None where it is no graph of one row; the graph itself stays as it is."""
    form = copy_graph(gm)
    plan = plan_graph(form, replace(options, one_row_chunks=True, strict=False), example_inputs)
    rows = [item for item in plan.sites if item.site is not None and item.site.q_len == 1 and item.selected]
    if not rows or len(rows) != sum(item.selected for item in plan.sites):
        return None
    refused = ""
    for item in rows:
        if item.verdict is not None and item.verdict.reason not in _ELSEWHERE:
            refused = f"{item.layer.path}: {item.verdict}"
            log.warning("one row is a decode step even in prefill(...): %s", refused)
    if options.strict and refused:
        return OneRow(None, refused, None, {})
    if not plan.triangle:
        return None
    site = plan.triangle[0].site
    assert site is not None
    keys = site.kv_len
    # A static cache has more keys than tokens: there only the operator finds out.
    growing = own_key(site) == "last"
    expression = keys.node.expr if growing and isinstance(keys, torch.SymInt) else None
    sizes = {} if expression is None else _sizes(gm, expression.free_symbols)
    if sizes is None:
        expression, sizes = None, {}
    as_written = copy_graph(gm).forward if plan.known and not options.strict else None
    return OneRow(watched(rewrite_graph(plan).gm.forward, plan.known, as_written), refused, expression, sizes)


def _sizes(gm: GraphModule, symbols: set[Any]) -> dict[Any, tuple[int, int | None]] | None:
    """Where the graph's inputs carry each symbol: an input's position, and the dimension of a tensor."""
    found: dict[Any, tuple[int, int | None]] = {}
    for position, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = value_of(node)
        sizes = list(enumerate(value.shape)) if isinstance(value, torch.Tensor) else [(None, value)]
        for dim, size in sizes:
            if isinstance(size, torch.SymInt):
                found.setdefault(size.node.expr, (position, dim))
    return {symbol: found[symbol] for symbol in symbols} if all(symbol in found for symbol in symbols) else None
