"""The switch inside of models that are compiled by whatever backend: one node a layer, no graph break."""

import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.support.switched import (
    CONFIG,
    decisions,
    padded,
    plan_model,
    plan_oracle,
    prompt,
    registered,
    switched_model,
)
from tmx_compile import prefill, tmx_backend

OPERATOR = torch.ops.tmx.triangle_attention.default


class Counting:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, gm, example_inputs):
        self.graphs.append(gm)
        return gm.forward

    def operators(self):
        return [sum(node.target is OPERATOR for node in gm.graph.nodes) for gm in self.graphs]


@pytest.fixture(autouse=True)
def attention():
    with registered() as attention:
        yield attention


def close(got, want, mask):
    torch.testing.assert_close(got[mask.bool()].double(), want[mask.bool()], atol=5e-5, rtol=0)


def test_one_node_a_layer_and_two_graphs_for_all_lengths(attention):
    backend = Counting()
    model = torch.compile(switched_model("Qwen3"), backend=backend, fullgraph=True, dynamic=True)
    for n in (100, 60, 20, 333, 30):
        ids, mask = prompt(2, n), padded(((0, 0), (n // 3, 0)), n)
        with torch.no_grad():
            got = model(ids, attention_mask=mask, use_cache=False).logits
        close(got, plan_oracle("Qwen3", CONFIG, ids, mask), mask)
    assert backend.operators() == [2, 0]
    assert decisions(attention.report)[1] == ("triangle", "")
    assert decisions(attention.report, 1)[1] == ("dense", "SHORT_PROMPT")
    assert attention.report.triangle()[0].dynamic


def test_a_sliding_layer_stays_dense_there(attention):
    """Dynamo cannot look into the function of its mask."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    with torch.no_grad():
        got = torch.compile(switched_model("Gemma3"), backend="eager", fullgraph=True)(ids, attention_mask=mask).logits
    close(got, plan_oracle("Gemma3", CONFIG.replace(triangle_layer_indices=[1]), ids, mask), mask)
    found = decisions(attention.report)
    assert (found[1], found[2]) == (("triangle", ""), ("dense", "MASK_UNKNOWN"))


def test_a_training_step(attention):
    """The loss's gradients, against the same step in float64 under written-out masks."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    model = switched_model().train()
    twin = plan_model("Llama", CONFIG, ids, mask).train()
    for call in (twin, torch.compile(model, backend="aot_eager", fullgraph=True)):
        call(ids, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-3, msg=name)
    assert {site.lowering for site in attention.report.triangle()} == {"operator"}


def test_a_static_cache(attention):
    """A prompt into an empty cache, and a decode step."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    model = switched_model()
    cache = StaticCache(config=model.config, max_cache_len=128)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask, past_key_values=cache).logits
        step = compiled(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1] * 0 + 1], 1), past_key_values=cache)
    assert step.logits.shape == (2, 1, 128)
    close(got, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert decisions(attention.report)[1] == ("triangle", "")
    assert decisions(attention.report, 1)[1] == ("dense", "SHORT_PROMPT")


def test_the_mask_in_words_crosses_graph_breaks(attention):
    """A graph for each layer: what one of them makes of the mask is what the next is given."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    model, backend = switched_model(), Counting()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(ids, attention_mask=mask).logits
    close(got, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert sorted(backend.operators())[-2:] == [1, 1]


def test_export(attention):
    """A program holds the operator, and the report tells."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    inputs = dict(attention_mask=mask, use_cache=False)
    with torch.no_grad():
        program = torch.export.export(switched_model(), (ids,), inputs)
        close(program.module()(ids, **inputs).logits, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert sum(node.target is OPERATOR for node in program.graph.nodes) == 2
    assert decisions(attention.report)[1] == ("triangle", "")


def test_chunks():
    """The graph asks, when it runs, where the prompt ends."""
    ids = prompt()
    with registered(CONFIG, chunked_prefill=True), torch.no_grad():
        model = switched_model()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        cache, parts = DynamicCache(config=model.config), []
        with prefill(total_tokens=100):
            for begin, end in ((0, 50), (50, 100)):
                parts.append(compiled(ids[:, begin:end], past_key_values=cache).logits)
    close(torch.cat(parts, 1), plan_oracle("Llama", CONFIG, ids), torch.ones(2, 100))


def test_under_the_backend_of_this_package(attention):
    """Both at once: the backend finds nothing to do in sparse layers, which are one node already."""
    ids, mask = prompt(), padded(((0, 0), (33, 0)))
    backend = tmx_backend(CONFIG)
    model = torch.compile(switched_model(), backend=backend, fullgraph=True)
    with torch.no_grad():
        got = model(ids, attention_mask=mask, use_cache=False).logits
    close(got, plan_oracle("Llama", CONFIG, ids, mask), mask)
    assert not backend.report.triangle()


class _Broken(torch.nn.Module):
    """Breaks the graph inside attention, as a quantised cache or an int8 matrix product does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.inner(x)


@pytest.mark.parametrize("sides", [None, ((0, 0), (33, 0))], ids=["no padding", "padding"])
def test_a_break_inside_attention_under_the_backend_of_this_package(attention, eager, sides):
    """The switch is handed the module, and so says in the piece that is left which layer it is; nothing is warned."""
    ids, mask = prompt(), None if sides is None else padded(sides)
    model = switched_model()
    for layer in model.model.layers:
        layer.self_attn.v_proj = _Broken(layer.self_attn.v_proj)
    backend = tmx_backend(CONFIG, model=model, strict=True)
    model.compile(backend=backend)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = model(ids, attention_mask=mask).logits
        short = model(ids[:, :20], attention_mask=None if mask is None else mask[:, 80:]).logits
    close(got, plan_oracle("Llama", CONFIG, ids, mask), torch.ones(2, 100) if mask is None else mask)
    assert short.isfinite().all()
    assert {layer for site in backend.report.triangle() for layer in site.layers} == {1, 2}
    assert backend.report.uncompiled == 0


def test_what_the_switch_leaves_dense_outside_of_graphs_is_told_there(attention, eager):
    """A mask of one's own, after the same layers were sparse in pieces."""
    model = switched_model()
    for layer in model.model.layers:
        layer.self_attn.v_proj = _Broken(layer.self_attn.v_proj)
    backend = tmx_backend(CONFIG, model=model)
    model.compile(backend=backend)
    ids, mask = prompt(), torch.ones(2, 1, 100, 100, dtype=torch.bool).tril()
    with torch.no_grad():
        model(ids)
        assert backend.report.uncompiled == 0
        with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="ran uncompiled, dense"):
            model(ids, attention_mask=mask)
    assert backend.report.uncompiled == 2
