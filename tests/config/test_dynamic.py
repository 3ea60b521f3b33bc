"""Dynamic layers in a configuration: validated, saved, part of the fingerprint."""

import json

import pytest

from tmx_compile import TriangleMixConfig

CONFIG = TriangleMixConfig(
    8, 512, 128, triangle_layer_indices=[4, 5], dynamic_layer_indices=[1, 0], dynamic_share=0.8, dynamic_block=64
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dynamic_layer_indices": [3, 4]}, "dynamic_layer_indices must name no triangle layer, got 4"),
        ({"dynamic_layer_indices": [1, 1]}, "dynamic_layer_indices must not repeat a layer, got 1"),
        ({"dynamic_layer_indices": "01"}, "dynamic_layer_indices must be a sequence of layer indices, got '01'"),
        ({"dynamic_share": 0}, "dynamic_share must be above 0 and at most 1, got 0"),
        ({"dynamic_share": True}, "dynamic_share must be above 0 and at most 1, got True"),
        ({"dynamic_share": [0.5]}, "dynamic_share must be a number, or one for each of the 2 layers .*, got 1"),
        ({"dynamic_share": [0.5, 2]}, r"dynamic_share\[1\] must be above 0 and at most 1, got 2"),
        ({"dynamic_method": "best"}, "dynamic_method must be one of pooled, antidiagonal, sampled, got 'best'"),
        ({"dynamic_block": 100}, "dynamic_block must be one of 16, 32, 64, 128, got 100"),
        ({"dynamic_group": 8}, "dynamic_group must be one of 16, 32, 64 in blocks of 64, got 8"),
        ({"dynamic_group": 128}, "dynamic_group must be one of 16, 32, 64 in blocks of 64, got 128"),
        ({"dynamic_group": True}, "dynamic_group must be one of 16, 32, 64 in blocks of 64, got True"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CONFIG.replace(**changes)


def test_layers_outside_the_model():
    with pytest.raises(ValueError, match="dynamic_layer_indices must be less than num_layers=6, got 6"):
        CONFIG.replace(dynamic_layer_indices=[6]).check_layers(6)


def test_first_layers_count_as_triangle_layers():
    with pytest.raises(ValueError, match="no triangle layer, got 1"):
        TriangleMixConfig(num_triangle_layers=2, dynamic_layer_indices=[1])


def test_off_by_default():
    assert TriangleMixConfig().dynamic_layers() == ()
    assert CONFIG.dynamic_layers() == (0, 1)


def test_shares_are_in_the_order_of_the_layers_given():
    config = TriangleMixConfig(dynamic_layer_indices=iter([5, 2, 3]), dynamic_share=[0.5, 0.2, 0.3])
    assert {layer: config.selection(layer).share for layer in config.dynamic_layers()} == {2: 0.2, 3: 0.3, 5: 0.5}
    assert config.replace(min_seq_len=1).dynamic_share == (0.2, 0.3, 0.5)
    # One share is one share, however it is written.
    same = TriangleMixConfig(dynamic_layer_indices=[0, 1], dynamic_share=[0.8, 0.8])
    assert same == same.replace(dynamic_share=0.8)
    assert same.fingerprint() == same.replace(dynamic_share=0.8).fingerprint()
    with pytest.raises(ValueError, match=r"layer must be one of dynamic_layer_indices=\(2, 3, 5\), got 4"):
        config.selection(4)


def test_groups_of_the_estimate():
    assert CONFIG.selection(0).stride == 16
    assert CONFIG.replace(dynamic_group=64).selection(0).stride == 64
    usual = {
        (method, block): TriangleMixConfig(dynamic_method=method, dynamic_block=block).dynamic_group
        for method in ("sampled", "pooled")
        for block in (128, 64, 32, 16)
    }
    assert list(usual.values()) == [32, 16, 16, 16] + [16] * 4


def test_a_profile_from_before_there_were_groups(tmp_path):
    path = tmp_path / "profile.json"
    old = CONFIG.replace(dynamic_block=128)
    assert old.dynamic_group == 16
    old.replace(dynamic_group=32).to_profile(path, num_layers=6)
    saved = json.loads(path.read_text())
    del saved["dynamic"]["dynamic_group"]
    path.write_text(json.dumps(saved))
    assert TriangleMixConfig.from_profile(path, num_layers=6) == old


@pytest.mark.parametrize("shares", [0.8, [0.8, 0.95]])
def test_a_profile_keeps_them(tmp_path, shares):
    path, config = tmp_path / "profile.json", CONFIG.replace(dynamic_share=shares, dynamic_group=32)
    config.to_profile(path, num_layers=6)
    assert TriangleMixConfig.from_profile(path, num_layers=6) == config
    saved = json.loads(path.read_text())
    del saved["dynamic"]["dynamic_share"]
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="dynamic must hold dynamic_layer_indices, dynamic_share"):
        TriangleMixConfig.from_profile(path, num_layers=6)


def test_a_profile_without_them_is_as_before(tmp_path):
    path = tmp_path / "profile.json"
    TriangleMixConfig(triangle_layer_indices=[1]).to_profile(path, num_layers=2)
    assert "dynamic" not in json.loads(path.read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"dynamic_layer_indices": [0]},
        {"dynamic_share": 0.7},
        {"dynamic_share": [0.7, 0.8]},
        {"dynamic_method": "antidiagonal"},
    ],
)
def test_the_fingerprint_tells_them_apart(change):
    assert CONFIG.replace(**change).fingerprint() != CONFIG.fingerprint()
