"""Which value of each tensor a site reads: what the operator reads later must be what the graph read.

A finder describes a site by its *leaves*: query, key, value, the masks, what they are scaled by. Between the leaves and
the site stand calls that are seen through. The description is exact if each of these calls reads what the call below it
computed, with no write to its storage in between, and each leaf is read in one version only. The version is recorded;
where it is no longer the present one at the site, the substitution saves a copy in time (``passes/emit.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.storages import Storages
from tmx_compile.report import Reason, Rejected


def with_versions(site: AttentionSite, storages: Storages) -> AttentionSite | Rejected:
    """The site with the version in which each of its leaves is read, or the write that makes it another site."""
    leaves = set(_leaves(site))
    for leaf in leaves:
        if storages.is_reshaped(leaf):
            return _refuse(leaf, leaf)
    inside = _between(site, leaves)
    versions: dict[Node, int] = {}
    for reader in inside:
        for source in _read_by(reader, leaves):
            if source in leaves:
                version = storages.version(source, reader)
                if versions.setdefault(source, version) != version:
                    return _refuse(source, source)
            elif not _is_number(source):
                write = storages.changed(source, reader, site.effects)
                if write is not None:
                    return _refuse(write, source)
    for effect in site.effects:
        # It goes with the site: nothing that stays may see what it wrote.
        if storages.writes(effect) and not inside.issuperset(storages.sharing(effect)):
            return _refuse(effect, effect)
    return replace(site, versions=versions)


def _refuse(write: Node, tensor: Node) -> Rejected:
    detail = f"{write.name} writes to {tensor.name}" if write is not tensor else f"{write.name} is written in between"
    return Rejected(Reason.WRITTEN_IN_PLACE, detail, write)


def _leaves(site: AttentionSite) -> Iterator[Node]:
    for operand in (site.query, site.key, site.value):
        yield operand.node
    for part in site.masks:
        yield from part.tensors
    if site.factor is not None:
        yield site.factor
    if site.sink_logits is not None:
        yield site.sink_logits.node
    if site.block_plan is not None:
        yield from site.block_plan.tensors


def _between(site: AttentionSite, leaves: set[Node]) -> set[Node]:
    """The calls between the leaves and the site, and those that go with it."""
    inside: set[Node] = set()
    stack = [site.node, *site.effects]
    while stack:
        node = stack.pop()
        if node in inside or node in leaves or _is_number(node):
            continue
        inside.add(node)
        stack.extend(_read_by(node, leaves))
    return inside


def _read_by(node: Node, leaves: set[Node]) -> list[Node]:
    """What a call reads. Of a block mask only what the site names counts: the rest is for the backward pass."""
    if node.target is not flex_attention:
        return node.all_input_nodes
    return [source for source in node.all_input_nodes if source in node.args[:3] or source in leaves]


def _is_number(node: Node) -> bool:
    """Whether a node holds sizes and numbers only, which no write to a tensor changes."""
    value = value_of(node)
    return value is not None and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
