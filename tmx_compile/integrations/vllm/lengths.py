"""The worker's side: how long the prompts of a step are, which the runner knows and tells no attention backend.

And which steps may be replayed as a CUDA graph of decode steps. Runners take any step for one whose requests have one
row each, which a chunk of one row is too; its row would attend to every key, whatever this step's plan says.
"""

from __future__ import annotations

from typing import Any

from tmx_compile.integrations.vllm.backend import Active, active, known
from tmx_compile.integrations.vllm.rows import Step, look
from tmx_compile.integrations.vllm.settings import handed_over
from tmx_compile.integrations.vllm.wrap import wrap

_STEP, _STREAMS = "trianglemix_step", "trianglemix_streams"


def install(device: str) -> None:
    """Wrap what the runners build a step's metadata with. On CUDA there are two runners, of which vLLM picks one."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_build_attention_metadata", first_runner)
    wrap(GPUModelRunner, "initialize_kv_cache", _with_report)
    if device != "cuda":
        return
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    wrap(GPUModelRunner, "_determine_batch_execution_and_padding", first_runners_choice)
    wrap(SecondRunner, "update_requests", looking_ahead)
    wrap(CudaGraphManager, "dispatch", second_runners_choice)
    wrap(SecondRunner, "prepare_inputs", remembering)
    wrap(SecondRunner, "initialize_kv_cache", _with_report)
    wrap(DefaultModelState, "prepare_attn", second_runner)


def told(on: Active, step: Step, build: Any, *args: Any, **kwargs: Any) -> Any:
    """Build a step's metadata, whose builders then know of the step; its layers run before the next step is told."""
    on.follow(step.streams)
    on.step = step
    try:
        return build(*args, **kwargs)
    finally:
        on.step = None


def first_runner(plain: Any) -> Any:
    """Of a step's metadata, in the first runner."""

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        on = known(self.vllm_config)
        # A step of the scheduler, whole: no profiling, no capture, no micro-batches.
        real = kwargs.get("num_scheduled_tokens") is not None and kwargs.get("ubatch_slices") is None
        if on is None or not real or kwargs.get("for_cudagraph_capture"):
            return plain(self, *args, **kwargs)
        step = self.__dict__.pop(_STEP, None)
        if step is None:  # as on a CPU, where nothing is chosen before
            step = first_runners_step(on, self.input_batch, self.input_batch.num_reqs)
        step.rows = kwargs["num_tokens"]
        return told(on, step, plain, self, *args, **kwargs)

    return _build_attention_metadata


def first_runners_step(on: Active, batch: Any, requests: int) -> Step:
    """A step of so many of a batch's requests, and of rows that are not known yet."""
    prompts = batch.num_prompt_tokens[:requests]
    step = look(0, prompts, batch.num_computed_tokens_cpu[:requests], on.limit, on.geometry.last)
    step.prompts = prompts
    return step


def is_no_decode_step(step: Step) -> bool:
    """Whether a step must not be replayed as one of decode steps, whatever its numbers of rows."""
    return step.streams


def first_runners_choice(plain: Any) -> Any:
    """Of how a step is run, in the first runner: a step with streaming rows is no decode step.

    What was seen of the step waits for its metadata.
    """

    def _determine_batch_execution_and_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
        on = known(self.vllm_config)
        # Where it is told, this is no step of the scheduler.
        if on is not None and kwargs.get("force_uniform_decode") is None:
            step = first_runners_step(on, self.input_batch, kwargs["num_reqs"])
            setattr(self, _STEP, step)
            if is_no_decode_step(step):
                kwargs["force_uniform_decode"] = False
        return plain(self, *args, **kwargs)

    return _determine_batch_execution_and_padding


def looking_ahead(plain: Any) -> Any:
    """In the second runner, before it picks a graph: note whether the step has streaming rows."""

    def update_requests(self: Any, scheduler_output: Any) -> Any:
        result = plain(self, scheduler_output)
        on = known(self.vllm_config)
        if on is not None:
            states, scheduled = self.req_states, scheduler_output.num_scheduled_tokens
            at = [states.req_id_to_index[name] for name in scheduled]
            prompts, computed = states.prompt_len.np.take(at), states.num_computed_tokens_np.take(at)
            rows = scheduler_output.total_num_scheduled_tokens
            step = look(rows, prompts, computed, on.limit, on.geometry.last)
            setattr(self, _STEP, step)
            if self.cudagraph_manager is not None:
                setattr(self.cudagraph_manager, _STREAMS, is_no_decode_step(step))
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


def remembering(plain: Any) -> Any:
    """In the second runner, of a step's inputs: the step goes with them, and in their order."""

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = plain(self, *args, **kwargs)
        on, step = known(self.vllm_config), getattr(self, _STEP, None)
        if on is not None and step is not None:
            if step.streams:
                # Of the prompt alone: after preemption, prefill_len counts generated tokens too.
                step.prompts = self.req_states.prompt_len.np[batch.idx_mapping_np]
            setattr(batch, _STEP, (on, step))
        return batch

    return prepare_inputs


def second_runner(plain: Any) -> Any:
    """Of a step's metadata, in the second runner."""

    def prepare_attn(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(batch, _STEP, None)
        if found is None:
            return plain(self, batch, *args, **kwargs)
        return told(*found, plain, self, batch, *args, **kwargs)

    return prepare_attn


def _with_report(plain: Any) -> Any:
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        # Also where no layer has our backend: then this says so.
        if handed_over(self.vllm_config.additional_config) is not None:
            active(self.vllm_config, self.device)
        return result

    return initialize_kv_cache
