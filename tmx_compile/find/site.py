"""One attention call of a graph, as the finders describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tmx_compile.graph.nodes import value_of


@dataclass(frozen=True)
class Operand:
    """A tensor of the graph, and the permutation that makes it (batch, heads, tokens, head_dim); None: it is so."""

    node: Node
    order: tuple[int, ...] | None = None

    @property
    def fake(self) -> Tensor:
        """The permuted fake tensor."""
        value = value_of(self.node)
        assert isinstance(value, Tensor)
        return value if self.order is None else value.permute(self.order)


@dataclass(frozen=True)
class SinkLogits:
    """A tensor of as many elements as there are query heads, in their order: one more logit in every row's softmax."""

    node: Node

    @property
    def fake(self) -> Tensor:
        """It as (H,)."""
        value = value_of(self.node)
        assert isinstance(value, Tensor)
        return value if value.dim() == 1 else value.new_empty(value.numel())


@dataclass(frozen=True)
class MaskPart:
    """One tensor that masks the scores; broadcasts to (batch, heads, rows, keys) from the right.

    Attributes:
        node: the mask.
        how: "add" to the scores after multiplying it by ``number``; "keep" the scores where it is true and put
            ``number`` elsewhere; "drop" them where it is true and put ``number`` there.
        number: see ``how``. A number to put counts as minus infinity from -1e4 down.
    """

    node: Node
    how: Literal["add", "keep", "drop"]
    number: float

    @property
    def tensors(self) -> tuple[Node, ...]:
        """The tensors of the graph that it is read from."""
        return (self.node,)


@dataclass(frozen=True)
class MaskMod:
    """FlexAttention's ``mask_mod``: a graph of (batch, head, row, key) and then of ``buffers``, true where attended."""

    graph: GraphModule
    buffers: tuple[Node, ...] = ()

    @property
    def tensors(self) -> tuple[Node, ...]:
        """The tensors of the graph that it is read from; numbers may be among the buffers."""
        return tuple(buffer for buffer in self.buffers if isinstance(buffer, Node))


@dataclass(frozen=True)
class BlockMaskNodes:
    """The ``BlockMask`` of a FlexAttention call in a graph: its kernel reads a pair of blocks only where it is listed.

    Attributes:
        rows: rows in a block, a number of the graph where it is a node.
        keys: keys in a block, likewise.
        partial: the listed blocks in which the mask applies: their number for every block of rows, (B or 1, H or 1,
            row blocks), and which ones, (B or 1, H or 1, row blocks, at most key blocks). int32.
        full: the listed blocks that are attended as a whole, likewise; None: none.
    """

    rows: int | Node
    keys: int | Node
    partial: tuple[Node, Node]
    full: tuple[Node, Node] | None = None

    @property
    def tensors(self) -> tuple[Node, ...]:
        """The tensors that list blocks."""
        return (*self.partial, *(self.full or ()))


@dataclass(frozen=True)
class AttentionSite:
    """``softmax(query @ key^T * scale, masked) @ value`` as it stands in a graph.

    ``key`` and ``value`` are the tensors before any repetition for grouped-query attention, (B, Hkv, Skv, D); query is
    (B, H, Sq, D) and H a multiple of Hkv.

    Attributes:
        node: the node whose users get the result instead: (B, H, Sq, Dv) permuted by ``result_order``, in its dtype.
        masks: what masks the scores, in any order; a key is attended where all of them let it.
        is_causal: masked to the top left triangle beside (or instead of) ``masks``.
        scale: factor on the scores.
        factor: a scalar of the graph (0-d tensor) that the scores are multiplied by as well, or None.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before the masks, or None.
        sink_logits: learned sinks, or None.
        form: the finder's name.
        result_order: how (B, H, Sq, Dv) is permuted to ``node``'s dimensions; None: not at all.
        effects: calls with an effect that have no meaning without the site, such as writing a mask into its scores.
        block_plan: blocks that must be shown to agree with ``masks`` before the site may be replaced, or None.
        versions: how often each tensor named here had been written when the graph read it (``find/versions.py``).
    """

    node: Node
    query: Operand
    key: Operand
    value: Operand
    masks: tuple[MaskPart | MaskMod, ...]
    is_causal: bool
    scale: float
    form: str
    factor: Node | None = None
    softcap: float | None = None
    sink_logits: SinkLogits | None = None
    result_order: tuple[int, ...] | None = None
    block_plan: BlockMaskNodes | None = None
    effects: tuple[Node, ...] = ()
    versions: Mapping[Node, int] = field(default_factory=dict, compare=False)

    def fake(self, name: Literal["query", "key", "value"]) -> Tensor:
        """The fake tensor of an operand, as (batch, heads, tokens, head_dim)."""
        operand: Operand = getattr(self, name)
        return operand.fake

    @property
    def q_len(self) -> int | torch.SymInt:
        """Number of query rows, possibly symbolic."""
        return self.query.fake.shape[2]

    @property
    def kv_len(self) -> int | torch.SymInt:
        """Number of keys, possibly symbolic."""
        return self.key.fake.shape[2]
