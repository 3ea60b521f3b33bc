"""Attention in child graphs: checkpoints stay checkpoints, compile regions stay regions where nothing changed."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from tests.support.models import masked_oracle, tiny_qwen3
from tests.support.oracle import attended
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.graph.children import flatten, restore
from tmx_compile.operator import OPERATOR
from tmx_compile.passes.pipeline import decide
from tmx_compile.report import Reason
from tmx_compile.request import INDUCTOR, Request
from tmx_compile.testing import captured_graphs, render_graph, rewritten_graphs

N, D = 70, 8
CONFIG = TriangleMixConfig(
    num_sink_tokens=3, sliding_window_size=9, num_last_tokens=6, triangle_layer_indices=[1, 2], min_seq_len=20
)


def checkpoint(layer, *args):
    return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x, mask):
        x = self.lin(x)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask, is_causal=mask is None)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()

    def forward(self, x, mask):
        return x + self.self_attn(x, mask)


class Region(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x, mask):
        return x + self.self_attn(x, mask)


class Stack(nn.Module):
    """``kind`` makes the layers, ``call`` calls one."""

    def __init__(self, kind=Layer, call=lambda layer, *args: layer(*args), layers=3):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(layers))
        self.call = call

    def forward(self, x, valid=None):
        mask = None
        if valid is not None:
            position = torch.arange(x.shape[2])
            mask = (position <= position[:, None]) & valid[:, None, None, :]
        for layer in self.layers:
            x = self.call(layer, x, mask)
        return x


WAYS = {
    "checkpoint": dict(call=checkpoint),
    "reentrant": dict(call=lambda layer, *args: torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=True)),
    "region": dict(kind=Region),
    "a region in a checkpoint": dict(kind=Region, call=checkpoint),
}


def expected(model, x, valid, config=CONFIG):
    """``model(x, valid)`` in float64 with the triangle's mask written out."""
    x, n = x.double(), x.shape[2]
    masks = [attended(n, n, valid, *config.geometry.counts), attended(n, n, valid, 0, 0, n)]
    for index, layer in enumerate(model.layers):
        mask = masks[0 if index in config.layers() else 1][:, None]
        weight, bias = (p.double() for p in layer.self_attn.lin.parameters())
        y = F.linear(x, weight, bias)
        scores = (y @ y.transpose(2, 3) * D**-0.5).masked_fill(~mask, float("-inf"))
        x = x + torch.softmax(scores, -1).nan_to_num(0) @ y
    return x


def problem(padded, batch=2):
    x = torch.randn(batch, 2, N, D, requires_grad=True)
    valid = torch.ones(batch, N, dtype=torch.bool)
    valid[0, :9] = False
    return x, (valid if padded else None)


def calls(gm, target):
    return list(gm.graph.find_nodes(op="call_function", target=target))


def compiled(model, config=CONFIG, **kwargs):
    backend = tmx_backend(config, lowering="operator", strict=True)
    return torch.compile(model, backend=backend, **kwargs), backend.report


@pytest.fixture
def aot(monkeypatch):
    """Autograd as compilers see it, with its choice of what to keep and what to compute again, but no compiler."""
    import torch._inductor.compile_fx as inductor
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition

    def compile_fx(gm, inputs, *args, **kwargs):
        return aot_eager_decomp_partition(gm, inputs)

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_gradients(way, padded, eager):
    model, (x, valid) = Stack(**WAYS[way]), problem(padded)
    run, report = compiled(model)
    out = run(x, valid)
    want = expected(model, x, valid)
    rows = slice(None) if valid is None else valid[:, None, :, None].expand(out.shape)
    torch.testing.assert_close(out.double()[rows], want[rows], atol=2e-5, rtol=0)
    assert [(s.path, s.layer, s.decision) for s in report] == [
        (f"layers.{i}.self_attn", i, "triangle" if i else "dense") for i in range(3)
    ]
    if "region" in way:
        return  # a region that stays one has no gradient where the graph runs as it is
    weights = torch.randn_like(out)
    if valid is not None:
        weights = weights * valid[:, None, :, None]
    inputs = [x, *model.parameters()]
    got = torch.autograd.grad((out * weights).sum(), inputs)
    right = torch.autograd.grad((want * weights).sum(), inputs)
    for a, b in zip(got, right, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_a_checkpoint_stays_one(padded, eager):
    model, (x, valid) = Stack(call=checkpoint), problem(padded)
    run, _ = compiled(model)
    run(x, valid)
    graph = eager[-1]
    nodes = calls(graph, tag_activation_checkpoint)
    assert len(nodes) == 3
    bodies = [getattr(graph, node.args[0].target) for node in nodes]
    assert [len(calls(body, OPERATOR)) for body in bodies] == [0, 1, 1]
    assert all(node.kwargs == {"use_reentrant": False} for node in nodes)
    assert [len(body.graph.output_node().args[0]) for body in bodies] == [1, 1, 1]
    assert not calls(graph, OPERATOR)
    # The valid keys are computed once, outside of the bodies, from the padding; no mask over rows and keys goes in.
    for node in nodes[1:]:
        shapes = [tuple(arg.meta["example_value"].shape) for arg in node.args[1:]]
        assert all(shape[-2:] != (N, N) for shape in shapes)
        assert ((2, N) in shapes) == padded


def test_memory_of_a_checkpoint(aot):
    """What the forward pass keeps for the backward pass does not grow with what the pass put into the bodies."""

    def kept(config):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Stack(call=checkpoint), torch.randn(1, 2, N, D, requires_grad=True)
        saved = []
        run = torch.compile(model, backend=tmx_backend(config, lowering="operator"))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            run(x)
        return sum(saved)

    dense = kept(CONFIG.replace(min_seq_len=N))
    assert kept(CONFIG) <= dense


@pytest.mark.parametrize("padded", [False, True])
def test_regions_without_a_change_stay_regions(padded, eager):
    config = CONFIG.replace(triangle_layer_indices=[2])
    model, (x, valid) = Stack(Region, layers=4), problem(padded, batch=3)
    run, report = compiled(model, config)
    out = run(x, valid)
    rows = slice(None) if valid is None else valid[:, None, :, None].expand(out.shape)
    torch.testing.assert_close(out.double()[rows], expected(model, x, valid, config)[rows], atol=2e-5, rtol=0)
    assert [site.layer for site in report.triangle()] == [2]
    nodes = calls(eager[-1], invoke_subgraph)
    assert len(nodes) == 3
    assert len({node.args[0].target for node in nodes}) <= 1
    assert len(calls(eager[-1], OPERATOR)) == 1


def test_one_operand_twice_and_results_that_nothing_needs(eager):
    @torch.compiler.nested_compile_region
    def region(a, b, unused):
        return F.scaled_dot_product_attention(a, b, b, is_causal=True), a + b

    class Twice(nn.Module):
        def forward(self, x):
            y, z = region(x, x, x * 2)
            return y + region(z, z, y)[0]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Twice(), Layer()])

        def forward(self, x):
            return self.layers[1](self.layers[0](x), None)

    model, x = Model(), torch.randn(1, 2, N, D)
    backend = tmx_backend(CONFIG, lowering="operator")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        before = model.layers[0](x)
    # Both calls stand in one module: which of its attention calls the traced body belongs to is not told.
    assert [site.reason for site in backend.report] == ["LAYER_UNKNOWN", "LAYER_UNKNOWN", ""]
    rest = nn.Module()
    rest.layers = [model.layers[1]]
    want = expected(rest, before, None, CONFIG.replace(triangle_layer_indices=[0]))
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)


def test_dynamic_lengths(eager):
    model = Stack(call=checkpoint)
    run, report = compiled(model)
    for length in (N, 50, 90):
        x = torch.randn(1, 2, length, D, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(run(x).double(), expected(model, x, None), atol=2e-5, rtol=0)
    assert report.graphs == 1


def test_a_short_prompt_keeps_the_graph(eager):
    model, x = Stack(call=checkpoint), torch.randn(1, 2, 20, D, requires_grad=True)
    (before,) = captured_graphs(model, x)
    torch._dynamo.reset()
    run, report = compiled(model)
    run(x)
    assert render_graph(eager[-1]) == render_graph(before)
    assert {site.reason for site in report} == {"NOT_SELECTED", "SHORT_PROMPT"}


@pytest.mark.parametrize("way", WAYS)
def test_laid_open_and_closed_again(way):
    """Closing undoes laying open: the same numbers, the same calls."""
    model, (x, valid) = Stack(**WAYS[way]), problem(True)
    graphs = captured_graphs(model, x, valid)
    (gm,) = graphs
    flat = flatten(gm)
    assert not calls(flat, tag_activation_checkpoint)
    assert not calls(flat, invoke_subgraph)
    restore(flat)
    for target in (
        (tag_activation_checkpoint,) if way.startswith("a ") else (tag_activation_checkpoint, invoke_subgraph)
    ):
        assert len(calls(flat, target)) == len(calls(gm, target))
    arguments = {"x": x, "valid": valid, **dict(model.named_parameters())}
    given = []
    for node in gm.graph.find_nodes(op="placeholder"):
        (value,) = [v for name, v in arguments.items() if node.name.endswith(f"_{_as_source(name)}_")]
        given.append(value)
    torch.testing.assert_close(flat(*given)[0], model(x, valid), atol=1e-6, rtol=0)
    assert flatten(graphs[0]) is not graphs[0]


def _as_source(name):
    parts = name.split(".")
    kinds = ["modules"] * (len(parts) - 1) + ["parameters"]
    return "_".join(f"{kind}_{part}" for kind, part in zip(kinds, parts, strict=True)) if len(parts) > 1 else name


def test_planning_leaves_the_graph_alone():
    model, (x, valid) = Stack(call=checkpoint), problem(True)
    (gm,) = captured_graphs(model, x, valid)
    before = render_graph(gm)
    plan = decide(gm, Request(CONFIG), INDUCTOR)
    assert len(plan.triangle) == 2
    assert render_graph(gm) == before


def test_a_graph_without_children_is_not_copied():
    model, (x, valid) = Stack(), problem(True)
    (gm,) = captured_graphs(model, x, valid)
    assert flatten(gm) is gm


def test_a_region_whose_module_cannot_be_told(eager):
    """One traced body serves both calls, and the path recorded in it is that of the first."""

    @torch.compiler.nested_compile_region
    def region(layer, x):
        return layer(x, None)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = region(layer, x)
            return x

    backend = tmx_backend(CONFIG, lowering="operator")
    model, x = Loop(), torch.randn(1, 2, N, D)
    out = torch.compile(model, backend=backend)(x)
    placed = {site.layer for site in backend.report.triangle()}
    config = CONFIG.replace(triangle_layer_indices=placed)
    torch.testing.assert_close(out.double(), expected(model, x, None, config), atol=2e-5, rtol=0)
    assert placed in ({1}, set())
    assert all(site.layer in (0, 1) or site.reason == Reason.LAYER_UNKNOWN.name for site in backend.report)


def test_other_child_graphs_are_on_record(eager):
    class Conditional(Layer):
        def forward(self, x, mask):
            return torch.cond(x.sum() > 0, lambda x: self.self_attn(x, None), lambda x: x * 2.0, (x,))

    model, x = Stack(Conditional, layers=2), torch.randn(1, 2, N, D)
    backend = tmx_backend(CONFIG, lowering="operator")
    with torch.no_grad():
        out = torch.compile(model, backend=backend)(x)
        torch.testing.assert_close(out, model(x), atol=1e-6, rtol=0)
    assert [(site.layer, site.decision, site.reason) for site in backend.report] == [
        (0, "dense", "FORM"),
        (1, "dense", "FORM"),
    ]
    assert "inside cond" in backend.report.sites[-1].detail


def test_hugging_face_gradient_checkpointing(eager):
    model = tiny_qwen3(3).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 128, (2, N))
    attention_mask = torch.ones(2, N, dtype=torch.int64)
    attention_mask[0, :13] = 0
    run, report = compiled(model)
    logits = run(ids, attention_mask=attention_mask, use_cache=False).logits
    assert [(site.layer, site.decision) for site in report] == [(0, "dense"), (1, "triangle"), (2, "triangle")]
    want = masked_oracle(tiny_qwen3(3), CONFIG, ids, attention_mask)
    valid = attention_mask.bool()
    torch.testing.assert_close(logits.double()[valid], want[valid], atol=2e-4, rtol=0)
    logits[valid].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    graph = next(g for g in reversed(eager) if calls(g, tag_activation_checkpoint))
    assert len(calls(graph, tag_activation_checkpoint)) == 3


@pytest.mark.parametrize("way", ["checkpoint", "region"])
def test_through_autograd(way, aot):
    model, (x, valid) = Stack(**WAYS[way]), problem(True)
    run, _ = compiled(model)
    out = run(x, valid)
    want = expected(model, x, valid)
    rows = valid[:, None, :, None].expand(out.shape)
    torch.testing.assert_close(out.double()[rows], want[rows], atol=2e-5, rtol=0)
    (got,) = torch.autograd.grad(out[rows].square().sum(), [x])
    (right,) = torch.autograd.grad(want[rows].square().sum(), [x])
    torch.testing.assert_close(got, right, atol=2e-4, rtol=1e-4)


def test_rewritten_graphs_shows_the_graph(eager):
    model, (x, valid) = Stack(call=checkpoint), problem(True)
    (graph,) = rewritten_graphs(model, x, valid, config=CONFIG)
    assert len(calls(graph, tag_activation_checkpoint)) == 3
