"""The worker's side: how long the prompts of a step are, which the runner knows and tells no attention backend.

And which steps may be replayed as a CUDA graph of decode steps. Runners take any step for one whose requests have one
row each, which a chunk of one row is too; its row would attend to every key, whatever this step's plan says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from tmx_compile.integrations.vllm.backend import Active, TriangleBuilder, active, known
from tmx_compile.integrations.vllm.rows import any_streams
from tmx_compile.integrations.vllm.settings import handed_over
from tmx_compile.integrations.vllm.wrap import wrap

_PROMPTS, _STREAMS = "trianglemix_prompts", "trianglemix_streams"


def install(device: str) -> None:
    """Wrap what the runners build a step's metadata with. On CUDA there are two runners, of which vLLM picks one."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_build_attention_metadata", _first_runner)
    wrap(GPUModelRunner, "initialize_kv_cache", _with_report)
    if device != "cuda":
        return
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    wrap(GPUModelRunner, "_determine_batch_execution_and_padding", first_runners_choice)
    wrap(SecondRunner, "update_requests", looking_ahead)
    wrap(CudaGraphManager, "dispatch", second_runners_choice)
    wrap(SecondRunner, "prepare_inputs", _remembering)
    wrap(SecondRunner, "initialize_kv_cache", _with_report)
    wrap(DefaultModelState, "prepare_attn", _second_runner)


@contextlib.contextmanager
def told(groups: Iterable[Iterable[Any]], prompts: Any) -> Iterator[None]:
    """Tell the builders of all layers the prompts' lengths, a (requests,) array on the host, while a step is built."""
    builders = [
        builder
        for several in groups
        for group in several
        for builder in group.metadata_builders
        if isinstance(builder, TriangleBuilder)
    ]
    for builder in builders:
        builder.prompts = prompts
    try:
        yield
    finally:
        for builder in builders:
            builder.prompts = None


def _first_runner(plain: Any) -> Any:
    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A step of the scheduler, whole: no profiling, no capture, no micro-batches.
        real = kwargs.get("num_scheduled_tokens") is not None and kwargs.get("ubatch_slices") is None
        real = real and not kwargs.get("for_cudagraph_capture")
        batch = self.input_batch
        with told(self.attn_groups, batch.num_prompt_tokens[: batch.num_reqs] if real else None):
            return plain(self, *args, **kwargs)

    return _build_attention_metadata


def _remembering(plain: Any) -> Any:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = plain(self, *args, **kwargs)
        # Of the prompt alone: after preemption, prefill_len counts generated tokens too.
        setattr(batch, _PROMPTS, self.req_states.prompt_len.np[batch.idx_mapping_np])
        return batch

    return prepare_inputs


def _second_runner(plain: Any) -> Any:
    def prepare_attn(
        self: Any, batch: Any, mode: Any, tables: Any, slots: Any, groups: Any, *args: Any, **kwargs: Any
    ) -> Any:
        with told(groups, getattr(batch, _PROMPTS, None)):
            return plain(self, batch, mode, tables, slots, groups, *args, **kwargs)

    return prepare_attn


def some_streams(on: Active | None, prompts: Any, computed: Any) -> bool:
    """Whether the next row of some request streams; ``on`` None: nothing is on. Else as :func:`any_streams`."""
    return on is not None and any_streams(prompts, computed, on.limit, on.geometry.last)


def first_runners_choice(plain: Any) -> Any:
    """Of how a step is run, in the first runner: a step with streaming rows is no decode step."""

    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Where it is told, this is no step of the scheduler.
        if kwargs.get("force_uniform_decode") is None:
            batch, requests = self.input_batch, slice(kwargs["num_reqs"])
            prompts, computed = batch.num_prompt_tokens[requests], batch.num_computed_tokens_cpu[requests]
            if some_streams(known(self.vllm_config), prompts, computed):
                kwargs["force_uniform_decode"] = False
        return plain(self, *args, **kwargs)

    return _determine_batch_execution_and_padding


def looking_ahead(plain: Any) -> Any:
    """In the second runner, before it picks a graph: note whether the step has streaming rows."""

    def update_requests(self: Any, scheduler_output: Any) -> Any:
        result = plain(self, scheduler_output)
        states, on = self.req_states, known(self.vllm_config)
        if on is not None and self.cudagraph_manager is not None:
            at = [states.req_id_to_index[name] for name in scheduler_output.num_scheduled_tokens]
            streams = some_streams(on, states.prompt_len.np[at], states.num_computed_tokens_np[at])
            setattr(self.cudagraph_manager, _STREAMS, streams)
        return result

    return update_requests


def second_runners_choice(plain: Any) -> Any:
    """Of a graph, in the second runner: a step with streaming rows is no decode step."""

    def dispatch(
        self: Any, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        count = None if getattr(self, _STREAMS, False) else uniform_token_count
        return plain(self, num_reqs, num_tokens, count, *args, **kwargs)

    return dispatch


def _with_report(plain: Any) -> Any:
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        # Also where no layer has our backend: then this says so.
        if handed_over(self.vllm_config.additional_config) is not None:
            active(self.vllm_config, self.device)
        return result

    return initialize_kv_cache
