"""The layer a node belongs to, from the module path that tracing recorded.

A path such as ``L['self'].model.layers.3.self_attn`` names layer 3 of the stack ``model.layers``. It is the same in
every graph of a model, whatever breaks or other towers surround it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch.fx import Node

_INDEX = re.compile(r"(?:^|\.)(\d+)(?=[.\[]|$)|\._modules\['(\d+)'\]|\.(?:\w+)\[(\d+)\](?=[.\[]|$)")
_ROOT = re.compile(r"^(?:L\['self'\]|L\['(?P<name>\w+)'\])\.?")


@dataclass(frozen=True)
class LayerPath:
    """Where a site stands: the readable module path and, where it names exactly one, the layer of which stack."""

    path: str
    stack: str | None = None
    index: int | None = None
    indices: int = 0


def layer_path(node: Node) -> LayerPath:
    """Read the innermost recorded module path of a node; ``index`` is None when it does not name one layer."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return LayerPath("")
    raw = str(next(reversed(stack.values()))[0])
    found = list(_INDEX.finditer(raw))
    path = _ROOT.sub(lambda m: f"{m['name']}." if m["name"] else "", raw).rstrip(".")
    path = re.sub(r"\._modules\['(\w+)'\]|\[(\d+)\]", lambda m: f".{m[1] or m[2]}", path)
    if len(found) != 1:
        return LayerPath(path, indices=len(found))
    match = found[0]
    digits = next(group for group in match.groups() if group is not None)
    before = raw[: match.start()] + (raw[match.start() : match.end()].split("[")[0] if match[3] else "")
    return LayerPath(path, _ROOT.sub("", before), int(digits), 1)
