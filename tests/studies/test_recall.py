"""The synthetic recall tasks: read back slot by slot, every question has the answer that its targets say."""

import json

import pytest
import torch

from studies import recall, recall_model
from studies import recall_tasks as tasks
from studies.recall_tasks import ASK, COPY, DEF, HOPS, IGNORED, LIST, LISTED, SLOT, Batch, evaluation, training
from tests.support.models import masked_oracle
from tmx_compile import TriangleMixConfig
from tmx_compile.mask.geometry import Geometry


def read(ids):
    """What a reader of the sequence knows: [(position of the question's name, its hops, its value)], and the lists."""
    value, hops, asked, lists = {}, {}, [], []
    slots = ids.reshape(-1, SLOT).tolist()
    place = 0
    while place < len(slots):
        what, name, thing, _ = slots[place]
        if what == DEF:
            assert name not in value
            value[name], hops[name] = (value[thing], hops[thing] + 1) if thing in value else (thing, 0)
        elif what == ASK:
            assert value[name] == thing
            asked.append((place * SLOT + 1, hops[name], thing))
        elif what == LIST and slots[place] == [LIST] * SLOT:
            rows = slots[place + 1 : place + 1 + LISTED // SLOT]
            lists.append(((place + 1) * SLOT, [x for row in rows for x in row]))
            place += LISTED // SLOT
        place += 1
    return asked, lists


def expected(ids):
    asked, lists = read(ids)
    targets, kind = torch.full_like(ids, IGNORED), torch.full_like(ids, -1)
    for place, hops, value in asked:
        targets[place], kind[place] = value, hops
    if lists:
        (_, first), (start, again) = lists
        assert first == again
        targets[start : start + LISTED - 1] = torch.tensor(again[1:])
        kind[start : start + LISTED - 1] = COPY
    return targets, kind


@pytest.mark.parametrize("tokens", [128, 1024, 4096])
@pytest.mark.parametrize(("names", "room"), [(1, 4), (2, 8), (3, 16)])
def test_training_asks_what_was_said(tokens, names, room):
    batch = training(3, tokens, torch.Generator().manual_seed(tokens), names, room)
    assert batch.ids.shape == batch.targets.shape == batch.kind.shape == (3, tokens)
    assert 0 <= int(batch.ids.min()) <= int(batch.ids.max()) < tasks.VOCABULARY
    for row in range(3):
        targets, kind = expected(batch.ids[row])
        assert torch.equal(batch.targets[row], targets)
        assert torch.equal(batch.kind[row], kind)
        counts = [int((kind == hops).sum()) for hops in range(HOPS)]
        assert counts == [counts[0]] * names + [0] * (HOPS - names)
        body = tokens // SLOT - 2 * (LISTED // SLOT + 1)
        assert counts[0] >= min(max(body // room, 1), tasks.NAMES // HOPS)
    assert len({tuple(row.tolist()) for row in batch.ids}) == 3


@pytest.mark.parametrize("hops", [0, 1, 2, COPY])
def test_evaluation_asks_at_the_end(hops):
    tokens, questions = 1024, 12
    batch = evaluation(4, tokens, questions, hops, torch.Generator().manual_seed(hops))
    for row in range(4):
        targets, kind = expected(batch.ids[row])
        assert torch.equal(batch.targets[row], targets)
        places = (kind >= 0).nonzero().flatten()
        assert set(kind[places].tolist()) == {hops}
        assert len(places) == (LISTED - 1 if hops == COPY else questions)
        assert int(places.min()) >= tokens - max(LISTED, SLOT * questions)


def test_a_seed_gives_the_same_sequences():
    first, second, other = (evaluation(2, 512, 8, 1, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.ids, second.ids)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: training(1, 130, g), "multiple of 4 and at least 96, got 130"),
        (lambda g: training(1, 64, g), "multiple of 4 and at least 96, got 64"),
        (lambda g: training(1, 256, g, names=0), "names must be 1 to 3, got 0"),
        (lambda g: training(1, 256, g, names=4), "names must be 1 to 3, got 4"),
        (lambda g: evaluation(1, 1024, 8, 4, g), "hops must be 0 to 3, got 4"),
        (lambda g: evaluation(1, 256, 100, 0, g), "at least 424, got 256"),
        (lambda g: evaluation(1, 8192, 200, 0, g), "too few for 200 questions"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.Generator())


def test_accuracy_counts_only_what_is_asked():
    batch = evaluation(2, 512, 8, 0, torch.Generator().manual_seed(0))

    class Knows(torch.nn.Module):
        """Says the answer to the first half of the questions, and nonsense elsewhere."""

        def model(self, input_ids, use_cache):
            right = batch.targets.clamp(min=0)
            right[1] = 0
            return type("Output", (), {"last_hidden_state": torch.nn.functional.one_hot(right, tasks.VOCABULARY)})

        def lm_head(self, hidden):
            return hidden

    assert recall_model.accuracy(Knows(), batch) == 0.5


def test_heads_of_a_fresh_model_look_back():
    torch.manual_seed(3)
    model = recall_model.build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        first = model(training(2, 256, torch.Generator().manual_seed(3)).ids, output_attentions=True).attentions[0]
    rows = torch.arange(64, 256)
    for head, back in enumerate((1, 2, 3)):
        assert float(first[:, head, rows, rows - back].mean()) > 0.7
    assert float(first[:, 3, rows, rows - 4].mean()) < 0.1
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.o_proj.weight, layer.self_attn.v_proj.weight.T)
    for layer in model.model.layers[1:]:
        assert torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight)


def test_the_kept_model_is_near_perfect():
    """The committed weights, on sequences that training and the benchmark never drew."""
    model = recall_model.load(recall.FOLDER).float()
    for hops in (*range(HOPS), COPY):
        batch = evaluation(8, 1024, recall_model.QUESTIONS, hops, torch.Generator().manual_seed(97 + hops))
        assert recall_model.accuracy(model, batch) > 0.98


def test_training_leaves_weights_that_load_and_say_the_same(tmp_path):
    recall_model.main(["--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / recall_model.RECORD).read_text(encoding="utf-8"))
    assert record["quick"]
    assert [list(line["accuracy"]) for line in record["log"]] == [["0 hops", "copy"], list(recall_model.TASKS)]
    model = recall_model.load(tmp_path)
    again = recall_model.evaluate(model, torch.device("cpu"), quick=True)
    assert again == record["accuracy"]
    assert str(tmp_path) not in json.dumps(record)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"recall-model\.safetensors is missing"):
        recall_model.load(tmp_path)


def test_accuracy_with_sparse_layers_is_that_of_their_masks():
    """Answers are what the untrained model itself says, so that dense is perfect; sparse is compared with an oracle."""
    torch.manual_seed(1)
    model = recall_model.build(recall_model.QUICK_SHAPE).eval()
    for layer in model.model.layers:
        # Attention outweighs the embedding: what a row sees decides its answer.
        layer.self_attn.o_proj.weight.data.mul_(50)
    lab = recall.Lab(recall.QUICK, model, torch.device("cpu"))
    lab.captured.geometry = geometry = Geometry(2, 6, 12)
    batch = evaluation(2, 512, recall_model.QUESTIONS, 0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        likely = model(batch.ids, use_cache=False).logits.argmax(-1)
    asked = batch.targets >= 0
    own = Batch(batch.ids, torch.where(asked, likely, IGNORED), batch.kind)
    assert lab._accuracy([own], ()) == 1.0
    for layers in ((1,), (0, 1)):
        config = TriangleMixConfig(*geometry.counts, triangle_layer_indices=layers)
        expected = masked_oracle(model, config, batch.ids).argmax(-1)
        assert lab._accuracy([own], layers) == pytest.approx(float((expected == likely)[asked].float().mean()))
    assert lab._accuracy([own], (0, 1)) < 1.0


def test_every_choice_is_measured_once(monkeypatch):
    model = recall_model.build(recall_model.QUICK_SHAPE).eval()
    lab = recall.Lab(recall.QUICK, model, torch.device("cpu"))
    rankings = {"gradient": (0, 1), "direct": (1, 0)}
    monkeypatch.setattr(lab, "_ranking", lambda tokens, geometry, estimator: rankings[estimator])
    seen = []
    monkeypatch.setattr(lab, "_accuracy", lambda batches, layers: seen.append(layers) or len(layers) / 4)
    records = lab.evaluate(512, Geometry(4, 16, 64))
    assert {(r["policy"], r["count"]): r["indices"] for r in records} == {
        ("dense", 0): [],
        ("gradient", 1): [0],
        ("direct", 1): [1],
        ("deepest", 1): [1],
        ("deepest", 2): [0, 1],
    }
    assert len(seen) == 4 * len(recall_model.TASKS)
    assert all(r["dense"] == dict.fromkeys(recall_model.TASKS, 0.0) for r in records)
    assert next(r for r in records if r["count"] == 2)["accuracy"] == dict.fromkeys(recall_model.TASKS, 0.5)
