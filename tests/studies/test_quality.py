"""The quality harness: its items, its cells, and its figures against an oracle on a tiny model."""

import math
import statistics

import pytest
import torch

from benchmarks.texts import EVALUATION
from studies import quality, quality_tasks
from studies.quality import Cell, Lab
from studies.texts import CALIBRATION
from tests.support.models import tiny_qwen3, with_masks
from tests.support.oracle import rule
from tmx_compile import TriangleMixConfig
from tmx_compile.analysis import CapturedModel
from tmx_compile.mask.geometry import Geometry

STREAM = torch.arange(3000) % 97


class Words:
    """A tokenizer with a token per character."""

    def __call__(self, text, **_):
        class Found:
            input_ids = torch.tensor([[ord(c) % 97 for c in text]])

        return Found


def test_no_text_is_both_calibrated_and_evaluated_on():
    from pydoc_data.topics import topics

    evaluated = "".join(topics[name] for name in EVALUATION)
    for name in CALIBRATION:
        pieces = [topics[name][i : i + 120] for i in range(0, len(topics[name]) - 120, 120)]
        assert sum(piece in evaluated for piece in pieces) <= 0.05 * len(pieces), name


def test_items_have_the_prompt_and_what_follows():
    texts = quality_tasks.continuations(STREAM, 500, 4, 20)
    assert [item.prompt for item in texts] == [500] * 4
    assert torch.equal(texts[1].ids[0], STREAM[520:1040])
    assert torch.equal(texts[1].targets, STREAM[1020:1040])
    found = quality_tasks.needles(Words(), STREAM, 500, 3)
    for item in found:
        assert item.prompt == 500
        needle = item.ids[0, : item.prompt].tolist()
        answer = item.targets.tolist()
        places = [i for i in range(500) if needle[i : i + len(answer)] == answer]
        # Once in the text, where the depth says.
        assert len(places) == 1
        assert abs(places[0] / 500 - item.depth) < 0.15
    for item in quality_tasks.copies(STREAM, 500, 2, 1000):
        listed = item.ids[0, -quality_tasks.LISTED :]
        assert torch.equal(item.targets, listed[quality_tasks.CUE :])
        assert item.prompt == 500
        windows = item.ids[0, : item.prompt].unfold(0, quality_tasks.LISTED, 1)
        assert int((windows == listed).all(1).sum()) == 1
    assert quality_tasks.digest(found) == quality_tasks.digest(quality_tasks.needles(Words(), STREAM, 500, 3))
    with pytest.raises(ValueError, match="the text has 3000 tokens, a prompt and what follows need 3001"):
        quality_tasks.continuations(STREAM, 3000, 1, 1)


def test_every_cell_has_its_layers():
    names = quality.names(False)
    assert len(names) == len(set(names))
    plan = quality.plan_of(False)
    for name in names:
        if name.startswith("ranking/"):
            continue
        prompt, wanted = quality.cells(plan, name)
        assert prompt in plan["prompts"]
        assert len(set(wanted)) == len(wanted) >= 7
        for cell in wanted:
            if cell.policy in ("gradient", "direct"):
                continue
            layers = cell.layers(30)
            assert len(set(layers)) == len(layers) == cell.count
            assert all(0 <= layer < 30 for layer in layers)
    draws = {Cell(Geometry(4, 32, 64), f"random{i}", 9).layers(30) for i in range(3)}
    assert len(draws) == 3
    assert Cell(Geometry(4, 32, 64), "deepest", 2).layers(30) == (28, 29)
    with pytest.raises(RuntimeError, match=r"is missing: run `quality --only 'ranking/\*'` first"):
        Cell(Geometry(1, 2, 3), "gradient", 2).layers(30)


@pytest.fixture
def lab(monkeypatch):
    """The harness around a tiny model in float32."""
    found = Lab.__new__(Lab)
    found.plan = quality.QUICK | {"layers": 3, "following": 16, "texts": 2}
    found.device = torch.device("cpu")
    found.model = tiny_qwen3(layers=3, initializer_range=0.2)
    found.tokenizer, found.text = Words(), STREAM
    found.captured = CapturedModel(found.model, TriangleMixConfig())
    monkeypatch.setattr(quality, "FINAL", 8)
    return found


def decoded_mask(total, prompt, geometry, streaming):
    """Written out: the triangle of the prompt, and rows after it that see everything, or sinks and window alone."""
    row, key = torch.arange(total)[:, None], torch.arange(total)
    mask = rule(row, key, 0, prompt, *geometry.counts)
    return mask if streaming else mask | (key <= row) & (row >= prompt)


@pytest.mark.parametrize("decode", ["dense", "streaming"])
def test_figures_are_those_of_prefill_and_decoding(lab, decode):
    geometry, layers, prompt = Geometry(2, 5, 4), (1, 2), 130
    [record] = lab.evaluate(prompt, [Cell(geometry, "deepest", 2, decode)])
    assert record["indices"] == [1, 2]
    items = lab.items(prompt)
    kls, ratios, later = [], [], []
    for item in items[:2]:
        total = item.ids.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        masks = (causal, decoded_mask(total, prompt, geometry, decode == "streaming"))
        dense, sparse = (
            with_masks(lab.model, item.ids, dict.fromkeys(layers, mask))[0].log_softmax(-1) for mask in masks
        )
        final = slice(prompt - 9, prompt - 1)
        kls.append(float((dense[final].exp() * (dense[final] - sparse[final])).sum(-1).mean()))
        after = slice(prompt - 1, total - 1)
        later.append(float((dense[after].exp() * (dense[after] - sparse[after])).sum(-1).mean()))
        nll = [-x[after].gather(1, item.targets[:, None]).mean() for x in (dense, sparse)]
        ratios.append(float(nll[1] - nll[0]))
    assert record["kl_final"][0] == pytest.approx(statistics.fmean(kls), rel=1e-3)
    assert record["kl_following"][0] == pytest.approx(statistics.fmean(later), rel=1e-3)
    assert record["ppl_following"][0] == pytest.approx(math.expm1(statistics.fmean(ratios)), rel=1e-3)
    assert record["kl_final"][0] > 1e-6
    assert record["kl_final"][1] <= record["kl_final"][0] <= record["kl_final"][2]


@pytest.mark.parametrize("decode", ["dense", "streaming"])
@pytest.mark.parametrize("rows", ["sparse", "dense"])
def test_a_new_turn_is_a_prompt_of_its_own_rows(lab, rows, decode):
    """Earlier turns keep their own last rows; the new one counts its own from its end, or sees everything."""
    last, layers, prompt, turn = 4, (1, 2), 130, 10
    [one, record] = lab.evaluate(
        prompt,
        [Cell(Geometry(2, 5, 4), "deepest", 2, decode), Cell(Geometry(2, 5, 4), "deepest", 2, decode, turn, rows)],
    )
    assert (record["turn"], record["rows"]) == (turn, rows)
    kls = []
    for item in lab.items(prompt)[:2]:
        total = item.ids.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool).tril()
        mask = decoded_mask(total, prompt, Geometry(2, 5, last), decode == "streaming")
        mask[prompt - turn - last : prompt - turn] = causal[prompt - turn - last : prompt - turn]
        if rows == "dense":
            mask[prompt - turn : prompt] = causal[prompt - turn : prompt]
        dense, sparse = (
            with_masks(lab.model, item.ids, dict.fromkeys(layers, m))[0].log_softmax(-1) for m in (causal, mask)
        )
        final = slice(prompt - 9, prompt - 1)
        kls.append(float((dense[final].exp() * (dense[final] - sparse[final])).sum(-1).mean()))
    assert record["kl_final"][0] == pytest.approx(statistics.fmean(kls), rel=1e-3)
    assert abs(record["kl_final"][0] / one["kl_final"][0] - 1) > 0.01


def test_a_turn_that_is_no_part_of_the_prompt_is_refused(lab):
    for turn in (130, -1):
        with pytest.raises(ValueError, match=f"turn must be .* got {turn}"):
            lab.evaluate(130, [Cell(Geometry(2, 5, 4), "deepest", 2, turn=turn)])


def test_a_cell_is_the_same_beside_others(lab):
    """Cells share a dense run, and begin where they differ from it."""
    wanted = [
        Cell(Geometry(2, 5, 4), "deepest", 1),
        Cell(Geometry(2, 5, 4), "first", 2, "streaming"),
        Cell(Geometry(1, 9, 0), "all", 3),
    ]
    together = lab.evaluate(130, wanted)
    assert together == [record for cell in reversed(wanted) for record in lab.evaluate(130, [cell])][::-1]
    assert len({str(record["kl_following"]) for record in together}) == 3
