"""What the plugin touches in vLLM beyond its public interface, by version; and the check that it is what it was.

vLLM tells no attention backend how long a prompt is, lets none cap a prefix-cache hit, and moves these parts between
releases. So every function that is wrapped, derived from or relied on is listed here with its parameters. A version
that is not listed, or a function that has changed, stops the start: wrong numbers would be the alternative.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from tmx_compile.errors import UnsupportedEngineError

SUPPORTED = {"cpu": ("0.26", "0.32"), "cuda": ("0.26",)}
"""Releases of vLLM by the type of device, as major.minor."""

_FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
_IMPL = (
    "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
    "kv_sharing_target_layer_name sinks"
)
_BUILDER = "self kv_cache_spec layer_names vllm_config device"
_BUILD = "self common_prefix_len common_attn_metadata fast_build"
_METADATA = (
    "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len max_seq_len "
    "block_table_tensor slot_mapping causal logits_indices_padded num_logits_indices encoder_seq_lens "
    "encoder_seq_lens_cpu dcp_local_seq_lens positions is_prefilling seq_lens_cpu_upper_bound mm_req_doc_ranges "
    "rswa_prefix_lens _num_computed_tokens_cache _token_to_req_indices_cache"
)
_V1_STEP = (
    "self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices logits_indices "
    "use_spec_decode for_cudagraph_capture num_scheduled_tokens slot_mappings"
)
_V1_CHOICE = (
    "self num_tokens num_reqs num_scheduled_tokens_np max_num_scheduled_tokens use_cascade_attn allow_microbatching "
    "force_eager force_uniform_decode force_has_lora force_num_active_loras num_encoder_reqs"
)
_V2_STEP = "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config for_capture"


@dataclass(frozen=True)
class Hook:
    """One function or class of vLLM.

    Attributes:
        module: where it is.
        name: its qualified name there.
        parameters: names that it has in every supported version; of a data class: its fields.
        extra: by version, names beside those.
        devices: types of device on which it is used.
    """

    module: str
    name: str
    parameters: str
    extra: tuple[tuple[str, str], ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    def names(self, version: str) -> set[str]:
        """The names of the parameters in a version (major.minor)."""
        return {*self.parameters.split(), *dict(self.extra).get(version, "").split()}

    def found(self) -> set[str]:
        """The names of the parameters in the vLLM that is installed; ``ImportError`` or ``AttributeError``: gone."""
        value = importlib.import_module(self.module)
        for part in self.name.split("."):
            value = getattr(value, part)
        if dataclasses.is_dataclass(value):
            return {field.name for field in dataclasses.fields(value)}
        return set(inspect.signature(value).parameters)  # type: ignore[arg-type]


_CORE, _WORKER, _ATTENTION = "vllm.v1.core", "vllm.v1.worker", "vllm.v1.attention"
HOOKS = (
    Hook("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "self usage_context headless"),
    Hook(f"{_ATTENTION}.backends.registry", "register_backend", "backend class_path is_mamba"),
    Hook("vllm.v1.engine.core", "EngineCore.preprocess_add_request", "self request"),
    Hook(
        f"{_CORE}.sched.scheduler",
        "Scheduler.__init__",
        "self vllm_config kv_cache_config structured_output_manager block_size hash_block_size mm_registry "
        "include_finished_set log_stats",
    ),
    Hook(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        "self vllm_config engine_idxs custom_stat_loggers enable_default_loggers aggregate_engine_logging client_count",
    ),
    Hook(
        "vllm.v1.metrics.stats",
        "FinishedRequestStats",
        "finish_reason request_id e2e_latency num_prompt_tokens num_generation_tokens max_tokens_param queued_time "
        "prefill_time inference_time decode_time mean_time_per_output_token is_corrupted num_cached_tokens",
        (("0.32", "num_preemptions"),),
    ),
    Hook(f"{_CORE}.kv_cache_manager", "KVCacheManager.get_computed_blocks", "self request"),
    Hook(
        f"{_CORE}.kv_cache_coordinator",
        "KVCacheCoordinator.find_longest_cache_hit",
        "self block_hashes max_cache_hit_length",
    ),
    Hook(
        f"{_ATTENTION}.backend",
        "CommonAttentionMetadata",
        _METADATA,
        (
            ("0.26", "dcp_local_seq_lens_cpu _seq_lens_cpu _num_computed_tokens_cpu"),
            ("0.32", "max_logits_per_req dcp_local_seq_lens_cpu_upper_bound req_idx replayssm_decode_base_cpu"),
        ),
    ),
    Hook(
        f"{_WORKER}.gpu_model_runner",
        "GPUModelRunner._build_attention_metadata",
        _V1_STEP,
        (("0.26", "cascade_attn_prefix_lens"), ("0.32", "max_num_sampled_tokens")),
    ),
    Hook(
        f"{_WORKER}.gpu_model_runner",
        "GPUModelRunner._determine_batch_execution_and_padding",
        _V1_CHOICE,
        devices=("cuda",),
    ),
    Hook(
        f"{_WORKER}.gpu_model_runner",
        "GPUModelRunner.initialize_kv_cache",
        "self kv_cache_config is_profiling",
        (("0.32", "kv_cache_allocation_context"),),
    ),
    Hook(f"{_ATTENTION}.backends.cpu_attn", "CPUAttentionBackendImpl.__init__", _IMPL, devices=("cpu",)),
    Hook(f"{_ATTENTION}.backends.cpu_attn", "CPUAttentionBackendImpl.forward", _FORWARD, devices=("cpu",)),
    Hook(f"{_ATTENTION}.backends.cpu_attn", "CPUAttentionMetadataBuilder.__init__", _BUILDER, devices=("cpu",)),
    Hook(f"{_ATTENTION}.backends.cpu_attn", "CPUAttentionMetadataBuilder.build", _BUILD, devices=("cpu",)),
    Hook(
        "vllm._custom_ops",
        "cpu_attn_reshape_and_cache",
        "key value key_cache value_cache slot_mapping isa k_scale v_scale kv_cache_dtype",
        devices=("cpu",),
    ),
    Hook(
        "vllm._custom_ops",
        "cpu_attn_get_scheduler_metadata",
        "num_reqs num_heads num_kv_heads head_dim seq_lens dtype query_start_loc causal sliding_window_size isa "
        "enable_kv_split dynamic_causal",
        (("0.32", "kv_cache_dtype"),),
        devices=("cpu",),
    ),
    Hook(
        "vllm._custom_ops",
        "cpu_attention_with_kv_cache",
        "query key_cache value_cache output query_start_loc seq_lens scale causal alibi_slopes sliding_window "
        "block_table softcap scheduler_metadata s_aux dynamic_causal k_scale v_scale kv_cache_dtype",
        devices=("cpu",),
    ),
    Hook(f"{_ATTENTION}.backends.flash_attn", "FlashAttentionImpl.__init__", _IMPL, devices=("cuda",)),
    Hook(f"{_ATTENTION}.backends.flash_attn", "FlashAttentionImpl.forward", _FORWARD, devices=("cuda",)),
    Hook(f"{_ATTENTION}.backends.flash_attn", "FlashAttentionMetadataBuilder.__init__", _BUILDER, devices=("cuda",)),
    Hook(f"{_ATTENTION}.backends.flash_attn", "FlashAttentionMetadataBuilder.build", _BUILD, devices=("cuda",)),
    Hook(f"{_WORKER}.gpu.model_runner", "GPUModelRunner.update_requests", "self scheduler_output", devices=("cuda",)),
    Hook(
        f"{_WORKER}.gpu.cudagraph_utils",
        "CudaGraphManager.dispatch",
        "self num_reqs num_tokens uniform_token_count num_active_loras",
        devices=("cuda",),
    ),
    Hook(
        f"{_WORKER}.gpu.model_runner",
        "GPUModelRunner.prepare_inputs",
        "self scheduler_output batch_desc",
        devices=("cuda",),
    ),
    Hook(
        f"{_WORKER}.gpu.model_runner", "GPUModelRunner.initialize_kv_cache", "self kv_cache_config", devices=("cuda",)
    ),
    Hook(f"{_WORKER}.gpu.model_states.default", "DefaultModelState.prepare_attn", _V2_STEP, devices=("cuda",)),
)
"""Everything of vLLM that the plugin wraps, derives from or relies on and that vLLM does not promise."""


def check(version: str, device: str) -> None:
    """Refuse to start on a vLLM that the plugin does not know.

    Args:
        version: of the vLLM that is installed.
        device: the type of its platform's device.

    Raises:
        UnsupportedEngineError: naming the version, or what has changed.
    """
    release = ".".join(version.split(".")[:2])
    known = SUPPORTED.get(device)
    if known is None:
        raise UnsupportedEngineError(
            f"TriangleMix in vLLM runs on {' and '.join(SUPPORTED)}, this platform is {device}"
        )
    if release not in known:
        raise UnsupportedEngineError(
            f"TriangleMix supports vLLM {' and '.join(f'{name}.x' for name in known)} on {device}, this is {version}. "
            "Another version may tell prompts' lengths or keep its cache in another way; remove the trianglemix "
            "settings, or install one of these"
        )
    wrong = list(_changed(release, device))
    if wrong:
        raise UnsupportedEngineError(f"vLLM {version} is not as TriangleMix knows it: {'; '.join(wrong)}")


def _changed(release: str, device: str) -> Iterator[str]:
    for hook in HOOKS:
        if device not in hook.devices:
            continue
        try:
            found = hook.found()
        except (ImportError, AttributeError) as error:
            yield f"{hook.module} has no {hook.name} ({error})"
            continue
        want = hook.names(release)
        if found != want:
            changes = [f"without {name}" for name in sorted(want - found)]
            changes += [f"with {name}" for name in sorted(found - want)]
            yield f"{hook.module}.{hook.name} is {', '.join(changes)}"
