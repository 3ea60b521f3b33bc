"""Put the operator in the place of a proven site, and remove the mask code that nothing else needs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tmx_compile.errors import VerificationError
from tmx_compile.graph import terms as t
from tmx_compile.graph.nodes import INSERTED, erase_dead, on_fakes, tensor_of, value_of
from tmx_compile.graph.prove import BATCH, KEY, KeyMask, Proof
from tmx_compile.graph.site import AttentionSite, Operand
from tmx_compile.graph.terms import Lin
from tmx_compile.ops import OPERATOR


@dataclass(frozen=True)
class Substitution:
    """A site to replace, with what was proven about it and the geometry that it gets."""

    site: AttentionSite
    proof: Proof
    sink: int
    window: int
    last: int


class Substituter:
    """Substitutes sites of one graph. Sites with the same padding share one key mask."""

    def __init__(self, gm: GraphModule, fake_mode: Any) -> None:
        self._gm = gm
        self._fake_mode = fake_mode
        self._key_masks: dict[Any, Node] = {}

    def substitute(self, item: Substitution) -> Node:
        """Replace one site; returns the operator's node. Call :meth:`clean` after the last one."""
        site = item.site
        graph = self._gm.graph
        out = tensor_of(site.node)
        assert out is not None
        with graph.inserting_before(site.node):
            key_mask = self._key_mask(item) if item.proof.valid else None
            # Under autocast SDPA takes mixed dtypes; its result tells which one it computes in.
            operands = [self._operand(x, out.dtype, site.node) for x in (site.query, site.key, site.value)]
            if site.factor is not None:
                operands[0] = self._call(site.node, torch.mul, (operands[0], site.factor))
                operands[0] = self._cast(operands[0], out.dtype, site.node)
            args = (*operands, key_mask, item.sink, item.window, item.last, site.scale)
            both = self._call(site.node, OPERATOR, args)
            result = self._call(site.node, operator.getitem, (both, 0))
            if site.result_order is not None:
                result = self._call(site.node, torch.Tensor.permute, (result, site.result_order))
        site.node.replace_all_uses_with(result)
        _check_same(result, out)
        return both

    def clean(self, sites: list[AttentionSite]) -> None:
        """Erase the replaced calls and what only they used, then verify the graph."""
        erase_dead(self._gm.graph, [site.node for site in sites])
        self._gm.graph.lint()
        self._gm.recompile()

    def _operand(self, operand: Operand, dtype: torch.dtype, like: Node) -> Node:
        node = operand.node
        if operand.order is not None:
            node = self._call(like, torch.Tensor.permute, (node, operand.order))
        return self._cast(node, dtype, like)

    def _cast(self, node: Node, dtype: torch.dtype, like: Node) -> Node:
        fake = tensor_of(node)
        assert fake is not None
        return node if fake.dtype == dtype else self._call(like, torch.Tensor.to, (node, dtype))

    def _key_mask(self, item: Substitution) -> Node:
        """(B, Skv) bool: every proven per-key tensor, read at (batch, key) as the mask code read it."""
        site = item.site
        batch, kv_len = site.fake("query").shape[0], site.kv_len
        shared = (item.proof.valid, t.size_of(batch), t.size_of(kv_len))
        if shared not in self._key_masks:
            mask: Node | None = None
            for key_mask in item.proof.valid:
                valid = self._valid(key_mask, site)
                mask = valid if mask is None else self._call(site.node, operator.and_, (mask, valid))
            assert mask is not None
            sizes = tuple(self._size(site, axis, operand) for axis, operand in ((0, site.query), (2, site.key)))
            expanded = self._call(site.node, torch.Tensor.expand, (mask, *sizes))
            self._key_masks[shared] = expanded
        return self._key_masks[shared]

    def _valid(self, key_mask: KeyMask, site: AttentionSite) -> Node:
        """One per-key tensor as (B or 1, Skv) bool. Reading by position keeps the original's out-of-range error."""
        element = key_mask.element
        like, source = site.node, element.node
        fake = tensor_of(source)
        assert fake is not None
        index: list[Any] = []
        for term in element.index:
            if term.factor(KEY):
                index.append(self._arange(site, 2, site.key))
            elif term == Lin.of(0, {BATCH: 1}):
                positions = self._arange(site, 0, site.query)
                index.append(self._call(like, torch.unsqueeze, (positions, 1)))
            else:
                index.append(0)
        read = self._call(like, operator.getitem, (source, tuple(index)))
        rank = tensor_of(read)
        assert rank is not None
        if rank.dim() == 1:
            read = self._call(like, torch.unsqueeze, (read, 0))
        if fake.dtype != torch.bool:
            read = self._call(like, torch.Tensor.to, (read, torch.bool))
        return self._call(like, torch.logical_not, (read,)) if key_mask.inverted else read

    def _arange(self, site: AttentionSite, axis: int, operand: Operand) -> Node:
        size = self._size(site, axis, operand)
        return self._call(site.node, torch.arange, (size,), {"device": site.fake("key").device})

    def _size(self, site: AttentionSite, axis: int, operand: Operand) -> Any:
        size = operand.fake.shape[axis]
        if isinstance(size, int):
            return size
        dim = axis if operand.order is None else operand.order[axis]
        return self._call(site.node, torch.Tensor.size, (operand.node, dim))

    def _call(self, like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        """Insert a call with the origin of the site and an example value."""
        name = getattr(target, "__name__", "")
        if getattr(torch.Tensor, name, None) is target:
            node = self._gm.graph.call_method(name, args, kwargs)
        else:
            node = self._gm.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        node.meta[INSERTED] = True
        values, keywords = torch.fx.node.map_arg((args, kwargs or {}), value_of)
        with on_fakes(self._fake_mode):
            node.meta["example_value"] = target(*values, **keywords)
        return node


def _check_same(result: Node, out: torch.Tensor) -> None:
    """The replacement must have the shape, dtype and device of what it replaces."""
    fake = tensor_of(result)
    assert fake is not None
    same = tuple(map(t.size_of, fake.shape)) == tuple(map(t.size_of, out.shape))
    if not same or fake.dtype != out.dtype or fake.device != out.device:
        raise VerificationError(
            f"{result.name}: {tuple(fake.shape)} {fake.dtype} {fake.device} replaces "
            f"{tuple(out.shape)} {out.dtype} {out.device}"
        )
