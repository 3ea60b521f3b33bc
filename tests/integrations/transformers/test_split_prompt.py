"""``SplitPrompt`` in one process: what each of several would give the model, and what is refused before they meet.

What they compute together is in tests/lowering/context_parallel.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from tests.support.processes import fakes
from tmx_compile.integrations.transformers import SplitPrompt
from tmx_compile.lowering.context_parallel import Ranks

MODEL = SimpleNamespace(config=LlamaConfig())


def pieces(world, *args, model=MODEL):
    found = []
    for rank in range(world):
        with fakes(rank, world) as mesh:
            found.append(SplitPrompt(model, mesh, *args).piece())
    assert all(piece["use_cache"] is True for piece in found)
    return {name: torch.cat([piece[name] for piece in found], 1) for name in found[0] if name != "use_cache"}


def test_pieces_of_a_prompt_that_is_divided():
    ids = torch.arange(24).view(2, 12)
    found = pieces(3, ids)
    assert torch.equal(found["input_ids"], ids)
    assert found["position_ids"].tolist() == [list(range(12))] * 2
    # Without padding no mask: kernels without one are faster.
    assert "attention_mask" not in found


def test_pieces_of_one_that_is_not():
    ids, mask = torch.arange(1, 23).view(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 9:] = 0
    found = pieces(4, ids, mask)
    assert torch.equal(found["input_ids"][:, 1:], ids)
    assert found["attention_mask"].tolist() == [[0] * 4 + [1] * 8, [0] + [1] * 9 + [0] * 2]
    assert found["position_ids"].tolist() == [[0] * 4 + list(range(8)), [0, *range(9), 8, 8]]
    assert found["attention_mask"].shape == pieces(4, ids)["attention_mask"].shape == (2, 12)


@pytest.mark.parametrize("setting", ["sliding_window", "attention_chunk_size"])
def test_pieces_shorter_than_a_window_of_the_model(setting):
    """Without a mask Transformers gives plain causal attention there: the graph would not show the window."""
    for window, masked in ((4, False), (5, True)):
        model = SimpleNamespace(config=LlamaConfig(**{setting: window}))
        found = pieces(3, torch.ones(1, 12, dtype=torch.int64), model=model)
        assert ("attention_mask" in found) is masked
    assert found["attention_mask"].tolist() == [[1] * 12]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_new_tokens_count_on_the_final_process(rank, monkeypatch):
    told = lambda self, write, x: SimpleNamespace(wait=lambda: torch.cat([x * 0, x * 0, x]))  # noqa: E731
    monkeypatch.setattr(Ranks, "all_gather", told)
    with fakes(rank, 3) as mesh:
        split = SplitPrompt(MODEL, mesh, torch.ones(2, 7, dtype=torch.int64))
        split.step(torch.tensor([[5], [6]]))
        found = split.step(torch.tensor([[7, 8], [9, 9]]))
    assert found["input_ids"].tolist() == [[7, 8], [9, 9]]
    assert found["position_ids"].tolist() == [[8, 9]] * 2
    # Nine places for seven tokens: two are in front.
    assert found["attention_mask"][0].tolist() == [int(rank > 0)] * 2 + [1] + [int(rank == 2)] * 3
    assert split.input_ids[:, 7:].tolist() == [[5, 7, 8], [6, 9, 9]]
    assert split.new_tokens == 3
    assert split.attention_mask.shape == (2, 10)


@pytest.mark.parametrize(
    ("ids", "mask", "reason"),
    [
        (torch.ones(7), None, r"input_ids must be \(batch, tokens\), got \(7,\)"),
        (torch.ones(1, 0), None, r"input_ids must be \(batch, tokens\), got \(1, 0\)"),
        (
            torch.ones(1, 7),
            torch.ones(1, 6),
            r"attention_mask must have the shape of input_ids, \(1, 7\), got \(1, 6\)",
        ),
    ],
)
def test_prompts_that_are_none(ids, mask, reason):
    with fakes(0, 2) as mesh, pytest.raises(ValueError, match=reason):
        SplitPrompt(MODEL, mesh, ids, mask)


@pytest.fixture
def nothing_is_exchanged(monkeypatch):
    for name in ("all_gather", "all_to_all", "sum"):
        monkeypatch.delattr(Ranks, name)


@pytest.mark.usefixtures("nothing_is_exchanged")
def test_refusals():
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    mask[0, -1] = 0
    with fakes(0, 2) as mesh:
        split = SplitPrompt(MODEL, mesh, ids)
        for tokens in (torch.ones(2), torch.ones(3, 1), torch.ones(2, 0)):
            with pytest.raises(ValueError, match=r"tokens must be \(2, new tokens\), got"):
                split.step(tokens)
        with pytest.raises(ValueError, match="logits must be of all 4 tokens of the piece, or of one, got 3"):
            split.last(torch.zeros(2, 3, 9))
        with pytest.raises(ValueError, match=r"logits of one row .* padding on the right"):
            SplitPrompt(MODEL, mesh, ids, mask).last(torch.zeros(2, 1, 9))


@pytest.mark.usefixtures("nothing_is_exchanged")
def test_caches_that_do_not_hold_all():
    config = MistralConfig(num_hidden_layers=1, sliding_window=64)
    with fakes(0, 2) as mesh:
        split = SplitPrompt(MODEL, mesh, torch.ones(1, 8, dtype=torch.int64))
        for cache, tokens in ((DynamicCache(), 3), (DynamicCache(), 5), (DynamicCache(config=config), 4)):
            cache.update(torch.zeros(1, 2, tokens, 4), torch.zeros(1, 2, tokens, 4), 0)
            with pytest.raises(ValueError, match=f"cache: layer 0 .* holds {tokens} tokens, and piece .* are 4"):
                split.gathered(cache)
