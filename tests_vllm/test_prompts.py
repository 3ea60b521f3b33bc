"""One engine against the oracle: single prompts, batches, chunks of any size, counters."""

from __future__ import annotations

import pytest

from tests_vllm.support import SHOWS, Engine, Oracle, check, gap, prompts


def test_the_model_shows_which_mask_it_has(oracle: Oracle) -> None:
    for name in ("long", "middle", "fork", "cut"):
        asked = prompts()[name]
        assert gap(oracle.answer(asked), oracle.answer(asked, ())) > SHOWS


def test_one_prompt_with_its_own_logarithms(engine: Engine, oracle: Oracle) -> None:
    (answer,), _ = engine.ask([prompts()["long"]], prompt=True)
    check(oracle, "long", answer)


def test_prompts_of_different_lengths_in_one_batch(engine: Engine, oracle: Oracle) -> None:
    engine.llm.reset_prefix_cache()
    names = ["long", "middle", "short", "fork"]
    answers, _ = engine.ask([prompts()[name] for name in names])
    for name, answer in zip(names, answers, strict=True):
        check(oracle, name, answer)


@pytest.mark.parametrize("tokens", [150, 64, 33, 7, 1])
def test_prompts_in_chunks(engine: Engine, oracle: Oracle, tokens: int) -> None:
    engine.llm.reset_prefix_cache()
    names = ["long", "middle", "short"] if tokens > 7 else ["middle", "short"]
    with engine.chunks_of(tokens):
        answers, _ = engine.ask([prompts()[name] for name in names])
    for name, answer in zip(names, answers, strict=True):
        check(oracle, name, answer)


def test_several_samples_of_one_prompt(engine: Engine, oracle: Oracle) -> None:
    """So cold that each is the greedy one. They are requests of their own, which find each other's blocks."""
    engine.llm.reset_prefix_cache()
    names, samples = ["long", "short"], 3
    answers, _ = engine.ask([prompts()[name] for name in names], n=samples, temperature=0.01)
    for name, answer in zip([name for name in names for _ in range(samples)], answers, strict=True):
        check(oracle, name, answer)


def test_the_layers_and_tokens_are_on_record(engine: Engine) -> None:
    engine.llm.reset_prefix_cache()
    counts = engine.active.counts
    assert [site.decision for site in counts.report] == ["dense", "triangle", "dense", "triangle"]
    assert {site.reason for site in counts.report} == {"NOT_SELECTED", ""}
    before = counts.tokens["triangle"], counts.tokens["dense"]
    engine.ask([prompts()["long"]], new_tokens=4)
    # Three of the four tokens are computed on; the last one only comes out.
    assert (counts.tokens["triangle"] - before[0], counts.tokens["dense"] - before[1]) == (276, 24 + 3)
