"""The worker's side: how long the prompts of a step are, which the runner knows and tells no attention backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from tmx_compile.integrations.vllm.backend import TriangleBuilder, active
from tmx_compile.integrations.vllm.settings import handed_over
from tmx_compile.integrations.vllm.wrap import wrap

_PROMPTS = "trianglemix_prompts"


def install(device: str) -> None:
    """Wrap what the runners build a step's metadata with. On CUDA there are two runners, of which vLLM picks one."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "_build_attention_metadata", _first_runner)
    wrap(GPUModelRunner, "initialize_kv_cache", _with_report)
    if device != "cuda":
        return
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    wrap(SecondRunner, "prepare_inputs", _remembering)
    wrap(SecondRunner, "initialize_kv_cache", _with_report)
    wrap(DefaultModelState, "prepare_attn", _second_runner)


@contextlib.contextmanager
def told(groups: Iterable[Iterable[Any]], prompts: Any) -> Iterator[None]:
    """Tell the builders of all layers the prompts' lengths, (requests,) integers on the host, while a step is built."""
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
        with told(self.attn_groups, self.input_batch.num_prompt_tokens_cpu_tensor if real else None):
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


def _with_report(plain: Any) -> Any:
    def initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = plain(self, *args, **kwargs)
        # Also where no layer has our backend: then this says so.
        if handed_over(self.vllm_config.additional_config) is not None:
            active(self.vllm_config, self.device)
        return result

    return initialize_kv_cache
