"""The backend's common part around a platform made for this: any schedule of any prompts against the oracle.

The platform keeps pages and computes dense rows from them, as vLLM's do; the schedules are drawn.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import oracle, tolerance
from tests.support.paged_platform import (
    CONFIG,
    CPU,
    DIM,
    HEADS,
    KV_HEADS,
    NAME,
    SCALE,
    SIZE,
    Builder,
    ChunkedLocalAttention,
    Common,
    Impl,
    PlatformImpl,
    Sequences,
    configured,
    planned,
)
from tmx_compile import StrictModeError, TriangleMixConfig
from tmx_compile.integrations.vllm import backend
from tmx_compile.integrations.vllm.backend import active, of_dense_rows, why_not
from tmx_compile.integrations.vllm.rows import Dense, Split
from tmx_compile.report import Reason

# Triton's interpreter runs the kernels where there is no GPU; where there is one, they run there alone.
KERNELS = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_schedule_gives_the_oracles_rows(data):
    serve(data, "operator", torch.float64, 1e-10)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_any_schedule_gives_the_oracles_rows_with_the_gpus_kernels(data):
    """On a GPU, or in Triton's interpreter: they write into the step's output themselves."""
    serve(data, "triton", torch.float32, tolerance(torch.float32), KERNELS)


def serve(data, lowering, dtype, atol, device=CPU):
    """Run drawn prompts in drawn steps, and compare every row."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    config = TriangleMixConfig(
        *(data.draw(st.integers(0, most)) for most in (6, 12, 12)), triangle_layer_indices=[1], min_seq_len=10
    )
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    sequences = Sequences(prompts, [data.draw(st.integers(0, 4)) for _ in prompts], dtype, device)
    impl = Impl()
    engine = configured(config, impl, lowering)
    builder = Builder(SimpleNamespace(block_size=SIZE), [NAME], engine, device)
    assert builder.active is not None, "the lowering does not run here"
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
        torch.testing.assert_close(out[request].cpu(), want, atol=atol, rtol=0)


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
