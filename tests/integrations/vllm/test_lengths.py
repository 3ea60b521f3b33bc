"""Which steps may be replayed as decode steps: the runners are stand-ins that say what they were asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tmx_compile.integrations.vllm import lengths
from tmx_compile.integrations.vllm.rows import Step, look
from tmx_compile.mask.geometry import Geometry

ON = SimpleNamespace(limit=64, geometry=Geometry(4, 16, 24), step=None, follow=lambda plan: None)
"""Rows up to position N - 24 of prompts over 64 tokens stream."""


def config(on: Any = ON) -> Any:
    return SimpleNamespace(compilation_config=SimpleNamespace(trianglemix=on))


@pytest.mark.parametrize(
    ("prompts", "computed", "streams"),
    [
        ([100], [0], True),
        ([100], [75], True),
        # From the first of the last rows on, in decode steps too, every row sees every key.
        ([100], [76], False),
        ([100], [130], False),
        # Up to the limit a prompt stays dense.
        ([64], [0], False),
        ([50, 100, 100], [60, 120, 40], True),
        ([50, 100, 100], [60, 120, 99], False),
    ],
)
def test_a_request_whose_next_row_streams(prompts: list[int], computed: list[int], streams: bool) -> None:
    assert look(7, np.array(prompts), np.array(computed), 64, 24) == Step(7, max(prompts), streams)


class FirstRunner:
    """As much of vLLM's first runner as the hook looks at: a request at row 40, one that decodes, and a free place."""

    def __init__(self, computed: int, on: Any = ON) -> None:
        self.vllm_config = config(on)
        self.input_batch = SimpleNamespace(
            num_prompt_tokens=np.array([100, 100, 100]), num_computed_tokens_cpu=np.array([computed, 110, 0])
        )

    def _determine_batch_execution_and_padding(
        self, num_reqs: int, force_uniform_decode: bool | None = None
    ) -> bool | None:
        return force_uniform_decode


@pytest.mark.parametrize(
    ("computed", "on", "told", "answer"),
    [
        (40, ON, None, False),
        (80, ON, None, None),
        (40, None, None, None),
        # Capturing graphs, or a run with no requests.
        (40, ON, True, True),
    ],
)
def test_the_first_runner_takes_no_streaming_row_for_a_decode_step(
    computed: int, on: Any, told: bool | None, answer: bool | None
) -> None:
    hook = lengths.first_runners_choice(FirstRunner._determine_batch_execution_and_padding)
    assert hook(FirstRunner(computed, on), num_reqs=2, force_uniform_decode=told) is answer


class Manager:
    """Of graphs: says which number of rows it would look for a graph by."""

    def dispatch(self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, num_active_loras: int) -> Any:
        return uniform_token_count


class SecondRunner:
    """As much of vLLM's second runner as the hook looks at; its requests lie in no order."""

    def __init__(self, computed: int, on: Any = ON) -> None:
        self.vllm_config, self.cudagraph_manager = config(on), Manager()
        self.req_states = SimpleNamespace(
            req_id_to_index={"one": 2, "other": 0, "waits": 1},
            prompt_len=SimpleNamespace(np=np.array([100, 100, 100])),
            num_computed_tokens_np=np.array([110, 0, computed]),
        )

    def update_requests(self, scheduler_output: Any) -> str:
        return "updated"


def test_the_second_runner_takes_no_streaming_row_for_a_decode_step() -> None:
    update = lengths.looking_ahead(SecondRunner.update_requests)
    dispatch = lengths.second_runners_choice(Manager.dispatch)
    step = SimpleNamespace(num_scheduled_tokens={"one": 1, "other": 1}, total_num_scheduled_tokens=2)
    for computed, on, answer in ((40, ON, None), (80, ON, 1), (40, None, 1)):
        runner = SecondRunner(computed, on)
        # Before the first step, and in an engine without TriangleMix, nothing is known.
        assert dispatch(runner.cudagraph_manager, 2, 2, 1, num_active_loras=0) == 1
        assert update(runner, step) == "updated"
        assert dispatch(runner.cudagraph_manager, 2, 2, 1, num_active_loras=0) == answer


def test_without_graphs_there_is_nothing_to_tell() -> None:
    runner = SecondRunner(40)
    runner.cudagraph_manager = None
    update = lengths.looking_ahead(SecondRunner.update_requests)
    assert update(runner, SimpleNamespace(num_scheduled_tokens={"one": 1}, total_num_scheduled_tokens=1)) == "updated"


class FirstBuilder(FirstRunner):
    """The same when it builds a step's metadata: says what the builders are told."""

    def _build_attention_metadata(self, **_: Any) -> Any:
        return None if ON.step is None else (ON.step.rows, ON.step.streams, ON.step.prompts.tolist())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, (9, True, [100, 100])),
        ({"num_scheduled_tokens": None}, None),
        ({"ubatch_slices": [1, 2]}, None),
        ({"for_cudagraph_capture": True}, None),
    ],
)
def test_the_first_runners_builders_are_told_of_whole_steps(change: dict[str, Any], told: Any) -> None:
    build = lengths.first_runner(FirstBuilder._build_attention_metadata)
    runner = FirstBuilder(40)
    runner.input_batch.num_reqs = 2
    assert build(runner, **{"num_tokens": 9, "num_scheduled_tokens": {"one": 8, "other": 1}} | change) == told
    assert ON.step is None
    runner.vllm_config = config(None)
    assert build(runner, num_tokens=9, num_scheduled_tokens={}) is None


def test_the_first_runner_looks_at_a_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(lengths, "look", lambda *args: looks.append(1) or look(*args))
    choose = lengths.first_runners_choice(FirstRunner._determine_batch_execution_and_padding)
    build = lengths.first_runner(FirstBuilder._build_attention_metadata)
    runner = FirstBuilder(40)
    runner.input_batch.num_reqs = 2
    assert choose(runner, num_reqs=2) is False
    assert build(runner, num_tokens=9, num_scheduled_tokens={}) == (9, True, [100, 100])
    assert len(looks) == 1
    # What was seen is of that step alone.
    runner.input_batch.num_computed_tokens_cpu[0] = 80
    assert build(runner, num_tokens=2, num_scheduled_tokens={}) == (2, False, [100, 100])
    assert len(looks) == 2


@pytest.mark.parametrize(("computed", "streams"), [(40, True), (80, False)])
def test_the_second_runners_builders_are_told_of_a_step_in_its_order(computed: int, streams: bool) -> None:
    runner = SecondRunner(computed)
    runner.req_states.prompt_len.np[:] = [99, 98, 97]
    scheduled = SimpleNamespace(num_scheduled_tokens={"one": 1, "other": 2}, total_num_scheduled_tokens=3)
    inputs = lengths.remembering(lambda self: SimpleNamespace(idx_mapping_np=np.array([0, 2])))
    attention = lengths.second_runner(lambda self, batch: ON.step)
    # A dummy run has no step.
    assert attention(None, inputs(runner)) is None
    lengths.looking_ahead(SecondRunner.update_requests)(runner, scheduled)
    step = attention(None, inputs(runner))
    assert (step.rows, step.longest, step.streams) == (3, 99, streams)
    assert not streams or step.prompts.tolist() == [99, 97]
    assert ON.step is None
