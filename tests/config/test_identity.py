"""Which model it is: the same for its copies, another for any other."""

import pytest
import torch
from torch import nn

from tests.support.models import tiny_qwen3
from tmx_compile.config.fingerprint import ModelFingerprint


def test_copies_of_a_model_are_the_model():
    model = tiny_qwen3()
    found = ModelFingerprint.of(model)
    assert found == ModelFingerprint.of(tiny_qwen3())
    assert found == ModelFingerprint.of(tiny_qwen3().to(torch.bfloat16))
    assert found == ModelFingerprint.of(torch.compile(tiny_qwen3()))
    assert found == ModelFingerprint.of(nn.DataParallel(tiny_qwen3()))
    assert ModelFingerprint.from_dict(found.to_dict()) == found
    found.check(tiny_qwen3().requires_grad_(False).train())


def test_other_weights_and_other_structures_are_told_apart():
    found = ModelFingerprint.of(tiny_qwen3())
    other = tiny_qwen3(seed=1)
    assert ModelFingerprint.of(other).structure == found.structure
    with pytest.raises(ValueError, match=r"it is for other weights of the same architecture: digest \w{16}, those of"):
        found.check(other)
    with pytest.raises(ValueError, match="it is for another model: its parameters' names and shapes have the digest"):
        found.check(tiny_qwen3(layers=3))
    trained = tiny_qwen3()
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight += 1e-3 * torch.randn_like(
            trained.model.layers[1].mlp.up_proj.weight
        )
    assert ModelFingerprint.of(trained).weights != found.weights


def test_the_first_and_last_element_of_a_large_parameter_count():
    model = nn.Linear(1000, 999, bias=False)
    found = ModelFingerprint.of(model)
    for place in ((0, 0), (-1, -1)):
        changed = nn.Linear(1000, 999, bias=False)
        changed.load_state_dict(model.state_dict())
        with torch.no_grad():
            changed.weight[place] += 1
        assert ModelFingerprint.of(changed).weights != found.weights


def test_refusals():
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
        ModelFingerprint.of("model")
    with pytest.raises(ValueError, match="model must have parameters, ReLU has none"):
        ModelFingerprint.of(nn.ReLU())
    with torch.device("meta"), pytest.raises(ValueError, match="parameter bias is on the meta device"):
        ModelFingerprint.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fingerprint must hold structure and weights, got null"):
        ModelFingerprint.from_dict(None)
