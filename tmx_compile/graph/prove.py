"""Prove what a site's mask is: causal, with or without a mask over keys. Nothing is assumed.

The mask is read as a truth value of (batch, head, row, key). It is accepted when it equals

    key <= row + (kv_len - q_len)   and   valid[batch, key] and ...

where each ``valid`` is a tensor that depends on the batch and the key alone. Everything else is refused with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.graph import terms as t
from tmx_compile.graph.nodes import op_name, shape_env_of, tensor_of
from tmx_compile.graph.read import MaskReader, View, as_truth
from tmx_compile.graph.rules import RULES
from tmx_compile.graph.site import AttentionSite, MaskMod, MaskPart
from tmx_compile.graph.terms import AllOf, AnyOf, Choice, Element, Lin, NonNegative, Size, Truth, Truthy
from tmx_compile.report import Reason, Rejected

KEY, ROW, HEAD, BATCH = 0, 1, 2, 3
"""Coordinates of a (batch, heads, rows, keys) tensor, counted from the right."""


@dataclass(frozen=True)
class KeyMask:
    """A per-key tensor of the mask: a key is valid where the element is not zero (``inverted``: where it is)."""

    element: Element
    inverted: bool = False


@dataclass(frozen=True)
class Proof:
    """The mask is causal in absolute positions, and-ed with these per-key masks."""

    valid: tuple[KeyMask, ...] = ()


@dataclass
class Prover:
    """Proves the sites of one graph; mask code that sites share is read once.

    Attributes:
        shape_env: the graph's shape environment, None where every length is static.
        written: nodes whose storage an in-place call may change; masks built on them are refused.
    """

    shape_env: Any
    written: frozenset[Node]
    _proofs: dict[Any, Proof | Rejected] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._reader = MaskReader(RULES, lambda lin: self._at_least(lin, {}, 0))

    @classmethod
    def of(cls, fake: torch.Tensor | None, written: frozenset[Node]) -> Prover:
        """A prover for the graph that a fake tensor comes from."""
        return cls(shape_env_of(fake) if fake is not None else None, written)

    def prove(self, site: AttentionSite) -> Proof | Rejected:
        """The proof for one site, or why there is none."""
        q_len, kv_len = site.q_len, site.kv_len
        if not statically_known_true(q_len <= kv_len):
            return Rejected(Reason.MORE_QUERIES, f"{q_len} rows, {kv_len} keys", site.node)
        if not site.masks:
            if not site.is_causal:
                return Rejected(Reason.NOT_CAUSAL, "no mask and is_causal=False", site.node)
            if not statically_known_true(q_len == kv_len):
                return Rejected(Reason.TOP_LEFT, f"{q_len} rows, {kv_len} keys", site.node)
            return Proof()
        if site.is_causal:
            return Rejected(Reason.FORM, "both a mask and is_causal", site.node)
        heads = site.fake("query").shape[1]
        batch = t.size_of(site.fake("query").shape[0])
        sizes = {KEY: t.size_of(kv_len), ROW: t.size_of(q_len), HEAD: t.size_of(heads), BATCH: batch}
        shared = (site.masks, *sizes.items())
        if shared not in self._proofs:
            self._proofs[shared] = self._prove_masks(site.masks, sizes)
        return self._proofs[shared]

    def _prove_masks(self, masks: tuple[MaskPart | MaskMod, ...], sizes: dict[int, Size]) -> Proof | Rejected:
        facts: list[Truth] = []
        for part in masks:
            assert isinstance(part, MaskPart)
            attended = self._part(part, sizes)
            if isinstance(attended, Rejected):
                return attended
            facts.append(attended)
        first = masks[0]
        assert isinstance(first, MaskPart)
        return self._conjunction(t.all_of(*facts), first.node, sizes)

    def _part(self, part: MaskPart, sizes: dict[int, Size]) -> Truth | Rejected:
        mask = part.node
        stale = _first_written(mask, self.written)
        if stale is not None:
            return Rejected(Reason.WRITTEN_IN_PLACE, f"{stale.name}", stale)
        view = self._reader.read(mask)
        for coordinate, size in enumerate(reversed(view.shape)):
            if coordinate > BATCH or (size != 1 and size != sizes[coordinate]):
                return Rejected(Reason.LAYOUT, f"mask of shape {view.shape}", mask)
        return _attended(view, mask)

    def _conjunction(self, attended: Truth, mask: Node, sizes: dict[int, Size]) -> Proof | Rejected:
        attended = self._decide(attended, sizes)
        facts = attended.terms if isinstance(attended, AllOf) else frozenset({attended})
        causal = NonNegative(Lin.of(sizes[KEY] - sizes[ROW], {ROW: 1, KEY: -1}))
        valid: list[KeyMask] = []
        for fact in sorted(facts - {causal}, key=str):
            match fact:
                case Truthy(element) | t.Negation(Truthy(element)) if t.coordinates(element) <= {KEY, BATCH}:
                    refused = self._per_key(element, mask)
                    if refused is not None:
                        return refused
                    valid.append(KeyMask(element, inverted=isinstance(fact, t.Negation)))
                case t.Const():
                    if not fact.value:
                        return Rejected(Reason.NOT_CAUSAL, "the mask attends to nothing", mask)
                case NonNegative() | t.Zero() | t.Negation(t.Zero()) | AnyOf():
                    return Rejected(Reason.NOT_CAUSAL, _words(fact), mask)
                case _:
                    return Rejected(Reason.MASK_UNKNOWN, _words(fact), mask)
        if causal not in facts:
            return Rejected(Reason.NOT_CAUSAL, "every row may see later keys", mask)
        return Proof(tuple(valid))

    def _per_key(self, element: Element, mask: Node) -> Rejected | None:
        """A per-key tensor must be (B or 1, ..., Skv) read at its own batch and from key 0 on, in order."""
        fake = tensor_of(element.node)
        assert fake is not None
        own_key = Lin.of(0, {KEY: 1})
        own_batch = (Lin(0), Lin.of(0, {BATCH: 1}))
        reads_key = [i for i in element.index if i.factor(KEY)]
        others = [i for i in element.index if not i.factor(KEY)]
        in_order = reads_key == [own_key] and all(i in own_batch for i in others)
        if in_order and sum(i == own_batch[1] for i in others) <= 1:
            return None
        return Rejected(Reason.MASK_UNKNOWN, f"{element.node.name} is not read key by key", mask)

    def _decide(self, term: Truth, sizes: dict[int, Size]) -> Truth:
        """Replace comparisons that the ranges of the coordinates settle."""
        match term:
            case NonNegative(lin):
                if self._at_least(lin, sizes, 0):
                    return t.TRUE
                return t.FALSE if self._at_least(lin.scaled(-1), sizes, 1) else term
            case t.Zero(lin):
                apart = self._at_least(lin, sizes, 1) or self._at_least(lin.scaled(-1), sizes, 1)
                return t.FALSE if apart else term
            case t.Negation(inner):
                return t.negate(self._decide(inner, sizes))
            case AllOf(terms):
                return t.all_of(*(self._decide(x, sizes) for x in terms))
            case AnyOf(terms):
                return t.any_of(*(self._decide(x, sizes) for x in terms))
            case _:
                return term

    def _at_least(self, lin: Lin, sizes: dict[int, Size], bound: int) -> bool:
        """Whether ``lin >= bound`` for every coordinate in its range; never guards."""
        low: Size = lin.const
        for coordinate, factor in lin.factors:
            if factor < 0:
                if coordinate not in sizes:
                    return False
                low = low + factor * (sizes[coordinate] - 1)
        if isinstance(low, int):
            return low >= bound
        if self.shape_env is None:
            return False
        lower = self.shape_env.bound_sympy(sympy.expand(low)).lower
        return bool(lower >= bound)


def _attended(view: View, mask: Node) -> Truth | Rejected:
    """Where the mask lets a row attend: a boolean mask is true there, an additive one 0 (else minus infinity)."""
    fake = tensor_of(mask)
    assert fake is not None
    if fake.dtype == torch.bool:
        return as_truth(view.term)
    match view.term:
        case Choice(condition, yes, no):
            masked = torch.finfo(fake.dtype).min
            if yes == 0 and no <= masked:
                return condition
            if no == 0 and yes <= masked:
                return t.negate(condition)
            return Rejected(Reason.FLOAT_BIAS, f"adds {yes:g} or {no:g}", mask)
        case Element(node, _):
            return Rejected(Reason.FLOAT_BIAS, f"a float tensor from {_origin(node)}", mask)
        case _:
            return Rejected(Reason.FLOAT_BIAS, "adds a function of the positions", mask)


def _first_written(node: Node, written: frozenset[Node]) -> Node | None:
    """The first node in the cone of ``node`` that an in-place call may write."""
    if not written:
        return None
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in written:
            return current
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return None


def _words(fact: Truth) -> str:
    """A refused fact for people: the comparison in rows and keys, or the node that stopped the reading."""
    match fact:
        case NonNegative(lin):
            return f"requires {_sum(lin)} >= 0"
        case t.Zero(lin):
            return f"requires {_sum(lin)} == 0"
        case Truthy(element):
            return f"reads {_origin(element.node)}"
        case t.Negation(inner):
            return f"not: {_words(inner)}"
        case AllOf(terms):
            return " and ".join(sorted(map(_words, terms)))
        case AnyOf(terms):
            return " or ".join(sorted(map(_words, terms)))
        case _:
            return str(fact)


def _origin(node: Node) -> str:
    kind = "the graph input" if node.op == "placeholder" else f"the result of {op_name(node)},"
    return f"{kind} {node.name}"


def _sum(lin: Lin) -> str:
    names = {KEY: "key", ROW: "row", HEAD: "head", BATCH: "batch"}
    parts = [f"{'-' if f == -1 else '' if f == 1 else f'{f}*'}{names.get(c, c)}" for c, f in lin.factors]
    return " + ".join([*parts, str(lin.const)] if lin.const != 0 else parts)
