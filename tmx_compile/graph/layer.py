"""The layer a node belongs to, from the module path that tracing recorded.

A path such as ``L['self'].model.layers.3.self_attn`` names layer 3 of the stack ``model.layers``. It is the same in
every graph of a model, whatever breaks or other towers surround it. A graph of one layer alone has no such path; a
module of a model that was handed over carries a mark instead, which Dynamo writes beside each of its nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

# How a module is reached is written in several ways: x.3, x[3], x._modules['3'], getattr(x, '3').
_GETATTR = re.compile(r"getattr\(([^()]*), (['\"])(\w+)\2\)")
_ROOT = re.compile(r"^[LG]\[(['\"])(?P<name>\w+)\1\]")
# A function's own variables are no modules on the way.
_CLOSURE = re.compile(r"\.__closure__\[\d+\]\.cell_contents")
# The forward of a module that carries a mark stands on the instance.
_BOUND = re.compile(r"\.forward\.__self__")
_PART = re.compile(r"\[(['\"])(?P<key>.*?)\1\]|\[(?P<index>\d+)\]|(?P<name>[^.\[\]]+)")
# An index in a module path, but no digit within a name.
_INDEX = re.compile(r"(?<!\w)\d")

MARK = "tmx_compile"
"""The key of a mark among the annotations of a node (``torch.fx.traceback.annotate``)."""

_SHARED = "shared"


@dataclass(frozen=True)
class Mark:
    """What a module of a model that was handed over is to be; written as one string, for one guard.

    Attributes:
        plan: the fingerprint of the configuration.
        sparse: whether the configuration names its layer.
        layers: all layers of the model that are like it in this.
    """

    plan: str
    sparse: bool
    layers: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.plan} {'triangle' if self.sparse else 'dense'} {','.join(map(str, self.layers))}"

    @classmethod
    def read(cls, text: str) -> Mark:
        """The mark that was written as ``text``."""
        plan, kind, layers = text.split(" ")
        return cls(plan, kind == "triangle", tuple(map(int, layers.split(","))))


@dataclass(frozen=True)
class LayerPath:
    """Where a site stands.

    Attributes:
        path: the readable module path.
        stack: the list of layers, where the path names exactly one of it.
        index: that layer.
        indices: how many indices the path has.
        mark: what the site's module carries, where the model was handed over.
        is_shared: whether that was lost, as other layers run the same traced body.
        outside: why it is no layer of the model that was handed over, "" where it may be one.
    """

    path: str
    stack: str | None = None
    index: int | None = None
    indices: int = 0
    mark: Mark | None = None
    is_shared: bool = False
    outside: str = ""

    @property
    def is_known(self) -> bool:
        """Whether it can be told if the configuration names the layer."""
        return self.index is not None or self.mark is not None


def layer_paths(nodes: Iterable[Node | None]) -> list[LayerPath]:
    """The layers of all sites of one graph, by the innermost recorded module path of each.

    Where a path has several indices (``layers.3.0``: layers that are pairs of modules), the layer's is the one that
    varies among the paths of this form, if it is the only one.
    """
    nodes = list(nodes)
    found = placed([_parts(node) for node in nodes])
    return [_marked(layer, node) for layer, node in zip(found, nodes, strict=True)]


def placed(paths: Sequence[tuple[str, ...]]) -> list[LayerPath]:
    """The layers that paths, given as the names on the way, stand for."""
    forms: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for parts in paths:
        forms.setdefault(_form(parts), []).append(parts)
    varying = {form: _varying(alike) for form, alike in forms.items()}
    return [_placed(parts, varying[_form(parts)]) for parts in paths]


def unmark(node: Node) -> None:
    """Replace the mark of a node in a body that several layers share: it is that of the layer that was traced."""
    custom = node.meta.get("custom") or {}
    if MARK in custom:
        node.meta["custom"] = {**custom, MARK: _SHARED}


def moved(
    stack: Mapping[str, Any], own: Mapping[str, Any] | None, shared: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """The module stack of a node in a body that several calls share, for one of them; empty where it cannot be told.

    What follows the module that makes the call is the same for every call, unless it has an index of its own.

    Args:
        stack: the node's; it names the modules of the call that was traced.
        own: the module stack of the call that it is for.
        shared: those of all the calls.
    """
    makers = [tuple(_paths(each)) for each in shared]
    if not own or len(set(makers)) < len(makers) or len(stack) < len(own):
        return {}
    traced, here = _paths(stack)[len(own) - 1], _paths(own)[-1]
    found = dict(own)
    for key, (path, kind) in list(stack.items())[len(own) :]:
        suffix = str(path).removeprefix(traced)
        if not str(path).startswith(traced) or _INDEX.search(suffix):
            return {}
        found[f"{key}@{here}"] = (here + suffix, kind)
    return found


def _paths(stack: Mapping[str, Any] | None) -> list[str]:
    return [str(path) for path, _ in (stack or {}).values()]


def _marked(layer: LayerPath, node: Node | None) -> LayerPath:
    text = None if node is None else (node.meta.get("custom") or {}).get(MARK)
    if node is None or text is None:
        return layer
    if text == _SHARED:
        return replace(layer, is_shared=True)
    return replace(layer, mark=Mark.read(text))


def _parts(node: Node | None) -> tuple[str, ...]:
    """The names from the root to the innermost recorded module; a root other than ``self`` is the first."""
    stack = None if node is None else node.meta.get("nn_module_stack")
    if not stack:
        return ()
    raw, changed = str(next(reversed(stack.values()))[0]), 1
    while changed:
        raw, changed = _GETATTR.subn(r"\1.\3", raw)
    raw = _BOUND.sub("", _CLOSURE.sub("", raw))
    raw = _ROOT.sub(lambda m: "" if m["name"] == "self" else m["name"], raw)
    parts = [m["key"] or m["index"] or m["name"] for m in _PART.finditer(raw)]
    return tuple(part for part in parts if part != "_modules")


def _form(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("*" if part.isdecimal() else part for part in parts)


def _varying(alike: list[tuple[str, ...]]) -> int | None:
    """The place of the layer's index in paths that differ in indices alone, or None."""
    places = [i for i, part in enumerate(alike[0]) if part.isdecimal()]
    if len(places) > 1:
        places = [i for i in places if len({parts[i] for parts in alike}) > 1]
    return places[0] if len(places) == 1 else None


def _placed(parts: tuple[str, ...], place: int | None) -> LayerPath:
    found = LayerPath(".".join(parts), indices=sum(part.isdecimal() for part in parts))
    if place is None:
        return found
    return replace(found, stack=".".join(parts[:place]), index=int(parts[place]))
