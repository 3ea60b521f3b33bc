"""Read FlexAttention's ``mask_mod``: a graph of four numbers, batch, head, row and key, and of captured tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from tmx_compile.find.site import MaskMod
from tmx_compile.graph.calls import Call
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.graph.sizes import Size
from tmx_compile.proof import terms as t
from tmx_compile.proof.read import INTEGERS, MaskReader, NotUnderstood, View, as_truth, dtype_of, integer, shape_of
from tmx_compile.proof.rules import RULES
from tmx_compile.proof.terms import Lin, Term, Truth

_ARGUMENTS = (3, 2, 1, 0)
"""The coordinates of (batch, head, row, key) in a (batch, heads, rows, keys) tensor, counted from the right."""

# Inside a mask_mod the four numbers keep away from the dimensions of the captured tensors that they index.
_APART = 1 << 10


def read_mask_mod(reader: MaskReader, mod: MaskMod, sizes: Mapping[int, Size], versions: Mapping[Node, int]) -> Truth:
    """Where a ``mask_mod`` lets a row attend, as a truth of the four coordinates.

    Args:
        reader: the reader of the graph that ``mod.buffers`` belong to.
        mod: the child graph and what it captures.
        sizes: how many batches, heads, rows and keys there are.
        versions: the version in which each captured tensor is read.

    Raises:
        NotUnderstood: something in it is not understood. (A number that is not understood has no coordinates that
            could tell it apart from a constant, so that nothing may be left opaque here.)
    """
    placeholders = list(mod.graph.graph.find_nodes(op="placeholder"))
    if len(placeholders) != len(_ARGUMENTS) + len(mod.buffers):
        raise NotUnderstood
    captured = dict(zip(placeholders[4:], mod.buffers, strict=True))
    inside = _NumberReader(reader, captured, sizes, versions)
    for node, coordinate in zip(placeholders, _ARGUMENTS, strict=False):
        inside.name(node, coordinate)
    return inside.truth_of(mod.graph.graph.output_node().args[0])


class _NumberReader(MaskReader):
    """Reads nodes whose elements depend on named numbers beside their own coordinates."""

    def __init__(
        self, outer: MaskReader, captured: Mapping[Node, Any], sizes: Mapping[int, Size], versions: Mapping[Node, int]
    ) -> None:
        super().__init__({**RULES, **dict.fromkeys(("getitem", "index"), _index)}, outer.is_index)
        self._outer = outer
        self._captured = captured
        self._sizes = sizes
        self._versions = versions

    def name(self, node: Node, coordinate: int) -> None:
        """A 0-d node is a number of its own."""
        self._views[node] = View((), Lin.of(0, {_APART + coordinate: 1}))

    def truth_of(self, output: Any) -> Truth:
        """A 0-d node as a truth of the named numbers."""
        while isinstance(output, (tuple, list)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Node) or tensor_of(output) is None or shape_of(output):
            raise NotUnderstood
        truth = as_truth(self.read(output).term)
        named = {c: Lin.of(0, {c - _APART: 1}) for c in t.coordinates(truth)}
        return t.substitute_truth(truth, named)

    def read(self, node: Node) -> View:
        """The view of a tensor node, or :class:`NotUnderstood`."""
        if node not in self._views:
            if node in self._captured:
                captured = self._captured[node]
                self._views[node] = self._outer.at(captured, self._versions.get(captured))
            else:
                self._views[node] = View(shape_of(node), self.ruled(node))
        return self._views[node]

    def size(self, coordinate: int, shape: tuple[Size, ...]) -> Size:
        """How many places a coordinate of a tensor has, or a named number."""
        return self._sizes[coordinate - _APART] if coordinate >= _APART else super().size(coordinate, shape)

    def operand(self, arg: Any) -> Term:
        """The term of an argument: a tensor node, a symbolic or plain number, captured or not."""
        if isinstance(arg, Node) and arg in self._captured and tensor_of(arg) is None:
            return Lin.of(integer(self._captured[arg]))
        return super().operand(arg)


def _index(reader: MaskReader, call: Call) -> Term:
    """Leading dimensions indexed by numbers; whole dimensions may stand between and after them."""
    source, items = call["input"], call["index" if call.name == "getitem" else "indices"]
    if not isinstance(source, Node) or tensor_of(source) is None:
        raise NotUnderstood
    index = list(items) if isinstance(items, (tuple, list)) else [items]
    if not any(isinstance(item, Node) for item in index):
        return RULES[call.name](reader, call)
    rank = len(shape_of(source))
    if len(index) > rank:
        raise NotUnderstood
    index += [slice(None)] * (rank - len(index))
    left = len(shape_of(call.node))
    new: dict[int, Lin] = {}
    for dim, item in enumerate(index):
        if item == slice(None):
            left -= 1
            new[rank - 1 - dim] = Lin.of(0, {left: 1})
            continue
        number = _number(reader, item)
        if not reader.is_index(number):
            raise NotUnderstood
        new[rank - 1 - dim] = number
    if left != 0:
        raise NotUnderstood
    return t.substitute(reader.operand(source), new)


def _number(reader: MaskReader, item: Any) -> Lin:
    if isinstance(item, Node) and tensor_of(item) is not None and (shape_of(item) or dtype_of(item) not in INTEGERS):
        raise NotUnderstood
    if item is None or isinstance(item, bool):
        raise NotUnderstood
    return reader.number(item)
