"""A captured model: the right numbers for any set of sparse layers, one capture for all, and the model untouched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.gates import Decoder, GatedModel, middle_mask, one_gate
from tests.support.layers import Stack
from tests.support.memory import Largest
from tests.support.models import masked_oracle, tiny_qwen3
from tmx_compile import TriangleMixConfig, TriangleMixError
from tmx_compile.analysis import CapturedModel, Inputs
from tmx_compile.analysis.capture import sections as sections_module
from tmx_compile.analysis.capture.samples import final_logits
from tmx_compile.analysis.capture.switch import Switchboard
from tmx_compile.mask.geometry import Geometry

N, HEADS = 48, 4
CONFIG = TriangleMixConfig(2, 6, 5)
GEOMETRY = CONFIG.geometry


def token_ids(batch=1, n=N, seed=1):
    return torch.randint(0, 128, (batch, n), generator=torch.Generator().manual_seed(seed))


def call(ids, **more):
    return Inputs(kwargs={"input_ids": ids, "use_cache": False, **more})


def record_all(captured, inputs, token):
    found = {}
    captured.gradients(inputs, lambda out: final_logits(out, inputs, 1)[:, 0, token].sum(), found.__setitem__)
    return found


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_any_set_of_sparse_layers_from_one_capture(impl):
    model = tiny_qwen3(layers=3, impl=impl)
    captured, ids = CapturedModel(model, CONFIG), token_ids(2)
    for sparse in ((), (1,), (0, 2), (0, 1, 2)):
        expected = masked_oracle(model, CONFIG.replace(triangle_layer_indices=sparse), ids)
        logits = captured.run(call(ids), sparse).logits
        torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    assert captured.layers == (0, 1, 2)
    assert captured.report.graphs == 1


@pytest.mark.parametrize("ends", [(20,), (20, N + 1), (30, 20, N), (0, N), (20, 20, N)])
def test_pieces_that_do_not_cover_the_call_are_refused(ends):
    captured = CapturedModel(tiny_qwen3(layers=2), CONFIG)
    with (
        pytest.raises(ValueError, match=rf"rising rows up to {N}, got ends \[{ends[0]}"),
        captured.pieces([(end, GEOMETRY) for end in ends]),
    ):
        captured.run(call(token_ids()), (1,))


def test_a_trace_with_other_pieces_is_not_taken_up():
    """Nothing of a sparse layer's run is reused where its rows were other prompts."""
    captured, inputs = CapturedModel(tiny_qwen3(layers=3), CONFIG), call(token_ids())
    _, trace = captured.trace(inputs, (1,))
    with captured.pieces([(20, GEOMETRY), (N, GEOMETRY)]):
        again, whole = captured.rerun(trace, (1, 2)).logits, captured.run(inputs, (1, 2)).logits
    assert torch.equal(again, whole)
    assert not torch.equal(again, captured.run(inputs, (1, 2)).logits)


def test_a_rerun_from_a_trace_is_the_run(monkeypatch):
    model = tiny_qwen3(layers=4)
    captured, inputs = CapturedModel(model, CONFIG), call(token_ids())
    logits, trace = captured.trace(inputs)
    assert torch.equal(logits.logits, captured.run(inputs).logits)
    assert sorted(trace.reached.states) == [0, 1, 2, 3]
    visits = []
    attend = Switchboard.attend
    monkeypatch.setattr(Switchboard, "attend", lambda board, layer, x: visits.append(layer) or attend(board, layer, x))
    for sparse in ((2,), (1, 3), (0,), ()):
        visits.clear()
        again = captured.rerun(trace, sparse).logits
        # Only what comes after the first difference runs.
        assert visits == list(range(min(sparse, default=3), 4))
        assert torch.equal(again, captured.run(inputs, sparse).logits)
    _, later = captured.trace(inputs, [2], since=trace)
    assert sorted(later.reached.states) == [0, 1, 2, 3]
    assert torch.equal(captured.rerun(later, [2, 3]).logits, captured.run(inputs, [2, 3]).logits)
    assert torch.equal(captured.rerun(later, [1]).logits, captured.run(inputs, [1]).logits)


def test_the_geometry_can_change_between_runs():
    model, ids, other = tiny_qwen3(layers=3), token_ids(), Geometry(1, 3, 9)
    captured, inputs = CapturedModel(model, CONFIG), call(ids)
    _, dense = captured.trace(inputs)
    _, trace = captured.trace(inputs, [1])
    captured.geometry = other
    assert captured.geometry == captured.config.geometry == other
    config = TriangleMixConfig(*other.counts, triangle_layer_indices=[1, 2])
    expected = masked_oracle(model, config, ids)
    found = [captured.run(inputs, [1, 2]), captured.rerun(dense, [1, 2]), captured.rerun(trace, [1, 2])]
    for output in found:
        torch.testing.assert_close(output.logits.double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="num_sink_tokens must be a non-negative integer, got -1"):
        captured.geometry = Geometry(-1, 3, 9)
    assert captured.geometry == other


class Broken(Stack):
    """Two graphs."""

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)


class Noted(Stack):
    """Counts its calls in a buffer, in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x * self.scale)


def test_what_cannot_be_skipped_runs_as_a_whole():
    x = torch.randn(1, 2, N, 8)
    for model, graphs in ((Broken(), 2), (Noted(), 1)):
        captured = CapturedModel(model, CONFIG)
        with torch.no_grad():
            expected = {sparse: captured.run(Inputs((x,)), sparse) for sparse in ((), (1,))}
            _, trace = captured.trace(Inputs((x,)))
            assert not trace.reached.states
            assert torch.equal(captured.rerun(trace, (1,)), expected[1,])
            assert not torch.equal(expected[1,], expected[()])
        assert captured.layers == (0, 1)
        assert captured.report.graphs == graphs


def test_more_lengths_than_dynamo_would_compile():
    model = Decoder(layers=1)
    captured = CapturedModel(model, CONFIG)
    # Dynamo would give up after eight compilations, and run the model as it is.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False), torch.no_grad():
        for n in range(30, 50, 2):
            ids, middle = token_ids(n=n), middle_mask(n, GEOMETRY.counts)
            expected = GatedModel(model, n, renormalized=True).logits(ids, {0: one_gate(0.0, middle, HEADS)})
            torch.testing.assert_close(captured.run(Inputs((ids,)), [0]), expected, rtol=1e-8, atol=1e-10)
    assert captured.report.graphs == 10


# Gradients of a real model, in float64.


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("renormalized", [False, True])
def test_gradients_are_those_of_explicit_maps_per_layer_and_head(renormalized, impl):
    model, ids, token = tiny_qwen3(layers=3, impl="sdpa"), token_ids(), 7
    oracle = GatedModel(model, N, renormalized=renormalized)
    middle = middle_mask(N, GEOMETRY.counts)
    gates = {i: torch.ones(1, HEADS, N, N, dtype=torch.float64, requires_grad=True) for i in range(3)}
    logit = oracle.logits(ids, gates, use_cache=False)[0, -1, token]
    expected = torch.autograd.grad(logit, list(gates.values()))
    other = tiny_qwen3(layers=3, impl=impl).double()
    found = record_all(CapturedModel(other, CONFIG), call(ids), token)
    assert sorted(found) == [0, 1, 2]
    for layer, grad in enumerate(expected):
        inside = grad * middle
        place = 2 if renormalized else 0
        assert int(found[layer].cells[0]) == int(middle.sum())
        # Hugging Face's eager attention takes its softmax in float32.
        tolerance = dict(rtol=1e-8, atol=1e-12) if impl == "sdpa" else dict(rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found[layer].sums[place], inside.sum((2, 3)), **tolerance)
        torch.testing.assert_close(found[layer].sums[place + 1], inside.abs().sum((2, 3)), **tolerance)
    # What the last layer computes for rows before the last ones reaches no later row.
    assert float(found[2].sums.abs().max()) == 0.0 < float(found[1].sums.abs().max())


@pytest.mark.parametrize("renormalized", [False, True])
def test_signed_gradients_are_finite_differences_per_layer_and_head(renormalized):
    model, ids, token, step = Decoder(layers=2), token_ids(), 7, 1e-4
    oracle = GatedModel(model, N, renormalized=renormalized)
    middle = middle_mask(N, GEOMETRY.counts)
    found = record_all(CapturedModel(model, CONFIG), Inputs((ids,)), token)
    place = 2 if renormalized else 0

    def difference(layer, head):
        up, down = (
            oracle.logits(ids, {layer: one_gate(1 + sign * step, middle, HEADS, head)})[0, -1, token]
            for sign in (1, -1)
        )
        return float(up - down) / (2 * step)

    with torch.no_grad():
        for layer in range(2):
            sums = found[layer].sums[place, 0]
            for head in range(HEADS):
                assert float(sums[head]) == pytest.approx(difference(layer, head), rel=1e-5, abs=1e-9)
            assert float(sums.sum()) == pytest.approx(difference(layer, None), rel=1e-5, abs=1e-9)
    assert float(found[0].sums[place].abs().max()) > 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_sequences_are_kept_apart(side):
    model, token = tiny_qwen3(layers=2).double(), 7
    ids, mask = token_ids(2), torch.ones(2, N, dtype=torch.int64)
    short = N - 9
    mask[1, slice(0, 9) if side == "left" else slice(short, None)] = 0
    alone = ids[1:, 9:] if side == "left" else ids[1:, :short]
    captured = CapturedModel(model, CONFIG)
    both = record_all(captured, call(ids, attention_mask=mask), token)
    single = record_all(captured, call(alone), token)
    whole = record_all(captured, call(ids[:1]), token)
    for layer in range(2):
        assert both[layer].cells.tolist() == [int(whole[layer].cells), int(single[layer].cells)]
        torch.testing.assert_close(both[layer].sums[:, 0], whole[layer].sums[:, 0], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(both[layer].sums[:, 1], single[layer].sums[:, 0], rtol=1e-6, atol=1e-9)


def test_no_attention_map_is_formed_on_the_way(monkeypatch):
    monkeypatch.setattr(sections_module, "SCORE_BUDGET", 1 << 15)
    n = 1024
    model = tiny_qwen3(layers=2)
    captured, ids = CapturedModel(model, TriangleMixConfig()), token_ids(n=n)
    inputs = call(ids, logits_to_keep=1)
    captured.run(inputs)
    found, largest = {}, Largest()

    def number(out):
        # Dynamo captures nothing under a dispatch mode: it watches the backward pass alone.
        largest.__enter__()
        return out.logits[0, 0, 7]

    try:
        captured.gradients(inputs, number, found.__setitem__)
    finally:
        largest.__exit__(None, None, None)
    assert sorted(found) == [0, 1]
    # Tensors of N x width, but nothing of 1,024 x 1,024 per head.
    assert n * 64 <= largest.elements < n * n / 8


# What must not happen.


def test_the_model_is_left_as_it_was():
    model = tiny_qwen3(layers=2).train()
    model.lm_head.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.compile(backend="eager")
    before = [(p, p.requires_grad, p.clone(), p.grad) for p in model.parameters()]
    training = [module.training for module in model.modules()]
    compiled = model._compiled_call_impl
    captured, inputs = CapturedModel(model, CONFIG), call(token_ids())
    record_all(captured, inputs, 7)
    with pytest.raises(ValueError, match="oops"):
        captured.gradients(inputs, lambda _: (_ for _ in ()).throw(ValueError("oops")), lambda *_: None)
    assert torch.equal(captured.run(inputs).logits, captured.run(inputs).logits)
    assert [module.training for module in model.modules()] == training
    assert model._compiled_call_impl is compiled
    for parameter, wants, value, grad in before:
        assert parameter.requires_grad == wants
        assert parameter.grad is grad is None
        assert torch.equal(parameter, value)


def test_a_compiled_wrapper_is_taken_for_its_model():
    model = tiny_qwen3(layers=2)
    captured = CapturedModel(torch.compile(model, backend="eager"), CONFIG)
    assert captured.run(call(token_ids()), [1]) is not None
    assert captured.model is model


def test_refusals():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got function"):
        CapturedModel(test_refusals, CONFIG)
    captured, inputs = CapturedModel(tiny_qwen3(layers=2), CONFIG), call(token_ids())
    with pytest.raises(ValueError, match=r"sparse must be among the layers \[0, 1\], got \[2, 5\]"):
        captured.run(inputs, [0, 2, 5])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"outside torch\.inference_mode"):
        captured.run(inputs)
    with pytest.raises(TriangleMixError, match="carries no gradient of its attention"):
        captured.gradients(inputs, lambda out: out.logits.detach().sum(), lambda *_: None)
    encoder = Stack(lambda x: F.scaled_dot_product_attention(x, x, x))
    with pytest.raises(TriangleMixError, match=r"proved no attention of Stack:\nlayers.0: NOT_CAUSAL"):
        CapturedModel(encoder, CONFIG).run(Inputs((torch.randn(1, 2, N, 8),)))


def test_a_run_that_dynamo_does_not_capture_is_an_error():
    captured, inputs = CapturedModel(tiny_qwen3(layers=2), CONFIG), call(token_ids())
    captured.run(inputs)
    with torch.compiler.set_stance("force_eager"), pytest.raises(TriangleMixError, match=r"this run had \[\]"):
        captured.run(inputs)
