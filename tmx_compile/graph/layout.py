"""The layout of a result in memory: that of what it replaces, so that whatever views the one can view the other.

``out.transpose(1, 2).view(B, N, -1)`` works on what ``scaled_dot_product_attention`` returns, whose memory is
(B, N, H, D), and would raise on (B, H, N, D). Nothing here guards on a length.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph.nodes import op_name, tensor_of, value_of

Order = tuple[int, ...]

NAME = "tmx_name"
"""Key in ``node.meta`` of a site's result: the name of the node that it replaces."""


def memory_order(node: Node) -> Order | None:
    """The order in memory of the dimensions of a node's tensor, outermost first; None where no dense tensor will do.

    A tensor with gaps (an odd head dim that a kernel has padded) counts as the dense one of the same order: it can be
    viewed in every way that the one with gaps can, but for ``as_strided``.
    """
    out = tensor_of(node)
    if out is None or out.layout != torch.strided:
        return None
    order = _dense_order(out)
    if order is None and not any(op_name(other) == "as_strided" for other in node.graph.nodes):
        order = _gapped_order(out)
    return order


def _dense_order(x: Tensor) -> Order | None:
    return next((order for order in itertools.permutations(range(x.dim())) if is_laid_out(x, order)), None)


def _gapped_order(x: Tensor) -> Order | None:
    """The order of a tensor of known strides whose elements do not overlap."""
    if not all(isinstance(n, int) for n in (*x.shape, *x.stride())):
        return None
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: (-strides[dim], dim))
    end = 0
    for dim in reversed(order):
        if x.shape[dim] > 1 and strides[dim] <= end:
            return None
        end += (x.shape[dim] - 1) * strides[dim]
    return tuple(order)


def is_laid_out(x: Tensor, order: Order) -> bool:
    """Whether a tensor is known to be dense with its dimensions in memory in this order."""
    if any(statically_known_true(size == 0) for size in x.shape):
        return True
    expected: Any = 1
    for dim in reversed(order):
        if not statically_known_true(x.shape[dim] == 1) and not statically_known_true(x.stride(dim) == expected):
            return False
        expected = expected * x.shape[dim]
    return True


def permuted(order: Order, by: Order | None) -> Order:
    """The order in memory of ``x``, given that of ``x.permute(by)``."""
    return order if by is None else tuple(by[dim] for dim in order)


def inverse(order: Order) -> Order:
    """The permutation that undoes another."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def laid_out(x: Any, order: Order, result_order: Order | None = None) -> Any:
    """``x`` dense with its dimensions in memory in ``order``, then permuted by ``result_order``; tensors or proxies.

    The substitution calls this as one node. What it is in operations is settled when the lowering is known: nothing
    where that already writes this layout.
    """
    fake = value_of(x.node) if isinstance(x, Proxy) else x
    if not is_laid_out(fake, order):
        as_is = order == tuple(range(len(order)))
        x = x.contiguous() if as_is else x.permute(order).contiguous().permute(inverse(order))
    return x if result_order is None else x.permute(result_order)
