"""When the storage behind each node of a graph is written: a value has a place in the graph, not a name alone.

A node's value is what its call computed. Whoever reads the node later reads that value only if nothing wrote to its
storage in between, through whatever view (:mod:`tmx_compile.graph.effects`). Every question here is about two places.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from tmx_compile.graph.effects import NOTHING, Effect, Effects, has_symbols, storages_of
from tmx_compile.graph.nodes import value_of


class Storages:
    """The storages of one graph, and the calls that write them. Nodes inserted later have storages of their own.

    Storages are over-approximated: tensors that may share one are taken to share it throughout.
    """

    def __init__(self, graph: Graph, effects: Effects | None = None) -> None:
        self._place = {node: i for i, node in enumerate(graph.nodes)}
        self._parent: dict[Any, Any] = {}
        self._reshaped: set[Any] = set()
        self._effects: dict[Node, Effect] = {}
        effects = effects or Effects()
        writes: list[tuple[Node, Node]] = []
        for node in graph.nodes:
            self._join_given(node)
            effect = effects.of(node)
            if effect is NOTHING:
                continue
            self._effects[node] = effect
            inputs = node.all_input_nodes
            for i in effect.shares:
                self._union(node, inputs[i])
            writes += [(node, inputs[i]) for i in sorted(effect.writes)]
            self._reshaped |= {inputs[i] for i in effect.reshapes}
            if effect.attributes:
                writes += [(node, other) for other in graph.find_nodes(op="get_attr")]
        self._writes: dict[Any, list[Node]] = {}
        for node, target in writes:
            found = self._writes.setdefault(self._root(target), [])
            if not found or found[-1] is not node:
                found.append(node)
        self._reshaped = {self._root(node) for node in self._reshaped}

    def _join_given(self, node: Node) -> None:
        """Inputs and attributes of the graph may show one storage, as their example values tell."""
        if node.op not in ("placeholder", "get_attr"):
            return
        value = value_of(node)
        if value is None and node.op == "get_attr" and isinstance(node.graph.owning_module, GraphModule):
            value = getattr(node.graph.owning_module, str(node.target), None)
        for leaf in tree_leaves(value):
            for storage in storages_of(leaf):
                self._union(node, ("storage", storage))

    def _root(self, item: Any) -> Any:
        while (above := self._parent.get(item, item)) is not item:
            self._parent[item] = self._parent.get(above, above)
            item = above
        return item

    def _union(self, a: Any, b: Any) -> None:
        self._parent[self._root(a)] = self._root(b)

    def writes(self, node: Node) -> bool:
        """Whether a call of the graph writes to any tensor."""
        effect = self._effects.get(node, NOTHING)
        return bool(effect.writes or effect.attributes)

    @property
    def any_writes(self) -> bool:
        """Whether anything is written at all."""
        return bool(self._writes)

    def sharing(self, node: Node) -> list[Node]:
        """Every node of the graph that may share storage with one, itself included."""
        root = self._root(node)
        return [other for other in self._place if self._root(other) == root]

    @property
    def reshaped_input(self) -> Node | None:
        """An input of unknown sizes that some call gives another shape, other strides or another storage, or None."""
        inputs = (node for node in self._place if node.op == "placeholder" and self.is_reshaped(node))
        return next((node for node in inputs if has_symbols(node)), None)

    def is_reshaped(self, node: Node) -> bool:
        """Whether a call changes a tensor's shape, strides or storage, so that its recorded value is not its own."""
        return self._root(node) in self._reshaped

    def changed(self, node: Node, reader: Node, ignored: Collection[Node] = ()) -> Node | None:
        """What keeps ``reader`` from reading the value that ``node`` computed: the first write in between, or None."""
        if self.is_reshaped(node):
            return node
        found = self._writes.get(self._root(node), ())
        between = found[self.version(node) : self.version(node, reader)]
        return next((write for write in between if write not in ignored), None)

    def version(self, node: Node, reader: Node | None = None) -> int:
        """How often a node's storage has been written when ``reader`` reads it; None: when the node was computed."""
        found = self._writes.get(self._root(node), ())
        if reader is None:
            return bisect.bisect_right(found, self._place_of(node), key=self._place_of)
        return bisect.bisect_left(found, self._place_of(reader), key=self._place_of)

    def end_of(self, node: Node, version: int) -> Node:
        """The call that ends a version of a node's storage by writing to it."""
        return self._writes[self._root(node)][version]

    def is_state(self, node: Node) -> bool:
        """Whether some call of the graph writes to a node's storage, whenever it does."""
        return self._root(node) in self._writes

    def _place_of(self, node: Node) -> int:
        """The place of a node; one that was inserted later stands where the next node of the graph does."""
        while node not in self._place:
            node = node.next
        return self._place[node]
