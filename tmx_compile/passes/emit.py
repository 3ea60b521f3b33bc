"""Write index terms back into a graph: the valid keys of a proof as nodes over (batch, key)."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any, Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.errors import VerificationError
from tmx_compile.find.site import AttentionSite, Operand
from tmx_compile.graph.nodes import tensor_of, written
from tmx_compile.graph.sizes import Size
from tmx_compile.graph.storages import Storages
from tmx_compile.operator import FIRST_POSITION
from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import BATCH, KEY
from tmx_compile.proof.expressions import Lengths, Unwritable
from tmx_compile.proof.terms import AllOf, AnyOf, Element, Lin, Negation, NonNegative, Truth, Truthy, Zero

_BATCH, _KEY = Lin.of(0, {BATCH: 1}), Lin.of(0, {KEY: 1})


class Emitter:
    """Inserts nodes before a site: plain calls, and index terms over the batch (dim 0) and the keys (dim 1)."""

    def __init__(self, gm: GraphModule, fake_mode: Any, storages: Storages) -> None:
        self._gm = gm
        self._fake_mode = fake_mode
        self._like: Node | None = None
        self._storages = storages
        self._saved: dict[tuple[Node, int], Node] = {}
        self._lengths: Lengths | None = None
        self._site: AttentionSite | None = None
        self._replaced: dict[Node, Node] = {}

    @contextlib.contextmanager
    def before(self, site: AttentionSite) -> Iterator[Emitter]:
        """Insert before a site, with its origin; its batch and keys are what terms range over."""
        self._site, self._like = site, site.node
        with self._gm.graph.inserting_before(site.node):
            yield self

    def replace(self, node: Node, by: Node) -> None:
        """Give the users of a node another one, in the graph and in every call that is still to be written."""
        node.replace_all_uses_with(by)
        self._replaced[node] = by

    def _current(self, node: Node) -> Node:
        return self._replaced.get(node, node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call with the origin of the site and an example value; of nodes that were replaced, it reads the new ones.

        A site is described by nodes of the graph as it was. Its operands, or what masks it, may be results of sites
        that have been replaced since.
        """
        args, kwargs = torch.fx.node.map_arg((args, kwargs), self._current)
        name = getattr(target, "__name__", "")
        if getattr(torch.Tensor, name, None) is target:
            node = self._gm.graph.call_method(name, args, kwargs)
        else:
            node = self._gm.graph.call_function(target, args, kwargs)
        assert self._like is not None
        return written(node, self._like, self._fake_mode)

    def arithmetic(self, combine: Any, a: Any, b: Any) -> Any:
        """Lengths combined: a number where both are, else a node."""
        return self.call(combine, a, b) if isinstance(a, Node) or isinstance(b, Node) else combine(a, b)

    def batch(self) -> Any:
        """Number of sequences: a number, or the node of a symbolic one."""
        return self._size("query", 0)

    def q_len(self) -> Any:
        """Number of rows."""
        return self._size("query", 2)

    def kv_len(self) -> Any:
        """Number of keys."""
        return self._size("key", 2)

    def _size(self, name: Literal["query", "key"], axis: int) -> Any:
        assert self._site is not None
        operand: Operand = getattr(self._site, name)
        size = operand.fake.shape[axis]
        if isinstance(size, int):
            return size
        dim = axis if operand.order is None else operand.order[axis]
        return self.call(torch.Tensor.size, operand.node, dim)

    @property
    def _device(self) -> torch.device:
        assert self._site is not None
        return self._site.key.fake.device

    def keys(self) -> Node:
        """(Skv,) positions of the keys."""
        return self.call(torch.arange, self.kv_len(), device=self._device)

    def _sequences(self) -> Node:
        """(B, 1) numbers of the sequences."""
        return self.call(torch.unsqueeze, self.call(torch.arange, self.batch(), device=self._device), 1)

    def truths(self, valid: tuple[Truth, ...]) -> Node:
        """The conjunction of truths of the batch and the key."""
        return reduce(lambda a, b: self.call(operator.and_, a, b), map(self.truth, valid))

    def truth(self, term: Truth) -> Node:
        """A truth of the batch and the key as a bool tensor that broadcasts to (B, Skv)."""
        match term:
            case Truthy(element):
                read = self._element(element)
                fake = tensor_of(read)
                assert fake is not None
                return read if fake.dtype == torch.bool else self.call(torch.Tensor.to, read, torch.bool)
            case Negation(inner):
                return self.call(torch.logical_not, self.truth(inner))
            case NonNegative(lin):
                return self.call(torch.ge, *self._sides(lin))
            case Zero(lin):
                return self.call(torch.eq, *self._sides(lin))
            case AllOf(terms) | AnyOf(terms):
                combine = torch.logical_and if isinstance(term, AllOf) else torch.logical_or
                return reduce(lambda a, b: self.call(combine, a, b), map(self.truth, sorted(terms, key=str)))
            case t.Const(value):
                return self.call(torch.full, (1, 1), value, device=self._device)

    def _sides(self, lin: Lin) -> tuple[Node, Any]:
        """Two numbers whose difference is ``lin``. Data stand alone where they can: a sum of theirs may overflow."""
        plus = Lin.of(0, None, {element: factor for element, factor in lin.atoms if factor > 0})
        minus = Lin.of(0, None, {element: -factor for element, factor in lin.atoms if factor < 0})
        rest = lin - plus + minus
        if plus.atoms:
            minus = minus - rest
        else:
            plus = rest
        return self.number(plus), self.number(minus) if minus.factors or minus.atoms else self.expression(minus.const)

    def number(self, lin: Lin) -> Node:
        """An affine term of the batch and the key as an integer tensor that broadcasts to (B, Skv)."""
        parts: list[tuple[Node, int]] = []
        for coordinate, factor in lin.factors:
            assert coordinate in (KEY, BATCH), f"no row or head may be left: {lin}"
            parts.append((self.keys() if coordinate == KEY else self._sequences(), factor))
        parts += [(self._wide(self._element(element)), factor) for element, factor in sorted(lin.atoms, key=str)]
        total: Any = None
        for node, factor in parts:
            scaled = node if factor == 1 else self.call(torch.mul, node, factor)
            total = scaled if total is None else self.call(torch.add, total, scaled)
        const = self.expression(lin.const)
        if total is None:
            return self.call(torch.full, (1, 1), const, dtype=torch.int64, device=self._device)
        return total if const == 0 else self.call(torch.add, total, const)

    def _wide(self, node: Node) -> Node:
        """Integers as int64, so that arithmetic on them does not wrap around."""
        fake = tensor_of(node)
        assert fake is not None
        return node if fake.dtype == torch.int64 else self.call(torch.Tensor.to, node, torch.int64)

    def source(self, node: Node, version: int | None = None) -> Node:
        """A tensor of the graph as it was in a version (None: the site's own): itself, or a copy saved in time."""
        assert self._site is not None
        if version is None:
            version = self._site.versions.get(node)
        if version is None or version == self._storages.version(node, self._site.node):
            return node
        if (node, version) not in self._saved:
            with self._gm.graph.inserting_before(self._storages.end_of(node, version)):
                self._saved[node, version] = self.call(torch.clone, node)
        return self._saved[node, version]

    def _element(self, element: Element) -> Node:
        """Read by position, which keeps the original's out-of-range error where there can be one."""
        fake = tensor_of(element.node)
        assert fake is not None
        source = self.source(element.node, element.version)
        ranged = element.index in ((_BATCH, _KEY), (_KEY,)) and len(element.index) == fake.dim()
        if ranged and self._holds(element, fake, operator.eq):
            return source if fake.dim() == 2 else self.call(torch.unsqueeze, source, 0)
        index: list[Any] = []
        for term in element.index:
            if term == _KEY:
                index.append(self.keys())
            elif term == _BATCH:
                index.append(self._sequences())
            else:
                index.append(int(term.const) if term.is_number else self.number(term))
        if ranged and self._holds(element, fake, operator.le):
            # Not by a slice, which guards on the lengths. And Inductor 2.11 checks some indices before it has them.
            read = self.call(torch.ops.aten._unsafe_index.Tensor, source, index)
        else:
            read = self.call(operator.getitem, source, tuple(index)) if index else source
        fake = tensor_of(read)
        assert fake is not None
        return self.call(torch.unsqueeze, read, 0) if fake.dim() == 1 else read

    def _holds(self, element: Element, fake: torch.Tensor, compare: Callable[[Any, Any], Any]) -> bool:
        """Whether the site's sequences and keys surely compare so with the sizes of the tensor that they index."""
        assert self._site is not None
        extents = {_BATCH: self._site.query.fake.shape[0], _KEY: self._site.key.fake.shape[2]}
        sizes = zip(element.index, fake.shape, strict=True)
        return all(statically_known_true(compare(extents[term], size)) for term, size in sizes)

    def first_position(self, first: Element) -> Node:
        """The position of row 0 of a tensor of row positions, whose others are checked to follow it when it runs."""
        fake = tensor_of(first.node)
        assert fake is not None
        node = self.source(first.node, first.version)
        if fake.dim() > 1:
            node = self.call(operator.getitem, node, (*(int(i.const) for i in first.index[:-1]), slice(None)))
        return self.call(FIRST_POSITION, node)

    def expression(self, size: Size) -> Any:
        """A length: a number, or a node for an expression of the graph's symbols."""
        if isinstance(size, int):
            return size
        if self._lengths is None:
            self._lengths = Lengths(self._gm.graph)
        assert self._like is not None
        try:
            return self._lengths.write(size, self._like, self.call)
        except Unwritable as missing:
            # The proof refuses what cannot be written: ``expressions.unwritable``.
            raise VerificationError(str(missing)) from missing
