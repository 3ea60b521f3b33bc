"""Prove what a site's mask is. Nothing is assumed.

The masks are read as one truth value of (batch, head, row, key). It is accepted when it is the conjunction of

- causality, ``key <= p`` with ``p = row + offset``, the offset the same for every row;
- any truth of the batch and the key alone: which keys are valid;
- at most one window, ``p - key <= reach``;
- at most one document condition, ``document[p] == document[key]``;
- the same validity asked of the row's own key.

Everything else is refused with a reason. With the user's promise that the model is causal, a mask (or row positions)
that only the run can tell is accepted too, and checked when the compiled model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.find.site import AttentionSite, MaskMod, MaskPart
from tmx_compile.graph.nodes import shape_env_of, tensor_of
from tmx_compile.graph.sizes import Size, size_of
from tmx_compile.graph.storages import Storages
from tmx_compile.operator import MASKED
from tmx_compile.proof import terms as t
from tmx_compile.proof.conclude import BATCH, HEAD, KEY, ROW, Proof, Ranges, Sizes, conclude, origin
from tmx_compile.proof.expressions import unwritable
from tmx_compile.proof.mask_mod import read_mask_mod
from tmx_compile.proof.own_key import OwnKey
from tmx_compile.proof.read import MaskReader, NotUnderstood, View, as_truth, opaque
from tmx_compile.proof.rules import RULES
from tmx_compile.proof.terms import AllOf, AnyOf, Choice, Element, Lin, NonNegative, Term, Truth, Truthy
from tmx_compile.report import Reason, Rejected

# Refusals of what cannot be read, and may be causal all the same.
_UNREAD = (Reason.MASK_UNKNOWN, Reason.POSITIONS_UNKNOWN)


@dataclass
class Prover:
    """Proves the sites of one graph; mask code that sites share is read once.

    Attributes:
        shape_env: the graph's shape environment, None where every length is static.
        storages: when the graph writes to its tensors: a mask is read as it was when the site read it.
        assume_causal: the user's promise: masks and row positions that cannot be read are causal and consecutive.
        constants: tensors of the graph whose values are known.
        piece: whether the keys are a piece of all: how many there are settles nothing about a key's place.
        known: the constants that the proofs rest on, and what they were read as.
    """

    shape_env: Any
    storages: Storages
    assume_causal: bool = False
    constants: Mapping[Node, torch.Tensor] = field(default_factory=dict)
    piece: bool = False
    _proofs: dict[Any, Proof | Rejected] = field(default_factory=dict)
    known: dict[Node, Term] = field(default_factory=dict)
    _at_least_0: set[Size] = field(default_factory=set)

    def __post_init__(self) -> None:
        # What the graph itself writes to is state, and no constant, whatever it holds now.
        constants = {node: value for node, value in self.constants.items() if not self.storages.is_state(node)}
        # A small buffer is rather state that somebody sets between calls (a position, lengths): values are relied on
        # only where no proof does without.
        tables = {node: value for node, value in constants.items() if sum(size > 1 for size in value.shape) > 1}
        choices = [{}, *([tables] if tables else []), *([constants] if len(constants) > len(tables) else [])]
        self._attempts = [(False, self._reader(choice, self._is_index)) for choice in choices]
        if self.assume_causal:
            # The promise is for what cannot be read: a table of positions can.
            choices = [*choices[1:], choices[0]]
            self._attempts += [(True, self._reader(choice, self._is_promised_index)) for choice in choices]

        # Reads nothing: the mask as a whole is what the promise is about, and it is checked as a whole.
        self._whole = MaskReader({}, self._is_promised_index, None, self.storages)

    def _reader(self, constants: Mapping[Node, torch.Tensor], is_index: Callable[[Lin], bool]) -> MaskReader:
        return MaskReader(RULES, is_index, constants, self.storages)

    @classmethod
    def of(cls, fake: torch.Tensor | None, storages: Storages, **settings: Any) -> Prover:
        """A prover for the graph that a fake tensor comes from."""
        return cls(shape_env_of(fake) if fake is not None else None, storages, **settings)

    def prove(self, site: AttentionSite, *, ordered: bool = False, own_key: OwnKey | None = None) -> Proof | Rejected:
        """The proof for one site, or why there is none.

        Args:
            site: the site.
            ordered: a guard holds that rows are not more than keys.
            own_key: where a single row's own key is, as ``proof/own_key.py`` tells.
        """
        q_len, kv_len = site.q_len, site.kv_len
        if ordered:
            self._at_least_0.add(size_of(kv_len) - size_of(q_len))
        elif not statically_known_true(q_len <= kv_len):
            return Rejected(Reason.MORE_QUERIES, f"{q_len} rows, {kv_len} keys", site.node)
        if not site.masks:
            if own_key is OwnKey.LAST:
                return Proof()
            if not site.is_causal:
                return Rejected(Reason.NOT_CAUSAL, "no mask and is_causal=False", site.node)
            if not statically_known_true(q_len == kv_len):
                return Rejected(Reason.TOP_LEFT, f"{q_len} rows, {kv_len} keys", site.node)
            return Proof()
        if site.is_causal:
            return Rejected(Reason.FORM, "both a mask and is_causal", site.node)
        heads = site.fake("query").shape[1]
        batch = size_of(site.fake("query").shape[0])
        sizes = {KEY: size_of(_as_in_mask(site, kv_len)), ROW: size_of(q_len), HEAD: size_of(heads), BATCH: batch}
        # The same tensor at another time is another mask.
        leaves = [leaf for part in site.masks for leaf in part.tensors]
        shared = (site.masks, tuple(map(site.versions.get, leaves)), own_key, *sizes.items())
        if shared not in self._proofs:
            self._proofs[shared] = self._prove_masks(site, sizes, own_key)
        proof = self._proofs[shared]
        return proof if isinstance(proof, Rejected) else _checkable(site, proof) or proof

    def _prove_masks(self, site: AttentionSite, sizes: Sizes, own_key: OwnKey | None) -> Proof | Rejected:
        """The first proof: without the values of constants if possible, and without the promise."""
        refused: Rejected | None = None
        for promised, reader in self._attempts:
            proof = self._prove_with(reader, site, sizes, own_key, promised)
            if isinstance(proof, Proof):
                self.known |= _under(site, reader.known)
                return proof
            # Of several refusals, the one that knew most says what is wrong with the mask.
            refused = proof
        assert refused is not None
        if self.assume_causal and refused.reason in _UNREAD:
            proof = self._prove_with(self._whole, site, sizes, own_key, promised=True)
            if isinstance(proof, Proof):
                return proof
        return self._written(site) or refused

    def _prove_with(
        self, reader: MaskReader, site: AttentionSite, sizes: Sizes, own_key: OwnKey | None, promised: bool
    ) -> Proof | Rejected:
        attended: list[Truth] = []
        for part in site.masks:
            read = self._part(reader, part, sizes, site)
            if isinstance(read, Rejected):
                return read
            attended.append(read)
        truth = self._decide(t.all_of(*attended), sizes)
        where = next((part.node for part in site.masks if isinstance(part, MaskPart)), site.node)
        ranges = Ranges(sizes, lambda lin: self._at_least(lin, sizes, 0))
        proof = conclude(truth, ranges, where, reader.runs, assume_causal=promised, own_key=own_key)
        return proof if isinstance(proof, Rejected) else unwritable(proof, site.node) or proof

    def _part(
        self, reader: MaskReader, part: MaskPart | MaskMod, sizes: Sizes, site: AttentionSite
    ) -> Truth | Rejected:
        if isinstance(part, MaskMod):
            try:
                return read_mask_mod(reader, part, sizes, site.versions)
            except NotUnderstood:
                return Rejected(Reason.MASK_UNKNOWN, "an operation in mask_mod is not understood", site.node)
        view = reader.at(part.node, site.versions.get(part.node))
        for coordinate, size in enumerate(reversed(view.shape)):
            if coordinate > BATCH or (size != 1 and size != sizes[coordinate]):
                return Rejected(Reason.LAYOUT, f"mask of shape {view.shape}", part.node)
        return _attended(part, view)

    def _written(self, site: AttentionSite) -> Rejected | None:
        """The refusal of a mask that something below was read from after it had been written."""
        for part in site.masks:
            for leaf in part.tensors:
                version = site.versions.get(leaf)
                if version is not None and version != self.storages.version(leaf):
                    write = self.storages.end_of(leaf, self.storages.version(leaf))
                    return Rejected(Reason.WRITTEN_IN_PLACE, f"{write.name} writes to {leaf.name}", write)
                stale = self._attempts[-1][1].stale_below(leaf)
                if stale is not None:
                    write, source = stale
                    what = f"{write.name} writes to {source.name}" if write is not source else write.name
                    return Rejected(Reason.WRITTEN_IN_PLACE, what, write)
        return None

    def _is_index(self, lin: Lin) -> bool:
        """Whether an index can never be negative."""
        return self._at_least(lin, {}, 0)

    def _is_promised_index(self, lin: Lin) -> bool:
        """Whether an index can never be negative if row positions are consecutive from 0 or later."""
        if all(factor > 0 for _, factor in lin.atoms):
            lin = Lin(lin.const, lin.factors)
        return self._at_least(lin, {}, 0)

    def _decide(self, term: Truth, sizes: Sizes, *, alone: bool = True) -> Truth:
        """Replace comparisons that the ranges of the coordinates settle; ``alone``: those that have to hold."""
        match term:
            case NonNegative(lin) | t.Zero(lin) if (
                self.piece and lin.factor(KEY) and not (alone and _ends(term, sizes))
            ):
                return term
            case NonNegative(lin):
                if self._at_least(lin, sizes, 0):
                    return t.TRUE
                return t.FALSE if self._at_least(lin.scaled(-1), sizes, 1) else term
            case t.Zero(lin):
                apart = self._at_least(lin, sizes, 1) or self._at_least(lin.scaled(-1), sizes, 1)
                return t.FALSE if apart else term
            case t.Negation(inner):
                return t.negate(self._decide(inner, sizes, alone=False))
            case AllOf(terms):
                return t.all_of(*(self._decide(x, sizes) for x in terms))
            case AnyOf(terms):
                return t.any_of(*(self._decide(x, sizes, alone=False) for x in terms))
            case _:
                return term

    def _at_least(self, lin: Lin, sizes: Sizes, bound: int) -> bool:
        """Whether ``lin >= bound`` for every coordinate in its range; never guards."""
        if lin.atoms:
            return False
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
        low = sympy.expand(low)
        if self.shape_env.bound_sympy(low).lower >= bound:
            return True
        return any(self.shape_env.bound_sympy(sympy.expand(low - known)).lower >= bound for known in self._at_least_0)


def _ends(term: Truth, sizes: Sizes) -> bool:
    """Whether it bounds the keys of a single row from above: none is behind the row's own, which is the last."""
    return sizes[ROW] == 1 and isinstance(term, NonNegative) and dict(term.lin.factors) == {KEY: -1}


def _as_in_mask(site: AttentionSite, kv_len: int | torch.SymInt) -> int | torch.SymInt:
    """The number of keys as the mask writes it: each layer's cache may have a symbol of its own for the same length."""
    for part in site.masks:
        mask = tensor_of(part.node) if isinstance(part, MaskPart) else None
        if mask is not None and mask.dim() > 0 and statically_known_true(mask.shape[-1] == kv_len):
            return mask.shape[-1]
    return kv_len


def _attended(part: MaskPart, view: View) -> Truth | Rejected:
    """Where a mask lets a row attend."""
    if part.how != "add":
        if not part.number <= MASKED:
            return Rejected(Reason.FLOAT_BIAS, f"masked scores become {part.number:g}", part.node)
        truth = as_truth(view.term)
        return truth if part.how == "keep" else t.negate(truth)
    if part.number <= 0:
        return Rejected(Reason.FLOAT_BIAS, f"a mask multiplied by {part.number:g}", part.node)
    match view.term:
        case Choice():
            odd: list[float] = []

            def judge(number: float) -> Truth:
                if number != 0 and not number * part.number <= MASKED:
                    odd.append(number)
                return t.Const(number == 0)

            truth = t.leaves(view.term, judge)
            if odd:
                return Rejected(Reason.FLOAT_BIAS, f"adds {odd[0]:g} to scores", part.node)
            return truth
        case Element(node):
            coordinates = t.coordinates(view.term)
            if {ROW, KEY} <= coordinates and HEAD not in coordinates and view == opaque(part.node, view.term.version):
                # It may be a mask in floating point: the promise decides, see ``conclude``.
                return t.Negation(Truthy(view.term))
            return Rejected(Reason.FLOAT_BIAS, f"a float tensor from {origin(node)}", part.node)
        case _:
            return Rejected(Reason.FLOAT_BIAS, "adds a function of the positions", part.node)


def _under(site: AttentionSite, known: Mapping[Node, Term]) -> dict[Node, Term]:
    """Those constants that the masks of a site were built from."""
    seen: set[Node] = set()
    stack = [leaf for part in site.masks for leaf in part.tensors]
    while stack and known:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return {node: term for node, term in known.items() if node in seen}


def _checkable(site: AttentionSite, proof: Proof) -> Rejected | None:
    """Why the block plan of a FlexAttention call cannot be checked when the graph runs; None where it can."""
    if site.block_plan is None:
        return None
    offset = proof.offset
    if proof.promised is not None or proof.positions is not None or (offset is not None and offset.atoms):
        return Rejected(Reason.MASK_UNKNOWN, "a block mask over positions from data cannot be checked", site.node)
    return None
