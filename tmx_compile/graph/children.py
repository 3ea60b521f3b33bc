"""Child graphs laid open before the search, and closed again after the rewriting.

Activation checkpointing and nested compile regions put a layer's body into a graph of its own, and a composite call
(``composite.py``) stands for one. The pass works on one flat graph: :func:`flatten` copies the bodies into their
callers, between two markers each, and :func:`restore` makes bodies of them again. A checkpoint stays one, with what the
pass put into it: its memory is the reason it is there. The others are restored as they were where nothing in them has
changed, and stay laid open elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import Graph, GraphModule, Node

from tmx_compile.graph.composite import COMPOSITES, body_of, out_of_place
from tmx_compile.graph.layer import moved, unmark
from tmx_compile.graph.nodes import INSERTED, value_of
from tmx_compile.graph.sizes import size_of

# How many arguments stand before the operands of the body: the body, and a region's name.
_LEADING: dict[Any, int] = {tag_activation_checkpoint: 1, invoke_subgraph: 2}
_REGIONS = "tmx_regions"


@dataclass(frozen=True)
class _Region:
    """One call of a body that was laid open, as it was in the original graph."""

    call: Node
    child: GraphModule
    given: tuple[Any, ...]


def _begins(region: int) -> None:
    """Marks where a body begins; never runs."""


def _ends(region: int) -> None:
    """Marks where a body ends; never runs."""


def flatten(gm: GraphModule) -> GraphModule:
    """A copy of the graph with the bodies of checkpoints and compile regions laid open, or the graph if it has none.

    Example values and parameters are shared with the original. Nodes of a body that several calls share name the module
    of their own call, or none where that cannot be told.
    """
    if not any(_is_call(node) for node in gm.graph.nodes):
        return gm
    return _Flattening(gm).result()


class _Flattening:
    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._graph = Graph()
        self._attributes: dict[str, Any] = {}
        self._regions: list[_Region] = []
        self._shared: dict[Any, list[Node]] = {}
        stack, seen = [gm], {gm}
        while stack:
            for call, child in _calls(stack.pop()).items():
                self._shared.setdefault(_body(call, child), []).append(call)
                if child not in seen:
                    seen.add(child)
                    stack.append(child)

    def result(self) -> GraphModule:
        env: dict[Node, Any] = {}
        output = self._copy(self._gm, env, lambda stack: stack, "")
        self._graph.output(output).meta = dict(self._gm.graph.output_node().meta)
        for node in self._graph.nodes:
            out_of_place(node)
        used = {str(node.target) for node in self._graph.nodes if node.op in ("get_attr", "call_module")}
        flat = GraphModule({name: value for name, value in self._attributes.items() if name in used}, self._graph)
        flat.training = self._gm.training
        flat.meta = {**self._gm.meta, _REGIONS: tuple(self._regions)}
        return flat

    def _copy(self, gm: GraphModule, env: dict[Node, Any], stack_of: Callable[[Any], Any], prefix: str) -> Any:
        """Copy a graph's nodes, operands given in ``env``; returns what its output is."""
        calls = _calls(gm)
        for node in gm.graph.nodes:
            if node in env or node.op == "output":
                continue
            if node in calls and self._lay_open(gm, node, calls, env, stack_of, prefix):
                continue
            if _is_call(node) and node.target in COMPOSITES and self._expand(node, env, stack_of):
                continue
            copied = self._graph.node_copy(node, lambda x: env[x])
            if node.op in ("get_attr", "call_module"):
                copied.target = self._attribute(gm, str(node.target), prefix)
            if "nn_module_stack" in node.meta:
                copied.meta["nn_module_stack"] = stack_of(node.meta["nn_module_stack"])
            env[node] = copied
        return torch.fx.node.map_arg(gm.graph.output_node().args[0], lambda x: env[x])

    def _expand(self, call: Node, env: dict[Node, Any], stack_of: Callable[[Any], Any]) -> bool:
        """Copy the body of a composite call in its place; False where it has none, and stays a call."""
        single = isinstance(value_of(call), torch.Tensor)
        if not single and any(user.target is not operator.getitem for user in call.users):
            return False
        child = body_of(call)
        if child is None:
            return False
        operands = (env[x] for x in call.all_input_nodes)
        body = dict(zip(child.graph.find_nodes(op="placeholder"), operands, strict=True))
        for node in self._open(call, child, body, env, lambda stack: stack, f"{call.name}_"):
            if "nn_module_stack" in call.meta:
                node.meta["nn_module_stack"] = stack_of(call.meta["nn_module_stack"])
        return True

    def _open(
        self,
        call: Node,
        child: GraphModule,
        body: dict[Node, Any],
        env: dict[Node, Any],
        stack_of: Callable[[Any], Any],
        prefix: str,
    ) -> list[Node]:
        """Copy a body, operands given in ``body``, between two markers; its results stand for the call in ``env``."""
        number, given = len(self._regions), tuple(body.values())
        self._regions.append(_Region(call, child, given))
        self._graph.call_function(_begins, (number,))
        results = self._copy(child, body, stack_of, prefix)
        self._graph.call_function(_ends, (number,))
        single = isinstance(value_of(call), torch.Tensor)
        env[call] = results[0] if single else None
        for user in () if single else call.users:
            index = user.args[1]
            assert isinstance(index, int)
            env[user] = results[index]
        return [node for node in body.values() if isinstance(node, Node) and node not in given]

    def _attribute(self, gm: GraphModule, target: str, prefix: str) -> str:
        value = operator.attrgetter(target)(gm)
        name = prefix + (target.replace(".", "_") if prefix else target)
        assert self._attributes.get(name, value) is value
        self._attributes[name] = value
        return name

    def _lay_open(
        self,
        gm: GraphModule,
        call: Node,
        calls: Mapping[Node, GraphModule],
        env: dict[Node, Any],
        stack_of: Callable[[Any], Any],
        prefix: str,
    ) -> bool:
        """Copy a body in the place of its call; False where the call is not understood, which then stays a call."""
        child = calls[call]
        operands = call.args[_LEADING[call.target] :]
        inputs = list(child.graph.find_nodes(op="placeholder"))
        outputs = child.graph.output_node().args[0]
        if len(inputs) != len(operands) or not isinstance(outputs, (tuple, list)):
            return False
        if not all(_same_value(a, b) for a, b in zip(inputs, operands, strict=True)):
            return False
        if any(user.target is not operator.getitem or not isinstance(user.args[1], int) for user in call.users):
            return False
        own = call.meta.get("nn_module_stack")
        shared = [other.meta.get("nn_module_stack") for other in self._shared[_body(call, child)]]
        inner = (lambda stack: stack_of(moved(stack, own, shared))) if len(shared) > 1 else stack_of
        body = {x: env[given] if isinstance(given, Node) else given for x, given in zip(inputs, operands, strict=True)}
        for node in self._open(call, child, body, env, inner, f"{prefix}{_name(call)}_"):
            if len(shared) > 1:
                unmark(node)
        attribute = call.args[0]
        assert isinstance(attribute, Node)
        if len(attribute.users) == 1:
            self._graph.erase_node(env[attribute])
        return True


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and (node.target in _LEADING or node.target in COMPOSITES)


def _calls(gm: GraphModule) -> dict[Node, GraphModule]:
    """The calls of child graphs in a graph, with these."""
    found: dict[Node, GraphModule] = {}
    for node in gm.graph.nodes:
        if _is_call(node) and node.target in _LEADING and node.args:
            body = node.args[0]
            child = getattr(gm, str(body.target), None) if isinstance(body, Node) and body.op == "get_attr" else None
            if isinstance(child, GraphModule):
                found[node] = child
    return found


def _body(call: Node, child: GraphModule) -> Any:
    """What calls of one traced body share: a region's name, as copies of its graph may stand in many places."""
    return call.args[1] if call.target is invoke_subgraph else child


def _name(call: Node) -> str:
    body = call.args[0]
    assert isinstance(body, Node)
    return f"{body.target}_{call.name}"


def _same_value(inner: Node, operand: Any) -> bool:
    """Whether a body was traced for just this operand: shape by shape, so that its example values hold here."""
    inside, outside = value_of(inner), value_of(operand) if isinstance(operand, Node) else operand
    if isinstance(inside, torch.Tensor) and isinstance(outside, torch.Tensor):
        same = tuple(map(size_of, inside.shape)) == tuple(map(size_of, outside.shape))
        return same and inside.dtype == outside.dtype and inside.device == outside.device
    if isinstance(inside, (int, torch.SymInt)) and isinstance(outside, (int, torch.SymInt)):
        return size_of(inside) == size_of(outside)
    return inside is outside or (type(inside) is type(outside) is float and inside == outside)


def restore(gm: GraphModule) -> None:
    """Make bodies again of what :func:`flatten` laid open, in the graph itself; no-op for any other graph."""
    regions: tuple[_Region, ...] = gm.meta.pop(_REGIONS, ())
    # The last to begin is the innermost.
    for number in reversed(range(len(regions))):
        begin, end = (_marker(gm, kind, number) for kind in (_begins, _ends))
        body = _between(begin, end)
        region = regions[number]
        if region.call.target is tag_activation_checkpoint:
            _close(gm, region, begin, body)
        else:
            _close_unchanged(gm, region, begin, body)
        for marker in (begin, end):
            gm.graph.erase_node(marker)
    if regions:
        gm.graph.lint()
        gm.recompile()


def _marker(gm: GraphModule, kind: Callable[[int], None], number: int) -> Node:
    (found,) = [node for node in gm.graph.find_nodes(op="call_function", target=kind) if node.args == (number,)]
    assert isinstance(found, Node)
    return found


def _between(begin: Node, end: Node) -> list[Node]:
    nodes: list[Node] = []
    node = begin.next
    while node is not end:
        nodes.append(node)
        node = node.next
    return nodes


def _close(gm: GraphModule, region: _Region, begin: Node, body: list[Node]) -> None:
    """Make a body of the nodes after ``begin``, whatever has become of them."""
    body = _hoisted(begin, body)
    inside = set(body)
    results = [node for node in body if any(user not in inside for user in node.users)]
    attributes: dict[str, Any] = {}
    graph = Graph()
    env: dict[Node, Node] = {}
    operands: list[Node] = []

    def inner(node: Node) -> Node:
        if node not in env:
            if node.op == "get_attr" and not isinstance(value_of(node), torch.Tensor):
                attributes[str(node.target)] = operator.attrgetter(str(node.target))(gm)
                env[node] = graph.node_copy(node)
            else:
                operands.append(node)
                env[node] = graph.placeholder(node.name)
                env[node].meta["example_value"] = value_of(node)
        return env[node]

    # Operands come first in the graph of the body.
    for node in body:
        for source in node.all_input_nodes:
            if source not in inside:
                inner(source)
    for node in body:
        if node.op in ("get_attr", "call_module"):
            attributes[str(node.target)] = operator.attrgetter(str(node.target))(gm)
        env[node] = graph.node_copy(node, inner)
    graph.output(tuple(env[node] for node in results))
    child = GraphModule(attributes, graph)
    child.training, child.meta = region.child.training, dict(region.child.meta)
    _call(gm, region, begin, child, body, operands, results)


def _hoisted(begin: Node, body: list[Node]) -> list[Node]:
    """Move what the pass inserted for more than this body before it, where it needs nothing of the body."""
    inside = set(body)
    free: set[Node] = set()
    for node in body:
        if node.meta.get(INSERTED) and all(source in free or source not in inside for source in node.all_input_nodes):
            free.add(node)
    wanted = {node for node in free if any(user not in inside for user in node.users)}
    for node in reversed(body):
        if node in free and any(user in wanted for user in node.users):
            wanted.add(node)
    for node in body:
        if node in wanted:
            begin.prepend(node)
    return [node for node in body if node not in wanted]


def _close_unchanged(gm: GraphModule, region: _Region, begin: Node, body: list[Node]) -> None:
    """Make the original call again if the nodes after ``begin`` are still copies of its body; else leave them open."""
    originals = [node for node in region.child.graph.nodes if node.op not in ("placeholder", "output")]
    if len(originals) != len(body) or _calls(region.child) or any(node.meta.get(INSERTED) for node in body):
        return
    env: dict[Node, Any] = dict(zip(originals, body, strict=True))
    for original, node in zip(originals, body, strict=True):
        theirs, ours = _arguments(original), _arguments(node)
        if original.op != node.op or len(theirs) != len(ours):
            return
        if any(env.setdefault(inner, outer) is not outer for inner, outer in zip(theirs, ours, strict=True)):
            return
    inputs = region.child.graph.find_nodes(op="placeholder")
    # What the body does not use must still be there to be given to it.
    operands = [env.get(x) or _still_there(was) for x, was in zip(inputs, region.given, strict=True)]
    outputs = region.child.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    results = [env.get(x) if isinstance(x, Node) else None for x in outputs]
    inside = set(body)
    if None in operands or not {node for node in results if node is not None} <= inside:
        return
    if any(user not in inside for node in body if node not in results for user in node.users):
        return
    _call(gm, region, begin, region.child, body, operands, results)


def _still_there(was: Any) -> Any:
    return None if isinstance(was, Node) and was._erased else was


def _arguments(node: Node) -> list[Node]:
    """The nodes among a node's arguments, each as often as it occurs."""
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _call(
    gm: GraphModule,
    region: _Region,
    begin: Node,
    child: GraphModule,
    body: list[Node],
    operands: list[Any],
    results: list[Any],
) -> None:
    """Call a graph before ``begin`` in the place of the nodes of ``body``, some of which are its results."""
    inside = set(body)
    target = region.call.target
    assert callable(target)
    with gm.graph.inserting_before(begin):
        if target in _LEADING:
            leading = (_reference(gm, region, child), *region.call.args[1 : _LEADING[target]])
            call = gm.graph.call_function(target, (*leading, *operands), dict(region.call.kwargs))
            call.meta = {**region.call.meta, "example_value": tuple(value_of(node) for node in results)}
        else:
            env = dict(zip(region.call.all_input_nodes, operands, strict=True))
            call = gm.graph.node_copy(region.call, lambda node: env[node])
        for node in dict.fromkeys(results):
            if node is None:
                continue
            item = call
            if not isinstance(value_of(region.call), torch.Tensor):
                item = gm.graph.call_function(operator.getitem, (call, results.index(node)))
                item.meta = dict(node.meta)
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in inside)
    for node in reversed(body):
        gm.graph.erase_node(node)


def _reference(gm: GraphModule, region: _Region, child: GraphModule) -> Node:
    """The node of a child graph, which becomes an attribute under its original name or one like it."""
    was = region.call.args[0]
    assert isinstance(was, Node)
    name, number = str(was.target), 0
    while getattr(gm, name, child) is not child:
        name, number = f"{was.target}_{number}", number + 1
    gm.add_module(name, child)
    node = gm.graph.get_attr(name)
    node.meta = dict(was.meta)
    return node
