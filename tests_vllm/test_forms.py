"""Other forms of the engine: compiled, in bfloat16, with a draft model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests_vllm.support import SETTINGS, Answer, Engine, Oracle, check, make_hybrid, prompts

NAMES = ("long", "middle", "short")


def test_layers_with_a_window_of_their_own_are_left_alone(tmp_path: Path) -> None:
    folder = str(tmp_path / "gemma")
    make_hybrid(folder)
    engine, oracle = Engine(folder, SETTINGS | {"triangle_layer_indices": [0, 1, 3], "strict": False}), Oracle(folder)
    for tokens in (512, 33):
        with engine.chunks_of(tokens):
            answers, _ = engine.ask([prompts()[name] for name in NAMES], prompt=True)
        for name, answer in zip(NAMES, answers, strict=True):
            # Layers 1 and 3 of the oracle are triangle layers, 0 and 2 have their window alone.
            check(oracle, name, answer)
    assert {site.layer: site.reason for site in engine.active.counts.report} == {
        0: "WINDOWED", 1: "", 2: "NOT_SELECTED", 3: "",
    }  # fmt: skip
    engine.close()


def test_compiled(model: str, oracle: Oracle) -> None:
    """vLLM's own default: Dynamo and Inductor around the attention calls."""
    engine = Engine(model, enforce_eager=False)
    for tokens in (512, 33):
        with engine.chunks_of(tokens):
            answers, _ = engine.ask([prompts()[name] for name in NAMES], prompt=True)
        for name, answer in zip(NAMES, answers, strict=True):
            check(oracle, name, answer)
    engine.close()


def off_by(mine: Answer, theirs: Answer) -> float:
    """The mean difference of the prompt's own log-probabilities."""
    assert mine.prompt is not None
    assert theirs.prompt is not None
    return statistics.fmean(abs(x - y) for x, y in zip(mine.prompt, theirs.prompt, strict=True))


def test_in_bfloat16(model: str, oracle: Oracle) -> None:
    """As far from the oracle as a prompt is that stays dense, which has the same roundings; and far from dense."""
    engine = Engine(model, dtype="bfloat16")
    for tokens in (512, 33):
        with engine.chunks_of(tokens):
            answers, _ = engine.ask([prompts()[name] for name in NAMES], prompt=True)
        long, middle, short = answers
        rounding = off_by(short, oracle.answer(prompts()["short"]))
        for name, answer in (("long", long), ("middle", middle)):
            assert off_by(answer, oracle.answer(prompts()[name])) < 2 * rounding
            assert off_by(answer, oracle.answer(prompts()[name], ())) > 4 * rounding
    engine.close()


@pytest.fixture(scope="module")
def drafting(model: str) -> Iterator[Engine]:
    """The model drafts for itself, densely: most of its drafts are right, not all."""
    speculation: dict[str, Any] = {"method": "draft_model", "model": model, "num_speculative_tokens": 2}
    made = Engine(model, speculative_config=speculation)
    yield made
    made.close()


def test_a_draft_model_is_dense_and_changes_nothing(drafting: Engine, oracle: Oracle) -> None:
    answers, _ = drafting.ask([prompts()[name] for name in NAMES], new_tokens=16)
    for name, answer in zip(NAMES, answers, strict=True):
        assert answer.tokens == oracle.answer(prompts()[name], new_tokens=16).tokens
    drafters = [site for site in drafting.active.counts.report if site.path.startswith("draft")]
    assert len(drafters) == 4
    assert {site.reason for site in drafters} == {"LAYER_UNKNOWN"}
    totals = {
        each.name: each.value
        for each in drafting.llm.get_metrics()
        if "spec_decode_num" in each.name and hasattr(each, "value")
    }
    assert 0 < totals["vllm:spec_decode_num_accepted_tokens"] <= totals["vllm:spec_decode_num_draft_tokens"]
