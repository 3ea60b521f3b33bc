"""The backend's common part around a platform made for this: any schedule of any prompts against the oracle.

The platform keeps pages and computes dense rows from them, as vLLM's do; the schedules are drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import oracle
from tmx_compile import StrictModeError, TriangleMixConfig
from tmx_compile.integrations.vllm import backend, lengths
from tmx_compile.integrations.vllm.backend import TriangleBuilder, TriangleImpl, active, of_dense_rows, why_not
from tmx_compile.integrations.vllm.gather import from_packed
from tmx_compile.integrations.vllm.rows import Dense, Split, look
from tmx_compile.integrations.vllm.settings import KEY, Settings
from tmx_compile.report import Reason

SIZE, HEADS, KV_HEADS, DIM, SCALE = 4, 4, 2, 8, 0.3
NAME = "model.layers.1.self_attn.attn"


@dataclass
class Common:
    """What the common metadata of vLLM has, as far as it is used here."""

    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    causal: Any = True
    mm_req_doc_ranges: Any = None
    seq_lens_cpu_upper_bound: Any = None
    is_prefilling: Any = None

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


class PlatformBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        pass

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace(common=common_attn_metadata)


class PlatformImpl:
    """Dense attention of a step's rows, from pages (blocks, Hkv, SIZE, 2 D), as FlashAttention's are in vLLM."""

    alibi_slopes = sinks = kv_sharing_target_layer_name = None
    logits_soft_cap, attn_type, kv_cache_dtype = 0, "decoder", "auto"
    num_heads, num_kv_heads, head_size, scale = HEADS, KV_HEADS, DIM, SCALE

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        common = attn_metadata.common
        starts = common.query_start_loc_cpu.tolist()
        assert starts[-1] == query.shape[0] == common.num_actual_tokens
        assert common.max_query_len == max(end - start for start, end in itertools.pairwise(starts))
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            length = int(common.seq_lens[request])
            place = torch.arange(length)
            block = common.block_table_tensor[request, place // SIZE].long()
            k, v = (x.transpose(0, 1)[None] for x in kv_cache[block, :, place % SIZE].split(DIM, -1))
            out, _ = oracle(query[start:end].transpose(0, 1)[None], k, v, None, 0, 0, 2**31 - 1, SCALE)
            output[start:end] = out[0].transpose(0, 1)
        return output


class Attention(SimpleNamespace):
    """A layer, by the name of vLLM's class."""


class ChunkedLocalAttention(Attention):
    """One that hands its builder requests cut into chunks."""


class Builder(TriangleBuilder, PlatformBuilder):
    def lengths(self, common):
        return common.seq_lens


class Impl(TriangleImpl, PlatformImpl):
    def tokens(self, layer, kv_cache, blocks, slots):
        return from_packed(kv_cache, KV_HEADS, DIM, blocks, slots)


def configured(config: TriangleMixConfig, impl: Any, lowering: str = "operator", **changes: Any) -> Any:
    """The configuration of an engine whose model has one layer more than is looked at."""
    asked = Settings(config, 2, lowering, **changes)
    layers = {
        name: Attention(impl=impl, sliding_window=None, layer_name=name)
        for name in ("model.layers.0.self_attn.attn", NAME)
    }
    return SimpleNamespace(
        additional_config={KEY: asked.to_dict()},
        compilation_config=SimpleNamespace(static_forward_context=layers | {"model.rotary": object()}),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model_config=SimpleNamespace(is_mm_prefix_lm=False, dtype=torch.float32),
    )


CPU = torch.device("cpu")
CONFIG = TriangleMixConfig(2, 5, 6, triangle_layer_indices=[1], min_seq_len=10)


def told(builder, prompts, common, build, *args):
    """What ``build`` returns when a runner has told of the step."""
    on, prompts = builder.active, np.array(prompts)
    rows = common.query_start_loc_cpu.numpy()
    computed = common.seq_lens.numpy()[: len(prompts)] - (rows[1:] - rows[:-1])[: len(prompts)]
    step = look(int(rows[-1]), prompts, computed, on.limit, on.geometry.last)
    step.prompts = prompts
    return lengths.told(on, step, build, *args)


def planned(builder, prompts, common):
    return told(builder, prompts, common, builder.plan, builder.active, common)


class Sequences:
    """Some requests with their keys and values, in one paged cache."""

    def __init__(self, prompts, answers, dtype=torch.float64):
        self.prompts, self.tokens = prompts, [p + a for p, a in zip(prompts, answers, strict=True)]
        # One projection makes all three, so each is a view of every token's row.
        split = [HEADS, KV_HEADS, KV_HEADS]
        all_three = [torch.randn(n, sum(split), DIM, dtype=dtype).split(split, 1) for n in self.tokens]
        self.q, self.k, self.v = zip(*all_three, strict=True)
        most = max(-(-n // SIZE) for n in self.tokens)
        blocks = torch.randperm(most * len(prompts)).to(torch.int32)
        self.table = blocks.view(len(prompts), most)
        self.pages = torch.full((most * len(prompts), KV_HEADS, SIZE, 2 * DIM), float("nan"), dtype=dtype)

    def step(self, builder, impl, layer, chosen):
        """Run one step of [(request, first token, rows)]: [(request, first token, out)]."""
        for request, first, rows in chosen:
            place = torch.arange(first, first + rows)
            block = self.table[request, place // SIZE].long()
            self.pages[block, :, place % SIZE] = torch.cat([self.k[request][place], self.v[request][place]], -1)
        starts = torch.tensor([0] + [rows for _, _, rows in chosen]).cumsum(0).to(torch.int32)
        requests = [request for request, _, _ in chosen]
        lengths = torch.tensor([first + rows for _, first, rows in chosen], dtype=torch.int32)
        common = Common(
            starts, starts, lengths, len(chosen), int(starts[-1]), max(rows for _, _, rows in chosen),
            int(lengths.max()), self.table[requests], torch.arange(int(starts[-1])),
        )  # fmt: skip
        prompts = [self.prompts[request] for request in requests]
        metadata = told(builder, prompts, common, builder.build, 0, common)
        taken = [slice(first, first + rows) for _, first, rows in chosen]
        parts = [
            torch.cat([x[request][rows] for x in (self.q, self.k, self.v)], 1)
            for request, rows in zip(requests, taken, strict=True)
        ]
        q, k, v = torch.cat(parts).split([HEADS, KV_HEADS, KV_HEADS], 1)
        out = q.new_full(q.shape, float("nan"))
        impl.forward(layer, q, k, v, self.pages, metadata, out)
        parts = out.split([rows for _, _, rows in chosen])
        return [(request, first, part) for (request, first, _), part in zip(chosen, parts, strict=True)]

    def want(self, request, config):
        """The rows of the prompt under its mask, and every later row over all keys: (tokens, H, D)."""
        prompt, q, k, v = self.prompts[request], self.q[request], self.k[request], self.v[request]
        last = config.num_last_tokens if prompt > config.min_seq_len else 2**31 - 1
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        rows = [x[:, :, :prompt] for x in heads_first]
        within, _ = oracle(*rows, None, *config.geometry.counts[:2], last, SCALE)
        behind, _ = oracle(*heads_first, None, 0, 0, 2**31 - 1, SCALE)
        return torch.cat([within[0], behind[0, :, prompt:]], 1).transpose(0, 1)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_schedule_gives_the_oracles_rows(data):
    serve(data, "operator", torch.float64, 1e-10)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_any_schedule_gives_the_oracles_rows_with_the_gpus_kernels(data):
    """In Triton's interpreter: they write into the step's output themselves."""
    serve(data, "triton", torch.float32, 1e-5)


def serve(data, lowering, dtype, atol):
    """Run drawn prompts in drawn steps, and compare every row."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    config = TriangleMixConfig(
        *(data.draw(st.integers(0, most)) for most in (6, 12, 12)), triangle_layer_indices=[1], min_seq_len=10
    )
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    sequences = Sequences(prompts, [data.draw(st.integers(0, 4)) for _ in prompts], dtype)
    impl = Impl()
    engine = configured(config, impl, lowering)
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], engine, CPU)
    builder.whole_prompts = data.draw(st.booleans())
    layer = engine.compilation_config.static_forward_context[NAME]
    done = [0] * len(prompts)
    out = [torch.full_like(q, float("nan")) for q in sequences.q]
    while any(d < n for d, n in zip(done, sequences.tokens, strict=True)):
        open_ = [r for r in range(len(prompts)) if done[r] < sequences.tokens[r]]
        some = data.draw(st.lists(st.sampled_from(open_), min_size=1, unique=True))
        left = {r: sequences.tokens[r] - done[r] for r in some}
        # Small draws are large chunks.
        chosen = [(r, done[r], left[r] - data.draw(st.integers(0, left[r] - 1))) for r in some]
        for request, first, part in sequences.step(builder, impl, layer, chosen):
            out[request][first : first + len(part)] = part
            done[request] = first + len(part)
            if data.draw(st.integers(0, 9)) == 9:  # preempted: from the start again
                done[request] = 0
    for request in range(len(prompts)):
        want = sequences.want(request, config).to(dtype)
        torch.testing.assert_close(out[request], want, atol=atol, rtol=0)


def test_kernels_and_memory_are_ready_before_the_first_prompt():
    impl, rows = Impl(), 40
    on = active(configured(CONFIG, impl, "triton"), CPU)
    q, k, v = torch.randn(rows, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    ran = []
    impl.stream = lambda on, query, key, value, last, out: ran.append((len(query), len(key), last))
    impl.kernel_steps = lambda query: (31, 50)
    impl.prepare(on, q, k, v)
    # One row, a few, those from which on other kernels run, and all that there are; at the start and later.
    counts = 1, 25, 31, 40
    assert sorted(ran) == sorted(each for n in counts for each in ((n, n, 0), (n, n, min(n, 6)), (n, n + 7, 0)))
    taken = on.scratch.take(rows + 7, k)[0].data_ptr()
    impl.prepare(on, q, k, v)
    assert len(ran) == 12
    assert on.scratch.take(rows + 7, k)[0].data_ptr() == taken


def test_another_layer_and_another_kind_of_step_are_the_platforms():
    impl = Impl()
    engine = configured(CONFIG, impl)
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], engine, CPU)
    sequences = Sequences([30], [0])
    other = engine.compilation_config.static_forward_context["model.layers.0.self_attn.attn"]
    ((_, _, out),) = sequences.step(builder, impl, other, [(0, 0, 30)])
    dense, _ = oracle(
        *(x[0].transpose(0, 1)[None] for x in (sequences.q, sequences.k, sequences.v)), None, 0, 0, 2**31 - 1, SCALE
    )
    torch.testing.assert_close(out, dense[0].transpose(0, 1), atol=1e-10, rtol=0)
    counts = builder.active.counts
    assert counts.tokens == {"triangle": 24, "dense": 6}
    assert builder.plan(builder.active, None) is None
    assert counts.steps[Reason.LENGTH_UNKNOWN.name] == 1


@pytest.mark.parametrize("change", [{"causal": False}, {"mm_req_doc_ranges": {0: [(3, 9)]}}])
def test_a_step_whose_rows_see_ahead_is_dense(change):
    """Pictures that see themselves whole, in prompts of models of several kinds of input."""
    engine = configured(CONFIG, Impl())
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], engine, CPU)
    starts, ends = torch.tensor([0, 30], dtype=torch.int32), torch.tensor([30], dtype=torch.int32)
    common = Common(starts, starts, ends, 1, 30, 30, 30, torch.zeros(1, 8), torch.arange(30))
    assert planned(builder, [30], common) is not None
    assert planned(builder, [30], common.replace(**change)) is None
    assert builder.active.counts.steps == {"triangle": 1, Reason.NOT_CAUSAL.name: 1}


@pytest.mark.parametrize(
    ("prompt", "length", "what"), [(5, 6, "SHORT_PROMPT"), (16, 20, "decode"), (30, 12, "triangle")]
)
def test_places_of_a_graph_without_requests_are_left_out(prompt, length, what):
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], configured(CONFIG, Impl()), CPU)
    starts, ends = torch.tensor([0, 1, 1, 1], dtype=torch.int32), torch.tensor([length, 0, 0], dtype=torch.int32)
    planned(builder, [prompt], Common(starts, starts, ends, 3, 1, 1, length, torch.zeros(3, 8), None))
    assert builder.active.counts.steps == {what: 1}
    assert builder.active.counts.tokens.total() == 1


def test_most_steps_are_told_dense_without_a_look_at_their_rows(monkeypatch):
    """Decode steps and short prompts, whatever their number."""
    monkeypatch.setattr(backend, "split", None)
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], configured(CONFIG, Impl()), CPU)
    starts = torch.arange(4, dtype=torch.int32)
    # The last row of a prompt, the first of the last rows, and a decode step.
    common = Common(starts, starts, torch.tensor([30, 25, 40], dtype=torch.int32), 3, 3, 1, 40, None, None)
    assert planned(builder, [30, 30, 30], common) is None
    assert builder.active.counts.steps == {"decode": 1}
    common.seq_lens[1] = 24
    with pytest.raises(TypeError):
        planned(builder, [30, 30, 30], common)


def test_a_model_whose_prefix_sees_itself_whole_is_dense():
    engine = configured(CONFIG, Impl())
    engine.model_config.is_mm_prefix_lm = True
    assert [site.reason for site in active(engine, CPU).counts.report] == ["NOT_SELECTED", Reason.NOT_CAUSAL.name]


def test_a_layer_that_is_no_triangle_layer_has_the_platforms_own_function():
    """So it costs the host nothing; and layers that change sides follow."""
    layers = {}
    for sparse in (1, 0, 1):
        engine = configured(CONFIG.replace(triangle_layer_indices=[sparse]), Impl())
        found = engine.compilation_config.static_forward_context
        for name in ("model.layers.0.self_attn.attn", NAME):
            found[name].impl = layers.setdefault(name, Impl())
        active(engine, CPU)
        taken = [layer.impl.forward.__func__ is Impl.forward for layer in layers_of(found)]
        assert taken == [sparse == 0, sparse == 1]
        assert layers_of(found)[1 - sparse].impl.forward.__func__ is PlatformImpl.forward


def layers_of(found):
    return [found["model.layers.0.self_attn.attn"], found[NAME]]


def test_a_layer_of_another_kind_is_dense_and_an_error_in_strict_mode():
    impl = Impl()
    for strict in (False, True):
        engine = configured(CONFIG, impl, strict=strict)
        layers = engine.compilation_config.static_forward_context
        layers[NAME] = ChunkedLocalAttention(**vars(layers[NAME]))
        if strict:
            with pytest.raises(StrictModeError, match="ChunkedLocalAttention"):
                active(engine, CPU)
        else:
            assert not active(engine, CPU).sparse


def test_a_group_without_triangle_layers_is_left_alone():
    engine = configured(CONFIG, Impl())
    builder = Builder(SimpleNamespace(block_size=SIZE), ["model.layers.0.self_attn.attn"], engine, CPU)
    assert builder.active is None
    assert not hasattr(builder.build(0, None), "trianglemix")


def test_auto_on_a_cpu_is_the_engines_own_kernel_but_for_short_windows():
    for config, lowering in ((CONFIG.replace(sliding_window_size=16), "vllm"), (CONFIG, "blocked")):
        on = active(configured(config, Impl(), "auto"), CPU)
        assert (on.lowering, on.sparse) == (lowering, {NAME})


def test_the_cpus_kernel_is_refused_elsewhere():
    answer = why_not(Impl(), torch.float32, torch.device("meta"), CONFIG.geometry, "vllm")
    assert (answer.reason, answer.detail) == (Reason.NO_LOWERING, "vllm is for CPUs")


def test_what_is_on_is_one_thing_for_a_process():
    engine = configured(CONFIG, Impl())
    on = active(engine, CPU)
    assert on is active(engine, CPU)
    assert "prompts over 10 tokens, computed by operator" in on.counts.startup_line(on.lowering)
    on.counts.limit = 2595  # as where dense is faster up to there
    assert "prompts over 2595 tokens" in on.counts.startup_line(on.lowering)
    engine.additional_config = {}
    assert active(engine, CPU) is None


def test_strict_mode_names_a_layer_with_another_backend():
    engine = configured(CONFIG, PlatformImpl(), strict=True)
    with pytest.raises(StrictModeError, match=rf"{NAME}: .*its backend is PlatformImpl"):
        active(engine, CPU)


def test_dense_rows_of_one_request_are_a_slice():
    starts = torch.tensor([0, 7], dtype=torch.int32)
    lengths = torch.tensor([30], dtype=torch.int32)
    common = Common(starts, starts, lengths, 1, 7, 7, 30, torch.zeros(1, 8), torch.arange(7), is_prefilling=True)
    part, rows = of_dense_rows(common, Split((), (Dense(0, 3, 4),)))
    assert rows == slice(3, 7)
    assert part.slot_mapping.tolist() == [3, 4, 5, 6]
    assert (part.num_actual_tokens, part.max_query_len, part.is_prefilling) == (4, 4, None)
