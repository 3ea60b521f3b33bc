"""Lower the operator's nodes of one graph. What is the same for every layer is written once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.errors import VerificationError
from tmx_compile.graph.erase import erase_dead
from tmx_compile.graph.layout import NAME, laid_out
from tmx_compile.graph.nodes import ORIGIN, fake_mode_of, tensor_of
from tmx_compile.graph.sizes import size_of
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer
from tmx_compile.lowering.block_sparse import BlockSparse
from tmx_compile.passes.plan import Plan


def lower(plan: Plan) -> Plan:
    """Stage 8, lower: write out what every operator's node computes, and in which layout."""
    lowerer = Lowerer(plan.gm, fake_mode_of(plan.gm))
    for item in plan.sites:
        if item.operator is not None:
            assert item.lowering is not None
            assert item.call is not None
            lowerer.lower(item.operator, item.call, item.lowering)
    lowerer.settle()
    return plan


def inductor_options(plan: Plan) -> Mapping[str, Any]:
    """The Inductor settings that the lowered calls of one graph need together."""
    options: dict[str, Any] = {}
    for item in plan.sites:
        if item.lowering is not None and item.call is not None:
            options.update(item.lowering.inductor_options(item.call))
    return options


@dataclass(frozen=True)
class _Emission:
    """The nodes that a lowering wrote for one call, in order, and the tensors they read."""

    operands: tuple[Node, ...]
    nodes: tuple[Node, ...]
    out: Node


class Lowerer:
    """Lowers operator nodes of one graph, in graph order.

    A lowering runs once per kind of call. For the next call of the same kind (shapes, geometry, selection, mask) its
    nodes are copied; those that depend on no tensor's values, masks and block plans, are shared. So the cost of a layer
    does not depend on what the lowering computes, and neither Inductor nor a reader sees one mask per layer.
    """

    def __init__(self, gm: GraphModule, fake_mode: Any) -> None:
        self._gm = gm
        self._fake_mode = fake_mode
        self._emissions: dict[Any, _Emission] = {}

    def lower(self, node: Node, call: AttentionCall, lowering: Lowering) -> None:
        """Replace ``out`` of an operator node by what the lowering writes.

        Raises:
            VerificationError: the lowering's result has another shape or dtype than the operator's.
        """
        graph = self._gm.graph
        # Which operands are one tensor matters too: a copy could not tell them apart again.
        same = tuple(node.args.index(argument) for argument in _tensors(node))
        selection = lowering.selection if isinstance(lowering, BlockSparse) else None
        kind = (lowering.name, selection, node.args[3], same, _describe(call))
        with graph.inserting_before(node):
            if kind in self._emissions:
                out = self._repeat(self._emissions[kind], node)
            else:
                self._emissions[kind] = self._emit(node, call, lowering)
                out = self._emissions[kind].out
        for user in list(node.users):
            expected, got = tensor_of(user), tensor_of(out)
            assert expected is not None
            if got is None or got.dtype != expected.dtype or not _same_shape(got, expected):
                raise VerificationError(f"lowering {lowering.name!r} gave {got}, the operator gives {expected}")
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        erase_dead(graph, [node])

    def settle(self) -> None:
        """Write out the layouts that the substitution asked for: nothing where a result already has its own.

        Call it after the last :meth:`lower`, which decides in what layout a result is.
        """
        for node in self._gm.graph.find_nodes(op="call_function", target=laid_out):
            expected = tensor_of(node)
            result, order, result_order = node.args
            assert isinstance(result, Node)
            assert expected is not None
            with self._gm.graph.inserting_before(node):
                write = Writer(self._gm, self._fake_mode, node)
                placed = laid_out(write.proxy(result), order, result_order).node
            got = tensor_of(placed)
            if got is None or not _same_shape(got, expected) or not _same_strides(got, expected):
                raise VerificationError(f"{node.name}: {got} has another layout than {expected}")
            placed.meta[NAME] = node.meta[NAME]
            node.replace_all_uses_with(placed)
            self._gm.graph.erase_node(node)

    def _emit(self, node: Node, call: AttentionCall, lowering: Lowering) -> _Emission:
        before = node.prev
        write = Writer(self._gm, self._fake_mode, node)
        read = _tensors(node)
        query, key, value, *sinks = map(write.proxy, read)
        mask = node.args[3]
        key_mask = write.proxy(mask) if isinstance(mask, Node) else None
        operands = Operands(query, key, value, key_mask, *sinks)
        out = lowering.emit(write, call, operands).node
        written: list[Node] = []
        current = before.next
        while current is not node:
            written.append(current)
            current = current.next
        return _Emission(read, tuple(written), out)

    def _repeat(self, emission: _Emission, node: Node) -> Node:
        """Copy what depends on the operands' values; keep the rest."""
        moved: dict[Node, Node] = dict(zip(emission.operands, _tensors(node), strict=True))
        for old in emission.nodes:
            is_size = old.op == "call_method" and old.target == "size"
            if is_size or not any(argument in moved for argument in old.all_input_nodes):
                continue
            copy = self._gm.graph.node_copy(old, lambda argument: moved.get(argument, argument))
            for name in ORIGIN:
                if name in node.meta:
                    copy.meta[name] = node.meta[name]
            moved[old] = copy
        return moved[emission.out]


def _tensors(node: Node) -> tuple[Node, ...]:
    """Query, key and value, and the sink logits where the call has any: what differs from layer to layer."""
    return tuple(argument for argument in (*node.args[:3], *node.args[9:10]) if isinstance(argument, Node))


def _describe(call: AttentionCall) -> Any:
    """Everything about a call that a lowering may look at, as a key."""
    tensors = tuple(
        (tuple(map(size_of, x.shape)), tuple(map(size_of, x.stride())), x.dtype, x.device)
        for x in (call.query, call.key, call.value, call.sink_logits)
        if x is not None
    )
    none = dict.fromkeys(("query", "key", "value", "key_mask", "sink_logits"))
    constants = replace(call, **none)  # type: ignore[arg-type]
    return tensors, constants


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape have the same strides, wherever there is more than one element."""
    if any(statically_known_true(size == 0) for size in a.shape):
        return True
    return all(
        statically_known_true(size == 1) or statically_known_true(x == y)
        for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )
