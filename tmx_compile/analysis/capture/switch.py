"""Attention that can be switched while the model runs: dense, triangle, dynamic, or dense with its Middle recorded.

Each proven site of a captured graph becomes a :class:`SwitchedAttention` of its layer; all of them look at one
:class:`Switchboard`. So any set of sparse layers runs without another compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tmx_compile.analysis.capture.sections import AttentionInputs, Piece, RecordMiddle, SectionSums
from tmx_compile.graph.erase import erase_dead
from tmx_compile.graph.nodes import LAYER
from tmx_compile.mask.geometry import Geometry
from tmx_compile.mask.selection import Selection
from tmx_compile.operator import OPERATOR


@dataclass
class Switchboard:
    """What the attention of every layer does in the next run, and what the last one did.

    Attributes:
        geometry: sinks, window and last rows of a sparse layer.
        sparse: the layers with triangle attention.
        dynamic: by layer, how those choose their blocks that do; all others are dense.
        pieces: what the rows of a sparse layer's call are, one after the other, each with its end and geometry; empty:
            the call is one prompt with the geometry above.
        recorder: gets the layer and the sums of its Middle section when the gradient passes; None: nothing is recorded.
        visited: the layers that have run.
        blocks: of each call of the last run's dynamic layers (2,) blocks visited, and those of dense attention.
        not_dynamic: the layers that cannot choose blocks, and why; of all runs.
        shapes: what each call of the last run's layers had: query heads, key heads, head dim, head dim of values, and
            the layer's own window or None.
        gates: one tensor per recorded call, to ask gradients of: that sends the gradient through every layer.
    """

    geometry: Geometry
    sparse: frozenset[int] = frozenset()
    dynamic: Mapping[int, Selection] = field(default_factory=dict)
    pieces: tuple[Piece, ...] = ()
    recorder: Callable[[int, SectionSums], None] | None = None
    visited: set[int] = field(default_factory=set)
    blocks: dict[int, list[Tensor]] = field(default_factory=dict)
    not_dynamic: dict[int, str] = field(default_factory=dict)
    shapes: dict[int, list[tuple[int, int, int, int, int | None]]] = field(default_factory=dict)
    gates: list[Tensor] = field(default_factory=list)

    def attend(self, layer: int, inputs: AttentionInputs) -> Tensor:
        """The attention of one layer as the switches say: (B, H, Sq, Dv)."""
        self.visited.add(layer)
        _, heads, _, dim = inputs.query.shape
        _, kv_heads, _, value_dim = inputs.value.shape
        self.shapes.setdefault(layer, []).append((heads, kv_heads, dim, value_dim, inputs.reach))
        why = inputs.against_dynamic
        if why:
            self.not_dynamic[layer] = why
        selection = self.dynamic.get(layer)
        if selection is not None:
            if why:
                raise ValueError(f"dynamic must not name layer {layer}, which has {why}")
            out, blocks = inputs.chosen(selection)
            self.blocks.setdefault(layer, []).append(blocks)
            return out
        if layer in self.sparse:
            return inputs.in_pieces(self.pieces) if self.pieces else inputs.sparse(self.geometry)
        recorder = self.recorder
        if recorder is None:
            return inputs.dense()
        gate = torch.zeros((), device=inputs.query.device, requires_grad=True)
        self.gates.append(gate)
        return RecordMiddle.apply(  # type: ignore[no-untyped-call,no-any-return]
            gate,
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.key_mask,
            self.geometry,
            inputs.scale,
            inputs.reach,
            None if inputs.sink_logits is None else inputs.sink_logits.detach(),
            inputs.softcap,
            lambda sums: recorder(layer, sums),
        )


class SwitchedAttention(nn.Module):
    """The attention of one layer in a captured graph."""

    def __init__(self, board: Switchboard, layer: int) -> None:
        super().__init__()
        self.board = board
        self.layer = layer

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        scale: float,
        reach: int | None = None,
        sink_logits: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Operands as :func:`tmx_compile.operator.triangle_attention` takes them; (B, H, Sq, Dv)."""
        inputs = AttentionInputs(query, key, value, key_mask, scale, reach, sink_logits, softcap)
        out = self.board.attend(self.layer, inputs)
        # The memory of the operator's result: what follows may view it.
        return out.transpose(1, 2).contiguous().transpose(1, 2)


def install(gm: GraphModule, board: Switchboard, layers: frozenset[int]) -> set[int]:
    """Put a switch in the place of every operator node of the graph and its child graphs, in place.

    ``layers`` are those that may go sparse; the operator stays where a site is of another layer, and dense. Returns the
    layers that got a switch.
    """
    found: set[int] = set()
    for child in [module for module in gm.modules() if isinstance(module, GraphModule)]:
        for node in list(child.graph.nodes):
            layer = node.meta.get(LAYER) if node.target is OPERATOR else None
            if layer is None or layer not in layers:
                continue
            _switch(child, node, board, layer)
            found.add(layer)
        child.graph.lint()
        child.recompile()
    return found


def _switch(gm: GraphModule, node: Node, board: Switchboard, layer: int) -> None:
    name = f"tmx_attention_{layer}"
    if not hasattr(gm, name):
        gm.add_submodule(name, SwitchedAttention(board, layer))
    query, key, value, key_mask, _, _, _, *rest = node.args
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, (query, key, value, key_mask, *rest))
    for user in list(node.users):
        call.meta = dict(user.meta)
        user.replace_all_uses_with(call)
        gm.graph.erase_node(user)
    erase_dead(gm.graph, [node])
