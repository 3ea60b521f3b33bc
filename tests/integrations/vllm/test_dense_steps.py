"""What a step without streaming rows costs the host, in calls: the engine's step of a short prompt is bound by it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import tmx_compile
from tests.support.paged_platform import (
    CONFIG,
    CPU,
    SIZE,
    Attention,
    Builder,
    Common,
    Impl,
    PlatformImpl,
    Sequences,
    configured,
)
from tmx_compile.integrations.vllm import lengths
from tmx_compile.integrations.vllm.rows import Step
from tmx_compile.integrations.vllm.settings import KEY, Settings

PACKAGE = str(Path(tmx_compile.__file__).parent)


def engine_of(layers: int) -> Any:
    """The configuration of an engine all of whose layers are triangle layers."""
    engine = configured(CONFIG, None)
    config = CONFIG.replace(triangle_layer_indices=range(layers))
    engine.additional_config = {KEY: Settings(config, layers, "operator").to_dict()}
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(layers)]
    engine.compilation_config.static_forward_context = {
        name: Attention(impl=Impl(), sliding_window=None, layer_name=name) for name in names
    }
    return engine


def calls_of(run: Callable[[], None]) -> Counter[str]:
    """The functions of this package that ``run`` calls, by file and name."""
    found: Counter[str] = Counter()

    def seen(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


class Runner:
    """As much of vLLM's second runner as the hooks look at, and of its graphs and its model's state."""

    def __init__(self, engine: Any, prompt: int) -> None:
        self.vllm_config, self.cudagraph_manager = engine, SimpleNamespace()
        self.req_states = SimpleNamespace(
            req_id_to_index={"one": 0},
            prompt_len=SimpleNamespace(np=np.array([prompt])),
            num_computed_tokens_np=np.array([0]),
        )


def step_of(engine: Any, prompt: int) -> Callable[[], None]:
    """A function that runs a step of a whole prompt."""
    layers = engine.compilation_config.static_forward_context
    builder = Builder(SimpleNamespace(block_size=SIZE), list(layers), engine, CPU)
    runner = Runner(engine, prompt)
    update = lengths.looking_ahead(lambda self, scheduled: None)
    dispatch = lengths.second_runners_choice(lambda self, *sizes: None)
    inputs = lengths.remembering(lambda self: SimpleNamespace(idx_mapping_np=np.array([0])))
    attention = lengths.second_runner(lambda self, batch, common: builder.build(0, common))
    scheduled = SimpleNamespace(num_scheduled_tokens={"one": prompt}, total_num_scheduled_tokens=prompt)
    sequences = Sequences([prompt], [0])
    starts, ends = torch.tensor([0, prompt], dtype=torch.int32), torch.tensor([prompt], dtype=torch.int32)
    common = Common(starts, starts, ends, 1, prompt, prompt, prompt, sequences.table, torch.arange(prompt))
    q, k, v = sequences.q[0], sequences.k[0], sequences.v[0]
    place = torch.arange(prompt)
    sequences.pages[sequences.table[0, place // SIZE].long(), :, place % SIZE] = torch.cat([k, v], -1)

    def step() -> None:
        update(runner, scheduled)
        dispatch(runner.cudagraph_manager, 1, prompt, None)
        metadata = attention(None, inputs(runner), common)
        for layer in layers.values():
            layer.impl.forward(layer, q, k, v, sequences.pages, metadata, torch.empty_like(q))

    return step


def test_a_step_without_streaming_rows_costs_a_few_calls_whatever_the_number_of_layers() -> None:
    found = []
    for layers in (2, 9):
        step = step_of(engine_of(layers), prompt=10)
        step()  # the first one behind a step with streaming rows, or behind none, changes the layers' functions
        found.append(calls_of(step))
    assert found[0] == found[1]
    assert "backend.forward" not in found[0]
    assert found[0]["backend.build"] == found[0]["rows.look"] == 1
    assert found[0].total() <= 16
    # It counts what there is to count.
    assert calls_of(step_of(engine_of(9), prompt=30))["backend.forward"] == 9


def test_layers_have_the_platforms_own_function_until_rows_stream() -> None:
    engine = engine_of(2)
    layers = engine.compilation_config.static_forward_context
    builder = Builder(SimpleNamespace(block_size=SIZE), list(layers), engine, CPU)
    found = []
    for streams in (True, False, False, True):
        lengths.told(builder.active, Step(1, 1, streams), lambda: None)
        found.append([layer.impl.forward.__func__ is PlatformImpl.forward for layer in layers.values()])
    assert found == [[False, False], [True, True], [True, True], [False, False]]
