"""The report of a served model's layers, counters, the lines in the log, strict mode."""

from __future__ import annotations

import json
import logging

import pytest

from tmx_compile import StrictModeError, TriangleMixConfig
from tmx_compile.integrations.vllm.counts import Counts, why_dense
from tmx_compile.integrations.vllm.layers import LayerFacts
from tmx_compile.integrations.vllm.rows import Dense, Split, Streaming
from tmx_compile.integrations.vllm.settings import Settings
from tmx_compile.report import Reason, spelled

CONFIG = TriangleMixConfig(8, 64, 16, triangle_layer_indices=[2, 3], min_seq_len=100)


def layer(number, **facts):
    return LayerFacts(f"model.layers.{number}.self_attn.attn", **facts)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_layers_records_and_the_startup_line(caplog):
    counts = Counts(Settings(CONFIG, 4))
    drafter = LayerFacts("draft_model.model.layers.2.self_attn.attn")
    with caplog.at_level(logging.INFO, "vllm.trianglemix"):
        counts.layers([*map(layer, range(4)), drafter], "triton")
    found = [(site.layer, site.decision, site.reason, site.lowering) for site in counts.report]
    assert found == [
        (0, "dense", "NOT_SELECTED", "as written"),
        (1, "dense", "NOT_SELECTED", "as written"),
        (2, "triangle", "", "triton"),
        (3, "triangle", "", "triton"),
        (None, "dense", "LAYER_UNKNOWN", "as written"),
    ]
    (line,) = caplog.messages
    assert (
        "triangle layers 2-3 of 5 (dense: 1 LAYER_UNKNOWN, 2 NOT_SELECTED), geometry 8/64/16, prompts over 100" in line
    )
    assert "triangle" in str(counts.report)


def test_a_stage_of_a_pipeline_lacks_layers_and_that_is_no_error():
    counts = Counts(Settings(CONFIG, 4, strict=True))
    counts.layers([layer(2)], "blocked", whole_model=False)
    assert [site.decision for site in counts.report] == ["triangle"]
    assert "triangle layers 2 of 1 in this stage, geometry" in counts.startup_line("blocked")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([layer(2), layer(3, window=9)], r"model\.layers\.3\.self_attn\.attn: .*own sliding window"),
        ([layer(2)], "layers 3: .*no attention layer has such a number"),
    ],
)
def test_strict_mode_and_its_warning(found, message, caplog):
    with pytest.raises(StrictModeError, match=message):
        Counts(Settings(CONFIG, 4, strict=True)).layers(found, "triton")
    with caplog.at_level(logging.WARNING, "vllm.trianglemix"):
        Counts(Settings(CONFIG, 4)).layers(found, "triton")
    assert "stays dense" in caplog.text


def test_tokens_and_steps_are_counted_and_shown_at_intervals(caplog):
    clock = Clock()
    counts = Counts(Settings(CONFIG, 4, stats_log_interval=10), clock)
    whole = Split((Streaming(0, 0, 200, 0, 16),), (Dense(1, 200, 5),))
    with caplog.at_level(logging.INFO, "vllm.trianglemix"):
        counts.step(whole, 205, None)
        counts.step(None, 50, Reason.SHORT_PROMPT)
        counts.step(None, 2, None)
        assert caplog.messages == []
        clock.now = 11
        counts.step(None, 1, None)
        clock.now = 30
        counts.step(None, 0, None)
    assert counts.tokens == {"triangle": 184, "dense": 74}
    assert counts.steps == {"triangle": 1, "SHORT_PROMPT": 1, "decode": 3}
    # Nothing happened before the last look.
    assert caplog.messages == [
        "TriangleMix: 184 triangle tokens, 74 dense tokens (71.3% triangle), steps: 1 SHORT_PROMPT, 2 decode, "
        "1 triangle"
    ]
    assert json.loads(json.dumps(counts.to_dict()))["tokens"] == {"triangle": 184, "dense": 74}


def test_no_interval_no_line(caplog):
    clock = Clock()
    counts = Counts(Settings(CONFIG, 4, stats_log_interval=0), clock)
    clock.now = 1e6
    with caplog.at_level(logging.INFO, "vllm.trianglemix"):
        counts.step(None, 9, None)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("longest", "reason"),
    [(0, Reason.SHORT_PROMPT), (100, Reason.SHORT_PROMPT), (101, Reason.NOT_FASTER), (151, None)],
)
def test_why_no_row_of_a_step_streams(longest, reason):
    assert why_dense(longest, 100, 150) is reason


@pytest.mark.parametrize(("numbers", "text"), [([], "none"), ([3], "3"), ([0, 16, 17, 18, 20], "0,16-18,20")])
def test_layer_numbers_as_text(numbers, text):
    assert spelled(numbers) == text
