"""What our attention backends have in common: they sit around the platform's own and take its long prompts' rows.

The platform's backend keeps the cache, and computes every row that attends to all keys (last rows, decode steps, short
prompts, other layers) from its pages. Which layer is a triangle layer is decided by name when it runs: vLLM chooses one
backend for all layers of a kind.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from tmx_compile.integrations.vllm import pages
from tmx_compile.integrations.vllm.counts import Counts, why_dense
from tmx_compile.integrations.vllm.gather import Places, Scratch, places, seen
from tmx_compile.integrations.vllm.layers import LayerFacts
from tmx_compile.integrations.vllm.rows import Dense, Split, Step, Streaming, split
from tmx_compile.integrations.vllm.settings import Settings, handed_over
from tmx_compile.lowering.base import AttentionCall, Lowering
from tmx_compile.lowering.blocked import Blocked
from tmx_compile.lowering.chunk import Part
from tmx_compile.lowering.scoring import Scoring
from tmx_compile.lowering.triton.lowering import Triton
from tmx_compile.lowering.triton.op import attend_into
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Reason, Rejected

_PLAN = "trianglemix"


@dataclass
class Active:
    """What is on in one worker process.

    Attributes:
        settings: what the user asked for.
        limit: up to which length prompts stay dense here.
        geometry: of the mask.
        lowering: what computes streaming rows.
        counts: counters and the layers' records.
        sparse: full names of the layers that are triangle layers and can go sparse.
        scratch: memory for gathered keys and values.
        prepared: whether the kernels are compiled and the memory is there.
        step: the step whose metadata are being built; None: none, or no whole step of a scheduler.
        impls: implementations of the sparse layers.
        following: whether these look at a step's plan.
    """

    settings: Settings
    limit: int
    geometry: Geometry
    lowering: str
    counts: Counts
    sparse: frozenset[str] = frozenset()
    scratch: Scratch = field(default_factory=Scratch)
    prepared: bool = False
    step: Step | None = None
    impls: tuple[TriangleImpl, ...] = ()
    following: bool = True

    def follow(self, plan: bool) -> None:
        """Before a step's metadata are built: whether its layers look at a plan, or are the platform's own.

        Most steps have no plan, and a layer that looks for one costs the host a call in each of them.
        """
        if plan is not self.following:
            self.following = plan
            for impl in self.impls:
                impl.leave_alone(not plan)


@dataclass(frozen=True)
class Plan:
    """How the rows of one step are computed in triangle layers.

    Attributes:
        active: what is on.
        streaming: streaming rows, and where the earlier tokens lie that they see.
        rows: the other rows among the step's: a slice or (n,) indices; None: there are none.
        dense: the platform's metadata for these alone.
    """

    active: Active
    streaming: tuple[tuple[Streaming, Places | None], ...]
    rows: Any
    dense: Any


def active(config: Any, device: torch.device) -> Active | None:
    """What is on in this process for an engine's configuration (a ``VllmConfig``); None: TriangleMix is off.

    The first call looks at the model's attention layers and reports on them.

    Raises:
        StrictModeError: in strict mode, a triangle layer that has to stay dense.
    """
    settings = handed_over(config.additional_config)
    if settings is None:
        return None
    # One for the process: draft models get copies of the configuration, but the same layers.
    found = known(config)
    if found is None or found.settings != settings:
        lowering, geometry = settings.lowering, settings.config.geometry
        if lowering == "auto":
            on_cpu = pages.NAME if pages.pays(geometry) else Blocked.name
            lowering = Triton.name if device.type == "cuda" else on_cpu
        found = Active(settings, settings.limit(device.type), geometry, lowering, Counts(settings))
        found.counts.limit = found.limit
        layers = [facts_of(name, layer, config, device, geometry, lowering) for name, layer in attention_layers(config)]
        found.counts.layers(layers, lowering, whole_model=config.parallel_config.pipeline_parallel_size == 1)
        found.sparse = frozenset(site.path for site in found.counts.report.triangle())
        ours = [(name, layer.impl) for name, layer in attention_layers(config) if is_ours(layer.impl)]
        for name, impl in ours:
            impl.leave_alone(name not in found.sparse)
        found.impls = tuple(impl for name, impl in ours if name in found.sparse)
        setattr(config.compilation_config, _PLAN, found)
    return found


def known(config: Any) -> Active | None:
    """What :func:`active` has found for an engine's configuration; None: nothing, or nobody has asked yet."""
    found: Active | None = getattr(config.compilation_config, _PLAN, None)
    return found


def attention_layers(config: Any) -> list[tuple[str, Any]]:
    """(full name, module) of every attention layer that this process holds."""
    layers = config.compilation_config.static_forward_context
    return [(name, layer) for name, layer in layers.items() if hasattr(layer, "impl")]


def facts_of(name: str, layer: Any, config: Any, device: torch.device, geometry: Geometry, lowering: str) -> LayerFacts:
    """What an attention layer asks of its backend."""
    impl: Any = layer.impl
    if not is_ours(impl):
        return LayerFacts(name, lowering=Rejected(Reason.NO_LOWERING, f"its backend is {type(impl).__name__}"))
    window = layer.sliding_window
    parallel = config.parallel_config
    return LayerFacts(
        name,
        kind=type(layer).__name__,
        causal=impl.attn_type == "decoder" and not config.model_config.is_mm_prefix_lm,
        alibi=impl.alibi_slopes is not None,
        softcap=bool(impl.logits_soft_cap),
        learned_sinks=impl.sinks is not None,
        window=None if window is None else window - 1,
        cache_dtype=impl.kv_cache_dtype,
        shared_cache=impl.kv_sharing_target_layer_name,
        split_context=max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1,
        lowering=why_not(impl, config.model_config.dtype, device, geometry, lowering),
    )


def is_ours(impl: object) -> bool:
    """Whether a layer's implementation is one of ours."""
    return isinstance(impl, TriangleImpl)


def why_not(impl: Any, dtype: torch.dtype, device: torch.device, geometry: Geometry, lowering: str) -> Rejected | None:
    """Why the lowering cannot take a layer's tensors; None: it can."""
    if lowering == pages.NAME:
        return None if device.type == "cpu" else Rejected(Reason.NO_LOWERING, f"{pages.NAME} is for CPUs")
    query = torch.empty(1, impl.num_heads, 1, impl.head_size, dtype=dtype, device=device)
    key = torch.empty(1, impl.num_kv_heads, 1, impl.head_size, dtype=dtype, device=device)
    call = AttentionCall(query, key, key, None, dataclasses.replace(geometry, last=0), impl.scale, False)
    lowerings: dict[str, Lowering] = {Triton.name: Triton(), Blocked.name: Blocked()}
    answer = lowerings[lowering].supports(call) if lowering in lowerings else None
    return answer if isinstance(answer, Rejected) else None


class TriangleBuilder:
    """Put before a platform's metadata builder: adds the plan of a step to the platform's metadata."""

    whole_prompts = False
    """Whether a prompt that is whole in a step is computed in one call, its last rows among its streaming rows."""

    # A copy with another block table would keep this table's plan.
    supports_update_block_table = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.block_tokens: int = kv_cache_spec.block_size
        found = active(vllm_config, device)
        self.active = found if found is not None and found.sparse.intersection(layer_names) else None

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The platform's metadata, with a plan where rows of this step stream."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        if self.active is not None:
            plan = self.plan(self.active, common_attn_metadata)
            if plan is not None:
                setattr(metadata, _PLAN, plan)
        return metadata

    def plan(self, on: Active, common: Any) -> Plan | None:
        """How the rows of a step are computed; None: all are dense."""
        step, found = on.step, None
        lengths = self.lengths(common) if step is not None and step.streams else None
        if step is None or (step.streams and lengths is None):
            on.counts.step(None, 0, Reason.LENGTH_UNKNOWN)
            return None
        if lengths is not None:
            if common.causal is not True or common.mm_req_doc_ranges:
                on.counts.step(None, step.rows, Reason.NOT_CAUSAL)
                return None
            prompts = step.prompts.tolist()
            # A graph's step may have places for more requests than there are.
            starts = common.query_start_loc_cpu.tolist()[: len(prompts) + 1]
            found = split(starts, lengths.tolist(), prompts, on.geometry, on.limit, whole_prompts=self.whole_prompts)
        on.counts.step(found, step.rows, why_dense(step.longest, on.settings.config.min_seq_len, on.limit))
        if found is None:
            return None
        tables = common.block_table_tensor
        streaming = tuple(
            (part, places(part, tables[part.request], self.block_tokens, on.geometry)) for part in found.streaming
        )
        if not found.dense:
            return Plan(on, streaming, None, None)
        part, rows_of_it = of_dense_rows(common, found)
        return Plan(on, streaming, rows_of_it, self.build_dense(part))

    def lengths(self, common: Any) -> Tensor | None:
        """(requests,) on the host: each one's tokens in the cache after the step, without waiting for a device.

        None: it is not told.
        """
        raise NotImplementedError

    def build_dense(self, common: Any) -> Any:
        """The platform's metadata for the dense rows alone."""
        return super().build(0, common)  # type: ignore[misc]


class TriangleImpl:
    """Put before a platform's implementation: computes streaming rows, and lets the platform's do the others."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step: query (rows, H, D), key and value (rows, Hkv, D), into output (rows, H, D)."""
        plan: Plan | None = getattr(attn_metadata, _PLAN, None)
        if attn_metadata is None:
            self.profiled(layer, query, key, value)
        if plan is None or layer.layer_name not in plan.active.sparse or output_scale is not None:
            return super().forward(  # type: ignore[misc,no-any-return]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        on = plan.active
        for part, earlier in plan.streaming:
            rows = slice(part.row, part.row + part.rows)
            keys, values = key[rows], value[rows]
            if earlier is not None:
                keys, values = self.together(layer, kv_cache, earlier, keys, values, on.scratch)
            self.stream(on, query[rows], keys, values, part.last, output[rows])
        if plan.rows is not None:
            # A view of the output where the rows are a slice, else memory of its own.
            out = output[plan.rows]
            super().forward(layer, query[plan.rows], None, None, kv_cache, plan.dense, out)  # type: ignore[misc]
            if not isinstance(plan.rows, slice):
                output[plan.rows] = out
        return output

    def leave_alone(self, always: bool) -> None:
        """Whether the platform's implementation computes every step, without a look at it; else one without a plan."""
        ours = MethodType(type(self).forward, self)
        # Set, not deleted: so the objects of all layers stay alike, which Python's own caches like.
        self.forward = super().forward if always else ours  # type: ignore[misc,method-assign]

    def profiled(self, layer: Any, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Called in the engine's profiling run, which has no metadata, with a layer's largest step."""

    def stream(self, on: Active, query: Tensor, key: Tensor, value: Tensor, last: int, out: Tensor) -> None:
        """Streaming rows (rows, H, D) over keys and values (n, Hkv, D) that end at the last row, into ``out``.

        Args:
            on: what is on.
            query, key, value: views of any rows; on a GPU nothing of them is copied.
            last: how many rows at the end attend to all keys.
            out: (rows, H, D), a view of the step's output.
        """
        scale: float = self.scale  # type: ignore[attr-defined]
        q, k, v, result = (x.transpose(0, 1)[None] for x in (query, key, value, out))
        if on.lowering == Triton.name:
            attend_into(q, k, v, dataclasses.replace(on.geometry, last=last), scale, result)
        else:
            result.copy_(Part(on.geometry, Scoring(scale), on.lowering).attend(q, k, v, None, last))

    def prepare(self, on: Active, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Compile the kernels and take the memory of any later step, once in a process; results are thrown away.

        Here, in the engine's own run before it measures what is left for its cache, no prompt waits for it, and the
        memory is counted.

        Args:
            on: what is on.
            query, key, value: (rows, H, D), (rows, Hkv, D) as layers get them, of the largest step.
        """
        if on.prepared:
            return
        on.prepared = True
        rows, earlier, last = query.shape[0], on.geometry.sink + on.geometry.window, on.geometry.last
        keys, values = on.scratch.take(rows + earlier, key)
        # Kernels differ by the number of rows, and by whether last rows, of which there may be none, are many of them.
        steps = (1, 4 * last + 1, *self.kernel_steps(query), rows)
        for count in {min(rows, count) for count in steps}:
            q = query[:count]
            for part in {0, min(last, count)}:
                self.stream(on, q, key[:count], value[:count], part, torch.empty_like(q))
            self.stream(on, q, keys[: count + earlier], values[: count + earlier], 0, torch.empty_like(q))

    def kernel_steps(self, query: Tensor) -> tuple[int, ...]:
        """Numbers of rows (of ``query`` (rows, H, D)) from which on other kernels run than with fewer."""
        return ()

    def together(
        self, layer: Any, kv_cache: Tensor, earlier: Places, key: Tensor, value: Tensor, scratch: Scratch
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (n, Hkv, D): of earlier tokens from the cache, then a chunk's own (rows, Hkv, D)."""

        def read(blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
            return self.tokens(layer, kv_cache, blocks, slots)

        return seen(read, earlier, key, value, scratch)

    def tokens(self, layer: Any, kv_cache: Tensor, blocks: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, Hkv, D) of cached tokens: their blocks (n,), and their slots (n,) in these."""
        raise NotImplementedError


def of_dense_rows(common: Any, found: Split) -> tuple[Any, Any]:
    """A step's common metadata of its dense rows alone, and which rows these are: a slice, or (n,) indices."""
    parts, device = found.dense, common.query_start_loc.device
    counts = [part.rows for part in parts]
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    requests = torch.tensor([part.request for part in parts])
    rows = _rows(parts, device)
    upper = common.seq_lens_cpu_upper_bound
    on_device = _sent(requests, device)
    changes = dict(
        query_start_loc=_sent(starts, device),
        query_start_loc_cpu=starts,
        seq_lens=common.seq_lens[on_device],
        num_reqs=len(parts),
        num_actual_tokens=sum(counts),
        max_query_len=max(counts),
        block_table_tensor=common.block_table_tensor[on_device],
        slot_mapping=common.slot_mapping[rows],
        seq_lens_cpu_upper_bound=None if upper is None else upper[requests],
        # What depends on all rows of the step, and is asked for by no builder that is derived from here.
        **dict.fromkeys(
            ("_num_computed_tokens_cache", "_token_to_req_indices_cache", "positions", "is_prefilling", "req_idx",
             "_seq_lens_cpu", "_num_computed_tokens_cpu", "logits_indices_padded", "num_logits_indices")
        ),
    )  # fmt: skip
    fields = {each.name for each in dataclasses.fields(common)}
    return common.replace(**{name: value for name, value in changes.items() if name in fields}), rows


def _rows(parts: tuple[Dense, ...], device: torch.device) -> Any:
    if len(parts) == 1:
        return slice(parts[0].row, parts[0].row + parts[0].rows)
    rows = torch.cat([torch.arange(part.row, part.row + part.rows) for part in parts])
    return _sent(rows, device)


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
