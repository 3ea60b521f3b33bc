"""Captured models on a real NVIDIA GPU, where sparse layers run by the purpose-built kernel.

On a GPU: ``python -m pytest tests/analysis/test_analysis_cuda.py``.
"""

import pytest
import torch

from tests.support.models import masked_oracle, tiny_qwen3, with_masks
from tests.support.oracle import rule
from tmx_compile import TriangleMixConfig, calibrate
from tmx_compile.analysis import CapturedModel, Inputs
from tmx_compile.analysis.capture import sections
from tmx_compile.mask import Geometry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
GEOMETRY = (2, 5, 4)


def watched(monkeypatch):
    """What the kernel answers: a refusal would be followed by the operator, with the same numbers."""
    answers, kernel = [], sections.triton_attention

    def attend(call):
        answers.append(kernel(call))
        return answers[-1]

    monkeypatch.setattr(sections, "triton_attention", attend)
    return answers


@pytest.mark.parametrize("padded", [False, True])
def test_a_captured_model_equals_the_oracle(padded, monkeypatch):
    answers = watched(monkeypatch)
    model, same = tiny_qwen3(layers=3, initializer_range=0.2).cuda(), tiny_qwen3(layers=3, initializer_range=0.2)
    ids = torch.randint(0, 128, (2, 90))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :30] = 0
    captured = CapturedModel(model, TriangleMixConfig(*GEOMETRY))
    inputs = Inputs(kwargs={"input_ids": ids.cuda(), "attention_mask": mask.cuda(), "use_cache": False})
    for layers in ((), (1,), (0, 2)):
        answers.clear()
        got = captured.run(inputs, layers).logits.cpu().double()
        config = TriangleMixConfig(*GEOMETRY, triangle_layer_indices=layers)
        want = masked_oracle(same, config, ids, mask)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-3, rtol=0)
        assert [type(answer) for answer in answers] == [torch.Tensor] * len(layers)


def test_pieces(monkeypatch):
    """Two turns and steps that stream, against their masks written out."""
    model, same = tiny_qwen3(layers=2, initializer_range=0.2).cuda(), tiny_qwen3(layers=2, initializer_range=0.2)
    answers, ids = watched(monkeypatch), torch.randint(0, 128, (1, 80))
    captured = CapturedModel(model, TriangleMixConfig(*GEOMETRY))
    inputs = Inputs(kwargs={"input_ids": ids.cuda(), "use_cache": False})
    sink, window, _ = GEOMETRY
    turn = Geometry(*GEOMETRY)
    with captured.pieces([(40, turn), (60, turn), (80, Geometry(sink, window, 0))]):
        got = captured.run(inputs, (0, 1)).logits.cpu().double()
    row, key = torch.arange(80)[:, None], torch.arange(80)
    mask = rule(row, key, 0, 40, *GEOMETRY) | rule(row, key, 0, 60, *GEOMETRY)
    torch.testing.assert_close(got, with_masks(same, ids, {0: mask, 1: mask}), atol=2e-3, rtol=0)
    assert [type(answer) for answer in answers] == [torch.Tensor] * 6


def test_calibration_ranks_as_on_a_cpu():
    model, same = tiny_qwen3(layers=4, initializer_range=0.2).cuda(), tiny_qwen3(layers=4, initializer_range=0.2)
    batches = [torch.randint(0, 128, (1, 200)) for _ in range(2)]
    config = TriangleMixConfig(*GEOMETRY)
    for estimator in ("gradient", "direct"):
        here = calibrate(same, [{"input_ids": x} for x in batches], config=config, estimator=estimator, progress=False)
        there = calibrate(
            model, [{"input_ids": x.cuda()} for x in batches], config=config, estimator=estimator, progress=False
        )
        assert here.scores.keys() == there.scores.keys()
        for measure in here.scores:
            scores = [torch.tensor([found.scores[measure][layer] for layer in range(4)]) for found in (here, there)]
            torch.testing.assert_close(*scores, rtol=0.02, atol=1e-6)
