"""An abstract interpreter that reads a mask-building subgraph as index terms.

Each node becomes a :class:`View`: its shape and what one of its elements is, as a term of the element's coordinates.
A node that is not understood is not an error: it becomes an element of its own tensor, so that everything built on it
is still exact, and the proof decides whether that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from tmx_compile.graph.calls import Call, call_of
from tmx_compile.graph.nodes import shape_env_of, tensor_of, value_of
from tmx_compile.graph.sizes import Size, size_of
from tmx_compile.graph.storages import Storages
from tmx_compile.proof import terms as t
from tmx_compile.proof.constants import recognise
from tmx_compile.proof.exact import fits
from tmx_compile.proof.terms import Choice, Const, Element, Lin, Term, Truth

INTEGERS = frozenset({torch.int64, torch.int32})


@dataclass(frozen=True)
class View:
    """A tensor as a function: its shape, left to right, and the term of its element."""

    shape: tuple[Size, ...]
    term: Term


class NotUnderstood(Exception):
    """Raised inside a rule to fall back to an opaque element."""


Rule: TypeAlias = "Callable[[MaskReader, Call], Term]"


class MaskReader:
    """Reads nodes of one graph, each once.

    Attributes:
        known: the terms of the constants that were read.
        runs: running counts of the places where a number does not rise by exactly 1, with that number: where two
            counts are equal, the number has risen by 1 with every step between their places (along the last dimension).

    Args:
        rules: what each operation does, by its name (:data:`tmx_compile.proof.rules.RULES`).
        known_non_negative: decides ``lin >= 0`` over all coordinates (each at least 0) without adding a guard.
        constants: tensors of the graph whose values are known.
        storages: when the graph writes to tensors; None: never.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        known_non_negative: Callable[[Lin], bool],
        constants: Mapping[Node, torch.Tensor] | None = None,
        storages: Storages | None = None,
    ) -> None:
        self._rules = rules
        self._storages = storages
        # The calls whose rules are at work, the innermost last: what an operand was, it was when that call read it.
        self._readers: list[Node] = []
        # Tensors that some rule read after the call named here had written to them.
        self._stale: dict[Node, Node] = {}
        self._constants = constants or {}
        self.known: dict[Node, Term] = {}
        self.runs: dict[Node, Lin] = {}
        self._views: dict[Node, View] = {}
        self._known_non_negative = known_non_negative

    def at(self, node: Node, version: int | None) -> View:
        """The view of a tensor node in a version of its storage: what it computed, or else its own element."""
        if self._storages is None or version is None or version == self._storages.version(node):
            return self.read(node)
        now = self._rewritten(node, version)
        if now is not None:
            return self.read(now)
        self._stale[node] = self._storages.end_of(node, self._storages.version(node))
        return opaque(node, version)

    def _rewritten(self, node: Node, version: int) -> Node | None:
        """The call that gave a tensor a version by computing all of it anew in its place, such as ``tril_``."""
        assert self._storages is not None
        write = self._storages.end_of(node, version - 1)
        target: Any = write
        while target is not node:
            call = call_of(target)
            if call is None or not call.name.endswith("_"):
                return None
            target = call.arguments.get("input")
        return write

    def stale_below(self, node: Node) -> tuple[Node, Node] | None:
        """A write, and the tensor that it changed, in what a node was built from; None where there is none."""
        seen: set[Node] = set()
        stack = [node] if self._stale else []
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current in self._stale:
                return self._stale[current], current
            stack.extend(current.all_input_nodes)
        return None

    def read(self, node: Node) -> View:
        """The view of what a tensor node computed."""
        if node not in self._views and node in self._constants:
            term = recognise(self._constants[node])
            if term is not None:
                self.known[node] = term
                self._views[node] = View(shape_of(node), self._normal(node, term))
        if node not in self._views:
            try:
                view = View(shape_of(node), self._normal(node, self.ruled(node)))
            except NotUnderstood:
                view = opaque(node, 0 if self._storages is None else self._storages.version(node))
                if self._storages is not None and self._storages.writes(node):
                    self._stale[node] = node
            self._views[node] = view
        return self._views[node]

    def call(self, arg: Any) -> Call | None:
        """The call that an argument is; every rule that looks at more than its own node asks here.

        None as well where the call does not read what the graph computed for its arguments, as something wrote to them.
        """
        call = call_of(arg)
        if call is not None and self._storages is not None and self._storages.any_writes:
            for source in call.node.all_input_nodes:
                if self._storages.changed(source, call.node) is not None:
                    return None
        return call

    def ruled(self, node: Node) -> Term:
        """What the rule of a node's operator says."""
        # What an operand was when it was read, each operand is asked for itself.
        call = call_of(node)
        if call is not None and call.name.endswith("_"):
            # In place: the result is what the operator gives otherwise.
            call = replace(call, name=call.name[:-1])
        rule = None if call is None else self._rules.get(call.name)
        if call is None or rule is None:
            raise NotUnderstood
        self._readers.append(node)
        try:
            return rule(self, call)
        finally:
            self._readers.pop()

    def _normal(self, node: Node, term: Term) -> Term:
        """Drop coordinates of dimensions of size 1: they are always 0."""
        shape = shape_of(node)
        units = {c: Lin(0) for c in t.coordinates(term) if c >= len(shape) or shape[-1 - c] == 1}
        return t.substitute(term, units) if units else term

    def operand(self, arg: Any) -> Term:
        """The term of an argument: a tensor node, a symbolic or plain number."""
        if isinstance(arg, Node) and tensor_of(arg) is not None:
            return self._operand(arg).term
        if isinstance(arg, bool):
            return Const(arg)
        return Lin.of(integer(arg))

    def _operand(self, node: Node) -> View:
        """A tensor as the call whose rule is at work reads it."""
        if self._storages is None or not self._readers:
            return self.read(node)
        if self._storages.is_reshaped(node):
            self._stale[node] = node
            raise NotUnderstood
        return self.at(node, self._storages.version(node, self._readers[-1]))

    def number(self, arg: Any) -> Lin:
        """An operand that must be affine; a known truth value counts as 0 or 1."""
        term = self.operand(arg)
        if isinstance(term, Const):
            return Lin(int(term.value))
        if not isinstance(term, Lin):
            raise NotUnderstood
        return term

    def constants(self, arg: Any) -> float | Choice:
        """An operand that must be one of a few numbers; a truth value counts as 0.0 or 1.0."""
        if isinstance(arg, (int, float)):
            return float(arg)
        return as_constants(self.operand(arg))

    def truth(self, arg: Any) -> Truth:
        """An operand as a truth value (non-zero means true)."""
        return as_truth(self.operand(arg))

    def is_index(self, lin: Lin) -> bool:
        """Whether a term can never be negative; a negative index would count from the end."""
        return self._known_non_negative(lin)

    def first(self, index: Any, size: Size) -> Lin:
        """An index into a dimension as one from the front: one below 0 counts from the end."""
        begin = Lin.of(integer(index))
        if not self.is_index(begin):
            # A slice that starts before the front starts at the front: only an index surely inside is moved.
            if not self.is_index(begin.scaled(-1) - Lin(1)):
                raise NotUnderstood
            begin = begin + Lin.of(size)
        if not self.is_index(begin):
            raise NotUnderstood
        return begin

    def exact(self, lin: Lin, node: Node, dtype: torch.dtype | None = None) -> Lin:
        """A term, where a tensor of a node's shape and dtype (or of another dtype) holds it everywhere."""
        fake = tensor_of(node)
        assert fake is not None
        shape = shape_of(node)
        if not fits(lin, dtype or fake.dtype, lambda c: self.size(c, shape), shape_env_of(fake)):
            raise NotUnderstood
        return lin

    def size(self, coordinate: int, shape: tuple[Size, ...]) -> Size:
        """How many places a coordinate of a tensor has."""
        return shape[-1 - coordinate] if coordinate < len(shape) else 1


def as_truth(term: Term) -> Truth:
    """Non-zero means true."""
    match term:
        case Lin():
            return t.negate(t.compare_eq(term))
        case Element():
            return t.Truthy(term)
        case Choice():
            return t.leaves(term, lambda number: Const(number != 0))
        case _:
            return term


def as_constants(term: Term) -> float | Choice:
    """A term as one of a few numbers, or :class:`NotUnderstood`."""
    match term:
        case Const(value):
            return float(value)
        case Choice():
            return term
        case Lin(const=int(const)) if term.is_number:
            return float(const)
        case Lin() | Element():
            raise NotUnderstood
        case _:
            return Choice(term, 1.0, 0.0)


def opaque(node: Node, version: int) -> View:
    """The view of a node that is not understood: its own element, in a version of its storage."""
    shape = shape_of(node)
    last = len(shape) - 1
    index = tuple(Lin(0) if size == 1 else Lin.of(0, {last - d: 1}) for d, size in enumerate(shape))
    element = Element(node, index, version)
    match dtype_of(node):
        case torch.bool:
            return View(shape, t.Truthy(element))
        case torch.int64 | torch.int32:
            return View(shape, Lin.of(0, None, {element: 1}))
        case _:
            return View(shape, element)


def shape_of(node: Node) -> tuple[Size, ...]:
    """The shape of a tensor node, left to right."""
    fake = tensor_of(node)
    assert fake is not None, f"{node} is no tensor"
    return tuple(size_of(size) for size in fake.shape)


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a tensor node."""
    fake = tensor_of(node)
    assert fake is not None
    return fake.dtype


def integer(arg: Any) -> Size:
    """An integer argument, plain or symbolic."""
    value = value_of(arg) if isinstance(arg, Node) else arg
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise NotUnderstood
    return size_of(value)
