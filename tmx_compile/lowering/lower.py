"""Lower the operator's nodes of one graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tmx_compile.errors import VerificationError
from tmx_compile.graph.nodes import erase_dead, tensor_of
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer


def lower_node(gm: GraphModule, node: Node, call: AttentionCall, lowering: Lowering, fake_mode: Any) -> None:
    """Replace ``out`` of an operator node by what the lowering writes.

    Raises:
        VerificationError: the lowering's result has another shape or dtype than the operator's.
    """
    write = Writer(gm, fake_mode, node)
    query, key, value, key_mask = node.args[:4]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    with gm.graph.inserting_before(node):
        operands = Operands(
            write.proxy(query),
            write.proxy(key),
            write.proxy(value),
            write.proxy(key_mask) if isinstance(key_mask, Node) else None,
        )
        out = lowering.emit(write, call, operands).node
    for user in list(node.users):
        expected, got = tensor_of(user), tensor_of(out)
        assert expected is not None
        if got is None or got.dtype != expected.dtype or not _same_shape(got, expected):
            raise VerificationError(f"lowering {lowering.name!r} gave {got}, the operator gives {expected}")
        user.replace_all_uses_with(out)
        gm.graph.erase_node(user)
    erase_dead(gm.graph, [node])


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = torch.fx.experimental.symbolic_shapes.statically_known_true
    return a.dim() == b.dim() and all(same(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def merged_options(lowerings: list[Lowering]) -> Mapping[str, Any]:
    """The Inductor settings that the lowerings of one graph need together."""
    options: dict[str, Any] = {}
    for lowering in lowerings:
        options.update(lowering.inductor_options)
    return options
