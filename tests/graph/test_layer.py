"""Layers from recorded module paths."""

import pytest
from torch.fx import Graph

from tmx_compile.graph.layer import layer_path


def at(path):
    node = Graph().placeholder("x")
    if path is not None:
        node.meta["nn_module_stack"] = {"a": ("L['self']", object), "b": (path, object)}
    return layer_path(node)


@pytest.mark.parametrize(
    ("path", "stack", "index", "shown"),
    [
        ("L['self'].model.layers.3.self_attn", "model.layers", 3, "model.layers.3.self_attn"),
        ("L['self'].layers.12", "layers", 12, "layers.12"),
        ("L['model'].transformer.h.0.attn", "transformer.h", 0, "model.transformer.h.0.attn"),
        ("L['self'].layers._modules['7'].attn", "layers", 7, "layers.7.attn"),
        ("L['self'].blocks[5].attn", "blocks", 5, "blocks.5.attn"),
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
