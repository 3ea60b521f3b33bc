"""Tensors of a graph whose values are known when it is compiled, read as index terms: a model's causal buffer, say.

A module's buffer can change after compilation. So what was read is kept as a :class:`KnownTensor`, and whoever runs the
compiled graph asks it about the tensor of each call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tmx_compile.errors import TriangleMixError
from tmx_compile.proof import terms as t
from tmx_compile.proof.exact import fits
from tmx_compile.proof.terms import Choice, Lin, Term

_MOST_ELEMENTS = 1 << 30
_DTYPES = frozenset({torch.bool, torch.float64, torch.float32, torch.bfloat16, torch.float16})
_DTYPES |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
# Elements looked at together, and rows at a diagonal: the temporaries of both are a few tens of MiB at most.
CELLS = 1 << 22
ROWS = 256


def known_tensors(
    gm: GraphModule, example_inputs: Sequence[Any], constants: Mapping[str, Tensor] | None = None
) -> dict[Node, Tensor]:
    """Attributes of a Dynamo graph, and those of its inputs that belong to a module (parameters, buffers, others).

    ``constants`` are inputs that are constants of the graph, by name.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    named = constants or {}
    known: dict[Node, Tensor] = {node: named[node.name] for node in placeholders if node.name in named}
    for node, value in zip(placeholders, example_inputs, strict=False):
        source = getattr(node.meta.get("grapharg"), "source", None)
        if source is not None and source.guard_source.is_unspecialized_nn_module() and _is_real(value):
            known[node] = value
    for node in gm.graph.find_nodes(op="get_attr"):
        attribute = getattr(gm, str(node.target), None)
        if _is_real(attribute):
            known[node] = attribute
    return known


def _is_real(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor)


def recognise(tensor: Tensor) -> Term | None:
    """What one element of a tensor is as a term of its coordinates; None where its values follow no simple rule.

    Knows one repeated value, integers that are affine in the coordinates, and two values divided by a diagonal of the
    last two dimensions. Reads blocks: no temporary has the size of the tensor.
    """
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.no_grad():
        x = tensor.detach()
        if not 0 < x.numel() <= _MOST_ELEMENTS or x.dtype not in _DTYPES or x.layout != torch.strided:
            return None
        term = _guess(x)
        return term if term is not None and _matches(x, term) else None


def _guess(x: Tensor) -> Term | None:
    """The term that fits the first elements of each dimension; the others are still to be looked at."""
    corner, opposite = (x[(place,) * x.dim()].item() for place in (0, -1))
    if x.dim() >= 2 and all(size == 1 for size in x.shape[:-2]) and x.dtype not in (torch.int64, torch.int32):
        x = x.reshape(x.shape[-2:])
        low, high = x[-1, 0], x[0, -1]
        if bool(low != high):
            # How many elements of row 0 lie on the lower side; none: the diagonal starts further down.
            in_row, in_column = int((x[0] == low).sum()), int((x[:, 0] == high).sum())
            diagonal = in_row - 1 if in_row > 0 else -in_column
            condition = t.compare_ge(Lin.of(diagonal, {0: -1, 1: 1}))
            if x.dtype == torch.bool:
                return condition if bool(low) else t.negate(condition)
            return Choice(condition, float(low), float(high))
    if x.dtype == torch.bool:
        return t.Const(bool(corner))
    if x.dtype.is_floating_point:
        return Choice(t.TRUE, float(corner), 0.0)
    if x.dtype not in (torch.int64, torch.int32):
        return Lin(int(corner)) if corner == opposite else None
    last = x.dim() - 1
    steps = {last - d: int(x[tuple(int(e == d) for e in range(x.dim()))]) for d in range(x.dim()) if x.shape[d] > 1}
    lin = Lin.of(int(corner), {coordinate: value - int(corner) for coordinate, value in steps.items()})
    # Numbers that wrap around are no line.
    return lin if fits(lin, x.dtype, lambda coordinate: int(x.shape[last - coordinate]), None) else None


def _matches(x: Tensor, term: Term) -> bool:
    """Whether a tensor has the values of a term that :func:`_guess` gives. One read of it, one wait for its device."""
    match term:
        case t.Const(value):
            parts = [_all_are(block, value) for block, _ in _blocks(x)]
        case Choice(t.Const(), float(value), _):
            parts = [_all_are(block, value) for block, _ in _blocks(x)]
        case Lin(const, factors):
            parts = [_affine(block, at, int(const), dict(factors)) for block, at in _blocks(x)]
        case Choice(t.NonNegative(lin), float(low), float(high)):
            parts = _divided(x, int(lin.const), low, high)
        case t.NonNegative(lin):
            below = lin.factor(1) > 0
            parts = _divided(x, int(lin.const if below else -1 - lin.const), below, not below)
        case _:
            return False
    return bool(torch.stack(parts).all())


def _blocks(x: Tensor, dim: int = 0, at: tuple[int, ...] = ()) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """A tensor in parts of at most ``CELLS`` elements, with the coordinates of each one's first element."""
    if dim == x.dim():
        yield x, at
        return
    each = x.narrow(dim, 0, 1).numel()
    size, step = x.shape[dim], max(1, CELLS // each)
    for place in range(0, size, step):
        part = x.narrow(dim, place, min(step, size - place))
        if each > CELLS:
            yield from _blocks(part, dim + 1, (*at, place))
        else:
            yield part, (*at, place, *(0,) * (x.dim() - dim - 1))


def _all_are(x: Tensor, value: bool | float) -> Tensor:
    """Whether every element is ``value``; without a temporary of the tensor's size."""
    if x.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=x.device)
    if x.dtype == torch.bool:
        return x.all() if value else ~x.any()
    low, high = x.aminmax()
    return (low == value) & (high == value)


def _affine(x: Tensor, at: tuple[int, ...], const: int, factors: dict[int, int]) -> Tensor:
    last = x.dim() - 1
    predicted = torch.full((1,) * x.dim(), const, dtype=torch.int64, device=x.device)
    for coordinate, factor in factors.items():
        dim = last - coordinate
        places = torch.arange(at[dim], at[dim] + x.shape[dim], device=x.device)
        predicted = predicted + (factor * places).reshape(-1, *(1,) * coordinate)
    return (x == predicted).all()


def _divided(x: Tensor, diagonal: int, low: bool | float, high: bool | float) -> list[Tensor]:
    """Whether elements are ``low`` where key - row <= diagonal, ``high`` elsewhere, for parts of the tensor.

    Most of a block of rows lies on one side; only a square at the diagonal is compared with what it should be.
    """
    x = x.reshape(x.shape[-2:])
    rows, keys = x.shape
    inner, outer = (torch.tensor(value, dtype=x.dtype, device=x.device) for value in (low, high))
    parts = []
    for row in range(0, rows, ROWS):
        block = x[row : row + ROWS]
        begin = min(max(row + diagonal + 1, 0), keys)
        end = min(max(row + block.shape[0] + diagonal, 0), keys)
        near = torch.arange(begin, end, device=x.device) <= torch.arange(len(block), device=x.device)[:, None] + (
            row + diagonal
        )
        middle = (block[:, begin:end] == torch.where(near, inner, outer)).all()
        parts += [_all_are(block[:, :begin], low), middle, _all_are(block[:, end:], high)]
    return parts


@dataclass(frozen=True)
class KnownTensor:
    """A tensor that a proof rests on, and what it was read as.

    Attributes:
        name: what a person knows it by.
        position: which input of the graph it is.
        term: what :func:`recognise` said of it.
    """

    name: str
    position: int
    term: Term

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor of a call still has the values that were read.

        Looks at them: a version counter misses writes through ``.data``, NumPy and ``set_``, and a tensor made in
        inference mode has none.
        """
        with torch.no_grad():
            return _matches(tensor.detach(), self.term)


def watched(
    compiled: Callable[..., Any], known: Sequence[KnownTensor], otherwise: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The compiled graph, run only while the buffers that its masks were read from hold what was read.

    ``otherwise`` runs calls in which they do not, with one warning; None: such a call is a ``TriangleMixError``.
    """
    if not known:
        return compiled
    told: set[str] = set()

    def run(*args: Any) -> Any:
        for constant in known:
            if constant.holds(args[constant.position]):
                continue
            changed = (
                f"{constant.name} has changed since the model was compiled, and the attention masks were read from it"
            )
            again = "call torch.compiler.reset() and compile again"
            if otherwise is None:
                raise TriangleMixError(f"{changed}: {again}")
            if constant.name not in told:
                told.add(constant.name)
                warnings.warn(
                    f"{changed}: the graph runs as it is written, uncompiled and dense; {again}", stacklevel=2
                )
            return otherwise(*args)
        return compiled(*args)

    return run
