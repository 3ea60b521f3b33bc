"""Put the operator in the place of a proven site, and remove the mask code that nothing else needs."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.errors import VerificationError
from tmx_compile.find.site import AttentionSite, Operand
from tmx_compile.graph.erase import dead_ends, erase_dead
from tmx_compile.graph.layout import NAME, laid_out, memory_order, permuted
from tmx_compile.graph.nodes import FIRST_ROW, LAYER, fake_mode_of, tensor_of
from tmx_compile.graph.sizes import size_of
from tmx_compile.graph.storages import Storages
from tmx_compile.operator import CHECK_MASK, FIRST_ROW_INSIDE, KEEP_WINDOW, OPERATOR
from tmx_compile.operator.block_plan import MESSAGE, PLAN_HOLDS
from tmx_compile.passes.emit import Emitter
from tmx_compile.passes.plan import Plan, SitePlan
from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import Proof
from tmx_compile.proof.terms import Lin, Truthy


def substitute(plan: Plan) -> Plan:
    """Stage 7, substitute: put the operator in the place of every site that has a lowering."""
    assert plan.storages is not None
    substituter = _Substituter(plan.gm, fake_mode_of(plan.gm), plan.storages)
    sites = []
    for item in plan.sites:
        if item.lowering is None:
            sites.append(item)
            continue
        both = substituter.substitute(item)
        assert item.call is not None
        query, key, value, key_mask = (tensor_of(arg) for arg in both.args[:4])
        assert query is not None
        assert key is not None
        assert value is not None
        call = replace(item.call, query=query, key=key, value=value, key_mask=key_mask)
        sites.append(replace(item, call=call, operator=both))
    substituter.clean([item.site for item in sites if item.operator is not None and item.site is not None])
    return replace(plan, sites=tuple(sites))


class _Substituter:
    """Substitutes sites of one graph. Sites with the same padding share one key mask."""

    def __init__(self, gm: GraphModule, fake_mode: Any, storages: Storages) -> None:
        self._gm = gm
        self._emit = Emitter(gm, fake_mode, storages)
        self._keys: dict[Any, _Keys] = {}
        self._checked: set[Any] = set()

    def substitute(self, item: SitePlan) -> Node:
        """Replace one site; returns the operator's node. Call :meth:`clean` after the last one."""
        site, proof, call = item.site, item.proof, item.call
        assert site is not None
        assert proof is not None
        assert call is not None
        out = tensor_of(site.node)
        assert out is not None
        with self._emit.before(site) as emit:
            keys = self._shared(site, proof)
            listed = () if site.block_plan is None else site.block_plan.tensors
            checked = (site.block_plan, proof, tuple(map(emit.source, listed)))
            if checked not in self._checked:
                _check_blocks(emit, site, proof, keys.mask)
                self._checked.add(checked)
            # Under autocast SDPA takes mixed dtypes; its result tells which one it computes in.
            operands = [self._operand(x, out.dtype) for x in (site.query, site.key, site.value)]
            if site.factor is not None:
                factor = emit.source(site.factor)
                operands[0] = self._cast(emit.call(torch.mul, operands[0], factor), out.dtype)
            operands[1:] = [keys.of(emit, operand) for operand in operands[1:]]
            counts = call.geometry.arguments(site.scale)
            both = emit.call(OPERATOR, *operands, keys.mask, *counts)
            both.meta[FIRST_ROW], both.meta[LAYER] = keys.first_row, item.layer.index
            result = emit.call(operator.getitem, both, 0)
            if keys.shown is not None:
                result = emit.call(KEEP_WINDOW, result, *operands, keys.mask, keys.shown, *counts)
            result = self._laid_out(result, site)
        self._emit.replace(site.node, result)
        _check_same(result, out)
        return both

    def clean(self, sites: list[AttentionSite]) -> None:
        """Erase the replaced calls and what only they used, then verify the graph."""
        # Other results of the same call: a site may have only such as nothing needs.
        others = [user for site in sites for user in site.node.all_input_nodes[0].users if site.form == "flex"]
        ends = [end for other in others for end in dead_ends(other) or ()]
        effects = [node for site in sites for node in site.effects]
        erase_dead(self._gm.graph, [*ends, *effects, *(site.node for site in sites)], effects)
        self._gm.graph.lint()
        self._gm.recompile()

    def _laid_out(self, result: Node, site: AttentionSite) -> Node:
        """The result as the site's users know it: its dimensions, their order in memory, its name."""
        order = memory_order(site.node)
        if order is None:
            raise VerificationError(f"{site.node.name}: no dense tensor has the layout of what is to be replaced")
        placed = self._emit.call(laid_out, result, permuted(order, site.result_order), site.result_order)
        placed.meta[NAME] = site.node.name
        return placed

    def _operand(self, operand: Operand, dtype: torch.dtype) -> Node:
        node = self._emit.source(operand.node)
        if operand.order is not None:
            node = self._emit.call(torch.Tensor.permute, node, operand.order)
        return self._cast(node, dtype)

    def _cast(self, node: Node, dtype: torch.dtype) -> Node:
        fake = tensor_of(node)
        assert fake is not None
        return node if fake.dtype == dtype else self._emit.call(torch.Tensor.to, node, dtype)

    def _shared(self, site: AttentionSite, proof: Proof) -> _Keys:
        sizes = [size_of(n) for n in (site.fake("query").shape[0], site.q_len, site.kv_len)]
        shared = (proof, *sizes)
        if shared not in self._keys:
            self._keys[shared] = _keys(self._emit, site, proof)
        return self._keys[shared]


@dataclass(frozen=True)
class _Keys:
    """Which keys a call reads, and in which order.

    Attributes:
        mask: (B, Skv) bool or document numbers, over the keys as the operator gets them.
        end: one past the last key that any row may attend; None: all keys.
        index: (Skv,) the key to put at each place, so that the last row's own key is the last; None: as they are.
        first_row: the position of row 0 where ``index`` moves keys.
        shown: what the check of a promised mask says of its window.
    """

    mask: Node | None
    end: Any = None
    index: Node | None = None
    first_row: Node | None = None
    shown: Node | None = None

    def of(self, emit: Emitter, node: Node) -> Node:
        """Keys or values (B, Hkv, Skv, D) as the operator is to get them."""
        if self.index is not None:
            return emit.call(torch.index_select, node, 2, self.index)
        if self.end is not None:
            return emit.call(operator.getitem, node, (slice(None), slice(None), slice(None, self.end)))
        return node


def _keys(emit: Emitter, site: AttentionSite, proof: Proof) -> _Keys:
    """The key mask of a site, and its keys rearranged to what the operator expects: row i at Skv - Sq + i."""
    mask = None if not proof.valid else emit.truths(proof.valid)
    first_row: Any = None
    shown: Node | None = None
    if proof.promised is not None:
        mask, first_row, shown = _promised(emit, proof.promised, mask)
        if statically_known_true(site.q_len == site.kv_len):
            first_row = None
    elif proof.positions is not None:
        assert proof.offset is not None
        rest = proof.offset - Lin.of(0, None, {proof.positions: 1})
        first_row = emit.call(torch.add, emit.first_position(proof.positions), emit.number(rest))
    elif proof.offset is not None and proof.offset.atoms:
        first_row = emit.number(proof.offset)
    if first_row is not None and proof.promised is None:
        first_row = emit.call(FIRST_ROW_INSIDE, first_row, emit.q_len(), emit.kv_len())
    if proof.documents is not None:
        numbers = _from_one(emit, emit.number(proof.documents))
        # The row at a key that nobody attends has a document all the same.
        mask = numbers if mask is None else emit.call(torch.where, mask, numbers, emit.call(torch.neg, numbers))
    if mask is not None:
        mask = emit.call(torch.Tensor.expand, mask, emit.batch(), emit.kv_len())
    if first_row is not None:
        return replace(_shifted(emit, mask, first_row), shown=shown)
    if proof.offset is None:
        return _Keys(mask, shown=shown)
    end = emit.arithmetic(operator.add, emit.expression(proof.offset.const), emit.q_len())
    if mask is not None:
        mask = emit.call(operator.getitem, mask, (slice(None), slice(None, end)))
    return _Keys(mask, end)


def _from_one(emit: Emitter, numbers: Node) -> Node:
    """Document numbers from 1 on, 0 being that of a key that nobody attends.

    Each gets its place among all in order: a difference of any two int64 numbers may overflow.
    """
    ordered = emit.call(operator.getitem, emit.call(torch.sort, emit.call(torch.reshape, numbers, (-1,))), 0)
    return emit.call(torch.add, emit.call(torch.searchsorted, ordered, numbers), 1)


def _shifted(emit: Emitter, mask: Node | None, first_row: Node) -> _Keys:
    """Keys moved to the end: place j gets key j - shift, with shift = (Skv - Sq) - first_row known at run time only."""
    shift = emit.call(operator.sub, emit.arithmetic(operator.sub, emit.kv_len(), emit.q_len()), first_row)
    index = emit.call(operator.sub, emit.keys(), emit.call(torch.reshape, shift, (1,)))
    inside = emit.call(torch.unsqueeze, emit.call(torch.ge, index, 0), 0)
    index = emit.call(torch.clamp, index, min=0)
    if mask is None:
        mask = emit.call(torch.Tensor.expand, inside, emit.batch(), emit.kv_len())
    else:
        mask = emit.call(torch.mul, emit.call(torch.index_select, mask, 1, index), inside)
    return _Keys(mask, index=index, first_row=first_row)


def _promised(emit: Emitter, promised: Truthy | t.Negation, mask: Node | None) -> tuple[Node, Node, Node]:
    """Of a mask that is promised to be causal, checked when it runs: valid keys, first row's position, its window."""
    truth = promised if isinstance(promised, Truthy) else promised.term
    assert isinstance(truth, Truthy)
    source = emit.source(truth.element.node, truth.element.version)
    checked = emit.call(CHECK_MASK, source, emit.q_len(), emit.kv_len())
    valid, first_row, shown = (emit.call(operator.getitem, checked, i) for i in range(3))
    if mask is not None:
        valid = emit.call(torch.logical_and, valid, mask)
    return valid, first_row, shown


def _check_same(result: Node, out: torch.Tensor) -> None:
    """The replacement must have the shape, dtype and device of what it replaces."""
    fake = tensor_of(result)
    assert fake is not None
    same = tuple(map(size_of, fake.shape)) == tuple(map(size_of, out.shape))
    if not same or fake.dtype != out.dtype or fake.device != out.device:
        raise VerificationError(
            f"{result.name}: {tuple(fake.shape)} {fake.dtype} {fake.device} replaces "
            f"{tuple(out.shape)} {out.dtype} {out.device}"
        )


def _check_blocks(emit: Emitter, site: AttentionSite, proof: Proof, key_mask: Node | None) -> None:
    """Insert a check that the blocks of a FlexAttention call agree with its mask; a no-op for any other site.

    The kernel reads only the blocks that the plan lists, whatever ``mask_mod`` says; a block mask that is an input of
    the graph is not known when it is compiled. The check costs O(tokens + blocks^2), once for all layers that share it.

    Args:
        emit: inserts before the site.
        site: one whose plan the proof found checkable.
        proof: what was proven about its mask.
        key_mask: the operator's key mask for that proof, (B, at most Skv) bool or numbers of documents.
    """
    plan = site.block_plan
    if plan is None:
        return
    partial = map(emit.source, plan.partial)
    full: tuple[Any, Any] = (
        (None, None) if plan.full is None else (emit.source(plan.full[0]), emit.source(plan.full[1]))
    )
    q_len, kv_len = emit.q_len(), emit.kv_len()
    if proof.offset is None:
        first_row = emit.arithmetic(operator.sub, kv_len, q_len)
    else:
        first_row = emit.expression(proof.offset.const)
    holds = emit.call(
        PLAN_HOLDS,
        *partial,
        *full,
        key_mask,
        q_len,
        kv_len,
        first_row,
        plan.rows,
        plan.keys,
        proof.reach,
    )
    emit.call(torch._assert_async, holds, MESSAGE)
