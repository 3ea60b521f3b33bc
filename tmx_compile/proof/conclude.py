"""From the truth of a mask to what is proven about it: causality, valid keys, a window, documents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch.fx import Node

from tmx_compile.graph.nodes import op_name, tensor_of
from tmx_compile.graph.sizes import Size
from tmx_compile.proof import terms as t
from tmx_compile.proof.own_key import OwnKey
from tmx_compile.proof.terms import AllOf, AnyOf, Element, Lin, Negation, NonNegative, Truth, Truthy, Zero
from tmx_compile.report import Reason, Rejected

KEY, ROW, HEAD, BATCH = 0, 1, 2, 3
"""Coordinates of a (batch, heads, rows, keys) tensor, counted from the right."""

Sizes: TypeAlias = "dict[int, Size]"

_DIFFERENCE = {ROW: 1, KEY: -1}


@dataclass(frozen=True)
class Proof:
    """What a site's mask was shown to be.

    Attributes:
        valid: truths of the batch and the key; a key may be attended where all hold.
        offset: absolute position of row 0; None where it is Skv - Sq. Free of coordinates.
        reach: the model's own sliding window, ``p - key <= reach``; None: none.
        documents: the number of the document that a key belongs to; None: one document. A row attends its own.
        positions: the tensor of row positions (one element of it, at row 0) that the promise says are consecutive.
        promised: a mask over rows and keys that the promise says is causal.
    """

    valid: tuple[Truth, ...] = ()
    offset: Lin | None = None
    reach: int | None = None
    documents: Lin | None = None
    positions: Element | None = None
    promised: Truthy | t.Negation | None = None

    @property
    def plain(self) -> bool:
        """Whether the mask is causal in positions aligned to the last key, and a mask over keys: nothing more."""
        return self == Proof(self.valid)


@dataclass(frozen=True)
class Ranges:
    """What the coordinates of a mask range over: their sizes, and whether ``lin >= 0`` everywhere (never guards)."""

    sizes: Sizes
    never_negative: Callable[[Lin], bool]


def conclude(
    truth: Truth,
    ranges: Ranges,
    mask: Node,
    runs: Mapping[Node, Lin],
    *,
    assume_causal: bool,
    own_key: OwnKey | None = None,
) -> Proof | Rejected:
    """What a mask is, or the first thing that keeps it from being understood.

    Args:
        truth: where a row attends a key, with what the ranges of the coordinates settle already decided.
        ranges: of the batch, head, row and key.
        mask: the node to name in a refusal.
        runs: see :class:`~tmx_compile.proof.read.MaskReader`.
        assume_causal: the user's promise.
        own_key: where the own key of a single row was shown to be, see ``proof/own_key.py``.
    """
    facts = sorted(_by_place(truth.terms if isinstance(truth, AllOf) else {truth}, runs), key=str)
    case = _Case(ranges, mask, assume_causal, own_key)
    if truth == t.FALSE:
        return case.refuse(Reason.NOT_CAUSAL, "the mask attends to nothing")
    causal = case.causality(facts)
    if isinstance(causal, Rejected):
        return causal
    for fact in facts:
        if fact not in case.settled:
            refused = case.take(fact)
            if refused is not None:
                return refused
    for fact in case.rows:
        if case.at_own_key(fact) not in case.proof.valid:
            return case.refuse(Reason.MASK_UNKNOWN, f"rows: {words(fact)}")
    return replace(case.proof, valid=tuple(case.valid))


@dataclass
class _Case:
    """One mask on its way to a proof."""

    ranges: Ranges
    mask: Node
    assume_causal: bool
    own_key: OwnKey | None = None
    proof: Proof = field(default_factory=Proof)
    position: Lin = field(default_factory=lambda: Lin(0))
    settled: set[Truth] = field(default_factory=set)
    valid: list[Truth] = field(default_factory=list)
    rows: list[Truth] = field(default_factory=list)

    def refuse(self, reason: Reason, detail: str) -> Rejected:
        """A refusal of this mask."""
        return Rejected(reason, detail, self.mask)

    def causality(self, facts: list[Truth]) -> Rejected | None:
        """Find ``key <= row + offset``, the strongest one, and settle the weaker ones."""
        aligned = self.ranges.sizes[KEY] - self.ranges.sizes[ROW]
        best: Lin | None = None
        for fact in facts:
            if not isinstance(fact, NonNegative):
                continue
            lin, positions = self._consecutive(fact.lin)
            if self.own_key is OwnKey.WRITTEN and dict(lin.factors) == {KEY: -1}:
                # One row: its number is 0 and has left no trace.
                lin = lin + Lin.of(0, {ROW: 1})
            if dict(lin.factors) != _DIFFERENCE or any(t.coordinates(element) for element, _ in lin.atoms):
                continue
            self.settled.add(fact)
            offset = lin - Lin.of(0, _DIFFERENCE)
            if best is None or self.ranges.never_negative(best - offset):
                best = offset
                self.proof = replace(self.proof, positions=positions)
            elif not self.ranges.never_negative(offset - best):
                return self.refuse(Reason.MASK_UNKNOWN, f"two positions for a row: {_sum(best)} and {_sum(offset)}")
        if best is None and self.own_key is OwnKey.LAST:
            # No key lies beyond the last: every mask over keys is causal.
            self.position = Lin.of(aligned, {ROW: 1})
            return None
        if best is None:
            return self._promised(facts)
        if best.const != aligned or best.atoms:
            if not best.atoms and not (
                self.ranges.never_negative(best) and self.ranges.never_negative(Lin.of(aligned - best.const))
            ):
                return self.refuse(Reason.NOT_CAUSAL, f"a row attends keys up to row + {_sum(best)}")
            self.proof = replace(self.proof, offset=best)
        self.position = Lin.of(0, {ROW: 1}) + best
        return None

    def _consecutive(self, lin: Lin) -> tuple[Lin, Element | None]:
        """Under the promise, the position of a row is that of row 0 and the row's number."""
        for element, factor in lin.atoms:
            if ROW in t.coordinates(element) and self.assume_causal and factor == 1:
                first = t.substitute(element, {ROW: Lin(0)})
                reads = [index.factor(ROW) for index in element.index if index.factor(ROW)]
                if isinstance(first, Element) and reads == [1] and not t.coordinates(first):
                    rest = lin - Lin.of(0, None, {element: 1})
                    return rest + Lin.of(0, {ROW: 1}, {first: 1}), first
        return lin, None

    def _promised(self, facts: list[Truth]) -> Rejected | None:
        """No causality can be read: the promise may give it to a mask that only the run can tell."""
        for fact in facts:
            element = _opaque_mask(fact, one_row=self.own_key is OwnKey.WRITTEN)
            if element is None:
                continue
            if not self.assume_causal:
                where = origin(element.node)
                if _is_float(element.node):
                    return self.refuse(Reason.FLOAT_BIAS, f"a float tensor from {where}")
                return self.refuse(Reason.MASK_UNKNOWN, f"reads {where}")
            assert isinstance(fact, (Truthy, Negation))
            self.settled.add(fact)
            self.proof = replace(self.proof, promised=fact)
            self.position = Lin.of(self.ranges.sizes[KEY] - self.ranges.sizes[ROW], {ROW: 1})
            return None
        unread = [fact for fact in facts if _reads(fact) and ROW in t.coordinates(fact)]
        if unread:
            if any(isinstance(fact, NonNegative) for fact in unread):
                return self.refuse(Reason.POSITIONS_UNKNOWN, words(unread[0]))
            return self.refuse(Reason.MASK_UNKNOWN, words(unread[0]))
        return self.refuse(Reason.NOT_CAUSAL, "every row may see later keys")

    def take(self, fact: Truth) -> Rejected | None:
        """One fact beside causality."""
        coordinates = t.coordinates(fact)
        if coordinates <= {KEY, BATCH}:
            self.valid.append(fact)
            self.proof = replace(self.proof, valid=tuple(self.valid))
            return None
        if coordinates <= {ROW, BATCH}:
            self.rows.append(fact)
            return None
        match fact:
            case NonNegative(lin) if lin.factor(KEY) == 1 and lin.factor(ROW) == -1:
                reach = self._at_position(lin)
                if reach is not None and reach.is_number and not self.proof.promised:
                    own = int(reach.const)
                    if own >= 0:
                        known = self.proof.reach
                        self.proof = replace(self.proof, reach=own if known is None else min(known, own))
                        return None
                return self.refuse(Reason.NOT_CAUSAL, words(fact))
            case Zero(lin) if len(lin.atoms) == 2 and self.proof.documents is None and not self.proof.promised:
                documents = self._documents(lin)
                if documents is not None:
                    self.proof = replace(self.proof, documents=documents)
                    return None
                return self.refuse(Reason.MASK_UNKNOWN, words(fact))
        known = not _reads(fact)
        return self.refuse(Reason.NOT_CAUSAL if known else Reason.MASK_UNKNOWN, words(fact))

    def _at_position(self, lin: Lin) -> Lin | None:
        """``lin`` at the row's own key: key replaced by the row's position."""
        if any(KEY in t.coordinates(element) for element, _ in lin.atoms):
            return None
        return t.substitute_lin(lin, {KEY: self.position})

    def _documents(self, lin: Lin) -> Lin | None:
        """The document of a key, where ``lin`` is its difference from the one of the row's own key."""
        for element, factor in lin.atoms:
            mine = t.coordinates(element)
            if KEY in mine and mine <= {KEY, BATCH}:
                key = Lin.of(0, None, {element: 1})
                row = t.substitute_lin(key, {KEY: self.position})
                if lin.scaled(factor) == key - row:
                    return key
        return None

    def at_own_key(self, fact: Truth) -> Truth | None:
        """A truth of the row as one of the key, for ``row = key - offset``; None where that has no whole offset."""
        back = Lin.of(0, {KEY: 1}) - (self.position - Lin.of(0, {ROW: 1}))
        return t.substitute_truth(fact, {ROW: back})


def _by_place(facts: Collection[Truth], runs: Mapping[Node, Lin]) -> Collection[Truth]:
    """Facts about numbers that rise by 1 with every step, inside one document, as facts about the places themselves.

    Packed sequences are given by position ids that start again with every document. Where a row and a key have the
    same running count of breaks, the difference of their position ids is the difference of their places.
    """
    for fact in facts:
        match fact:
            case Zero(lin) if len(lin.atoms) == 2 and not lin.factors:
                (a, _), (b, _) = sorted(lin.atoms, key=lambda pair: pair[1])
                one_sequence = a.node is b.node and a.index[:-1] == b.index[:-1]
                if one_sequence and a.node in runs and lin == Lin.of(0, None, {b: 1, a: -1}):
                    numbers = _at(runs[a.node], b) - _at(runs[a.node], a)
                    places = b.index[-1] - a.index[-1]
                    facts = [_replaced(other, numbers, places) for other in facts]
    return facts


def _at(line: Lin, element: Element) -> Lin:
    """A number of the element's tensor, at the element."""
    last = len(element.index) - 1
    return t.substitute_lin(line, {last - d: index for d, index in enumerate(element.index)})


def _replaced(fact: Truth, numbers: Lin, places: Lin) -> Truth:
    if isinstance(fact, NonNegative):
        for sign in (1, -1):
            rest = fact.lin - numbers.scaled(sign)
            if not rest.atoms:
                return t.compare_ge(rest + places.scaled(sign))
    return fact


def _opaque_mask(fact: Truth, *, one_row: bool) -> Element | None:
    """The tensor that is a mask by itself: its own element at (batch, row, key), true or zero where attended."""
    match fact:
        case Truthy(element) if not _is_float(element.node):
            pass
        case Negation(Truthy(element)) if _is_float(element.node):
            pass
        case _:
            return None
    whole = ({KEY} if one_row else {ROW, KEY}) <= t.coordinates(element) and HEAD not in t.coordinates(element)
    last = len(element.index) - 1
    own = all(i in (Lin(0), Lin.of(0, {last - d: 1})) for d, i in enumerate(element.index))
    return element if whole and own else None


def _is_float(node: Node) -> bool:
    fake = tensor_of(node)
    return isinstance(fake, torch.Tensor) and fake.dtype.is_floating_point


def _reads(fact: Truth) -> bool:
    """Whether a fact depends on a tensor's values."""
    match fact:
        case Truthy():
            return True
        case Negation(inner):
            return _reads(inner)
        case NonNegative(lin) | Zero(lin):
            return bool(lin.atoms)
        case AllOf(terms) | AnyOf(terms):
            return any(map(_reads, terms))
        case _:
            return False


def words(fact: Truth) -> str:
    """A refused fact for people: the comparison in rows and keys, or the node that stopped the reading."""
    match fact:
        case NonNegative(lin):
            return f"requires {_sum(lin)} >= 0"
        case Zero(lin):
            return f"requires {_sum(lin)} == 0"
        case Truthy(element):
            return f"reads {origin(element.node)}"
        case Negation(inner):
            return f"not: {words(inner)}"
        case AllOf(terms):
            return " and ".join(sorted(map(words, terms)))
        case AnyOf(terms):
            return " or ".join(sorted(map(words, terms)))
        case _:
            return str(fact)


def origin(node: Node) -> str:
    """Where a tensor comes from, for people."""
    kind = "the graph input" if node.op == "placeholder" else f"the result of {op_name(node)},"
    return f"{kind} {node.name}"


def _sum(lin: Lin) -> str:
    names = {KEY: "key", ROW: "row", HEAD: "head", BATCH: "batch"}
    parts = [f"{'-' if f == -1 else '' if f == 1 else f'{f}*'}{names.get(c, c)}" for c, f in lin.factors]
    parts += [f"{'-' if f == -1 else '' if f == 1 else f'{f}*'}{e.node.name}[...]" for e, f in _sorted_atoms(lin)]
    return " + ".join([*parts, str(lin.const)] if lin.const != 0 or not parts else parts)


def _sorted_atoms(lin: Lin) -> list[tuple[Element, int]]:
    return sorted(lin.atoms, key=str)
