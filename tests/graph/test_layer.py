"""Layers from recorded module paths."""

import pytest
from torch.fx import Graph

from tmx_compile.graph.layer import layer_paths


def node_at(path):
    node = Graph().placeholder("x")
    if path is not None:
        node.meta["nn_module_stack"] = {"a": ("L['self']", object), "b": (path, object)}
    return node


def at(path):
    return layer_paths([node_at(path)])[0]


@pytest.mark.parametrize(
    ("path", "stack", "index", "shown"),
    [
        ("L['self'].model.layers.3.self_attn", "model.layers", 3, "model.layers.3.self_attn"),
        ("L['self'].layers.12", "layers", 12, "layers.12"),
        ("L['model'].transformer.h.0.attn", "model.transformer.h", 0, "model.transformer.h.0.attn"),
        ("L['self'].layers._modules['7'].attn", "layers", 7, "layers.7.attn"),
        ("L['self'].blocks[5].attn", "blocks", 5, "blocks.5.attn"),
        ("L['self'].blocks._modules[\"5\"].attn", "blocks", 5, "blocks.5.attn"),
        ("getattr(L['self'], '4')", "", 4, "4"),
        ("getattr(L['self'].model.layers, '3').self_attn", "model.layers", 3, "model.layers.3.self_attn"),
        ("getattr(getattr(L['self'].model, 'layers'), '3')", "model.layers", 3, "model.layers.3"),
        ("getattr(G['stack'].layers, '1')", "stack.layers", 1, "stack.layers.1"),
        ("G['stack'].layers.1.attn", "stack.layers", 1, "stack.layers.1.attn"),
        ("G['blocks'][2]", "blocks", 2, "blocks.2"),
        ("L['fn'].__closure__[0].cell_contents.layers.2", "fn.layers", 2, "fn.layers.2"),
        ("layers.3.attn", "layers", 3, "layers.3.attn"),
        ("0", "", 0, "0"),
        ("L['self'].model2.layer4.attn", None, None, "model2.layer4.attn"),
        ("L['self'].self_attn", None, None, "self_attn"),
    ],
)
def test_one_index_names_the_layer(path, stack, index, shown):
    found = at(path)
    assert (found.stack, found.index, found.path) == (stack, index, shown)


def test_no_path():
    assert at(None).index is None


def test_two_indices_are_ambiguous():
    found = at("L['self'].stages.1.layers.3.attn")
    assert found.index is None
    assert found.indices == 2


@pytest.mark.parametrize(
    ("paths", "layers", "stacks"),
    [
        (["layers.0.0", "layers.1.0", "layers.2.0"], [0, 1, 2], {"layers"}),
        (["tower.1.layers.0.attn", "tower.1.layers.1.attn"], [0, 1], {"tower.1.layers"}),
        (["stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0"], [None] * 3, {None}),
        (["layers.4.0"], [None], {None}),
        # Two modules that both attend in every layer: which of them the number counts is not known.
        (["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"], [None] * 4, {None}),
        # Each form of a path is read by itself.
        (["vision.0.1", "layers.0.attn.0", "layers.1.attn.0"], [None, 0, 1], {None, "layers"}),
        # The same module called twice is the same layer twice.
        (["layers.0.0", "layers.1.0", "layers.1.0"], [0, 1, 1], {"layers"}),
    ],
)
def test_the_index_that_varies_is_the_layer(paths, layers, stacks):
    found = layer_paths(node_at(f"L['self'].{path}") for path in paths)
    assert [each.index for each in found] == layers
    assert {each.stack for each in found} == stacks
    assert [each.path for each in found] == paths
