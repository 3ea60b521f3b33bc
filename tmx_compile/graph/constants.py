"""Tensors of a graph whose values are known when it is compiled, read as index terms: a model's causal buffer, say.

A module's buffer can change after compilation. So what was read is kept as a :class:`KnownTensor`, and whoever runs the
compiled graph asks it about the tensor of each call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tmx_compile.errors import TriangleMixError
from tmx_compile.graph import terms as t
from tmx_compile.graph.exact import fits
from tmx_compile.graph.terms import Choice, Lin, Term

_MOST_ELEMENTS = 1 << 30


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
    last two dimensions.
    """
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.no_grad():
        x = tensor.detach()
        if not 0 < x.numel() <= _MOST_ELEMENTS or x.is_complex() or x.is_quantized or x.layout != torch.strided:
            return None
        first = x.reshape(-1)[0]
        if bool((x == first).all()):
            return _value(x.dtype, first.item())
        if x.dtype in (torch.int64, torch.int32):
            return _affine(x)
        if x.dim() < 2 or any(size != 1 for size in x.shape[:-2]):
            return None
        return _diagonal(x.reshape(x.shape[-2:]))


def _value(dtype: torch.dtype, value: Any) -> Term:
    if dtype == torch.bool:
        return t.Const(bool(value))
    return Choice(t.TRUE, float(value), 0.0) if dtype.is_floating_point else Lin(int(value))


def _affine(x: Tensor) -> Lin | None:
    dtype, x = x.dtype, x.long()
    last = x.dim() - 1
    base = x[(0,) * x.dim()]
    factors: dict[int, int] = {}
    predicted = base.expand(x.shape)
    for dim in range(x.dim()):
        if x.shape[dim] > 1:
            step = x.select(dim, 1)[(0,) * last] - base
            factors[last - dim] = int(step)
            places = torch.arange(x.shape[dim], dtype=x.dtype, device=x.device)
            predicted = predicted + (step * places).reshape(-1, *(1,) * (last - dim))
    lin = Lin.of(int(base), factors)
    # The prediction wraps around where the numbers do.
    inside = fits(lin, dtype, lambda coordinate: int(x.shape[last - coordinate]), None)
    return lin if inside and torch.equal(predicted, x) else None


def _diagonal(x: Tensor) -> Term | None:
    """``low`` where key - row <= d, ``high`` elsewhere."""
    low, high = x[-1, 0], x[0, -1]
    # How many elements of row 0 lie on the lower side; none: the diagonal starts further down.
    in_row, in_column = int((x[0] == low).sum()), int((x[:, 0] == high).sum())
    diagonal = in_row - 1 if in_row > 0 else -in_column
    lower = torch.ones(x.shape, dtype=torch.bool, device=x.device).tril(diagonal)
    if not torch.equal(torch.where(lower, low, high), x):
        return None
    condition = t.compare_ge(Lin.of(diagonal, {0: -1, 1: 1}))
    if x.dtype == torch.bool:
        return condition if bool(low) else t.negate(condition)
    return Choice(condition, float(low), float(high))


@dataclass
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
    _seen: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor of a call is still what was read. Looks at its values only when it was written."""
        known = self._seen.get(id(tensor))
        if known is not None and known[0] == tensor._version and known[1]() is tensor:
            return True
        if recognise(tensor) != self.term:
            return False
        self._seen[id(tensor)] = (tensor._version, weakref.ref(tensor))
        return True


def watched(compiled: Callable[..., Any], known: Sequence[KnownTensor]) -> Callable[..., Any]:
    """The compiled graph, run only while the buffers that its masks were read from hold what was read."""
    if not known:
        return compiled

    def run(*args: Any) -> Any:
        for constant in known:
            if not constant.holds(args[constant.position]):
                raise TriangleMixError(
                    f"{constant.name} has changed since the model was compiled, and the attention masks were read from "
                    "it: call torch.compiler.reset() and compile again"
                )
        return compiled(*args)

    return run
