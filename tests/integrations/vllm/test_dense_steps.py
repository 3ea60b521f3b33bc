"""What a step without streaming rows costs the host, in calls: the engine's step of a short prompt is bound by it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import tmx_compile
from tests.integrations.vllm.test_backend import (
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
from tests.integrations.vllm.test_lengths import SecondRunner
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


def calls_of(run: Any) -> Counter[str]:
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


def second_runners_step(engine: Any, prompt: int) -> Any:
    """A function that runs a step of a whole prompt: as much of vLLM's second runner as the hooks look at."""
    layers = engine.compilation_config.static_forward_context
    builder = Builder(SimpleNamespace(block_size=SIZE), list(layers), engine, CPU)
    runner = SecondRunner(0)
    runner.vllm_config = engine
    runner.req_states.prompt_len.np[:] = prompt
    update = lengths.looking_ahead(SecondRunner.update_requests)
    dispatch = lengths.second_runners_choice(type(runner.cudagraph_manager).dispatch)
    inputs = lengths.remembering(lambda self: SimpleNamespace(idx_mapping_np=np.array([2])))
    attention = lengths.second_runner(lambda self, batch, common: builder.build(0, common))
    sequences = Sequences([prompt], [0])
    starts, ends = torch.tensor([0, prompt], dtype=torch.int32), torch.tensor([prompt], dtype=torch.int32)
    common = Common(starts, starts, ends, 1, prompt, prompt, prompt, sequences.table, torch.arange(prompt))
    q, k, v = sequences.q[0], sequences.k[0], sequences.v[0]
    place = torch.arange(prompt)
    sequences.pages[sequences.table[0, place // SIZE].long(), :, place % SIZE] = torch.cat([k, v], -1)

    def step() -> None:
        update(runner, SimpleNamespace(num_scheduled_tokens={"one": prompt}, total_num_scheduled_tokens=prompt))
        dispatch(runner.cudagraph_manager, 1, prompt, None, num_active_loras=0)
        metadata = attention(None, inputs(runner), common)
        for layer in layers.values():
            layer.impl.forward(layer, q, k, v, sequences.pages, metadata, torch.empty_like(q))

    return step


def test_a_step_without_streaming_rows_costs_a_few_calls_whatever_the_number_of_layers() -> None:
    found = []
    for layers in (2, 9):
        step = second_runners_step(engine_of(layers), prompt=10)
        step()  # the first one behind a step with streaming rows, or behind none, changes the layers' functions
        found.append(calls_of(step))
    assert found[0] == found[1]
    assert "backend.forward" not in found[0]
    assert found[0]["backend.build"] == found[0]["rows.look"] == 1
    assert found[0].total() <= 16
    # It counts what there is to count.
    assert calls_of(second_runners_step(engine_of(9), prompt=30))["backend.forward"] == 9


def test_layers_have_the_platforms_own_function_until_rows_stream() -> None:
    engine = engine_of(2)
    layers = engine.compilation_config.static_forward_context
    builder = Builder(SimpleNamespace(block_size=SIZE), list(layers), engine, CPU)
    found = []
    for streams in (True, False, False, True):
        lengths.told(builder.active, Step(1, 1, streams), lambda: None)
        found.append([layer.impl.forward.__func__ is PlatformImpl.forward for layer in layers.values()])
    assert found == [[False, False], [True, True], [True, True], [False, False]]
