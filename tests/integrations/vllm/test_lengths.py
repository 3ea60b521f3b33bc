"""Which steps may be replayed as decode steps: the runners are stand-ins that say what they were asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tmx_compile.integrations.vllm import lengths
from tmx_compile.mask.geometry import Geometry

ON = SimpleNamespace(limit=64, geometry=Geometry(4, 16, 24))
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
    assert lengths.some_streams(ON, np.array(prompts), np.array(computed)) is streams
    assert not lengths.some_streams(None, np.array(prompts), np.array(computed))


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
    step = SimpleNamespace(num_scheduled_tokens={"one": 1, "other": 1})
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
    assert update(runner, SimpleNamespace(num_scheduled_tokens={"one": 1})) == "updated"
