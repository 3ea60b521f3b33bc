"""What becomes of an attention's result: the next one's operand, written in place, viewed, the output itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_leaves

from tests.support.layers import Call
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, explain, rewrite
from tmx_compile.passes.pipeline import compile
from tmx_compile.passes.record import records
from tmx_compile.report import Reason
from tmx_compile.request import INDUCTOR, Request

B, H, N, D = 2, 3, 70, 16
SCALE = D**-0.5


def config(layers, **changes):
    settings = dict(num_sink_tokens=2, sliding_window_size=9, num_last_tokens=7, min_seq_len=32)
    return TriangleMixConfig(triangle_layer_indices=layers, **(settings | changes))


# Every key is in the window: the operator computes what dense attention does.
WHOLE = config([0], sliding_window_size=N)


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def written_out(q, k, v):
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return (q @ k.transpose(-1, -2) * SCALE).masked_fill(~causal, float("-inf")).softmax(-1) @ v


class Model(nn.Module):
    """A program that calls its layers as it likes."""

    def __init__(self, program, *forms):
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList(map(Call, forms))

    def forward(self, x):
        return self.program(self.layers, x)


def in_dynamo(model, x, cfg):
    """The pass on Dynamo's graph, which is then run as it is."""
    found = []

    def backend(gm, example_inputs):
        done = compile(gm, Request(cfg), INDUCTOR, example_inputs)
        found.extend(records(done.plan, 0))
        return done.graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend)(x), found


def in_export(model, x, cfg):
    after, report = rewrite(torch.export.export(model, (x,)), cfg)
    return after.module()(x), list(report)


def in_decomposed_export(model, x, cfg):
    after, report = rewrite(torch.export.export(model, (x,)).run_decompositions(), cfg)
    return after.module()(x), list(report)


WAYS = {"dynamo": in_dynamo, "export": in_export, "decomposed": in_decomposed_export}


# Chains ---------------------------------------------------------------------------------------------------------------


def as_query(layers, x):
    for layer in layers:
        x = layer(x, x, x)
    return x


def everywhere(layers, x):
    y = layers[0](x, x, x)
    return layers[1](y, x, x), layers[1](x, y, x), layers[2](x, x, y)


def expected_chain(program, x, cfg):
    """The same program on the oracle, in float64."""

    def layer(index):
        geometry = cfg.geometry.counts if index in cfg.layers() else (0, 0, N)
        return lambda q, k, v: oracle(q, k, v, None, *geometry, SCALE)[0]

    return program([layer(i) for i in range(3)], x.double())


@pytest.mark.parametrize("sparse", [(0, 1, 2), (0, 2), (1,), (2,)], ids=str)
@pytest.mark.parametrize("program", [as_query, everywhere])
@pytest.mark.parametrize("way", WAYS)
def test_a_result_is_the_next_operand(way, program, sparse):
    forms = (sdpa, written_out, sdpa) if sparse != (0, 2) else (written_out, sdpa, written_out)
    x, cfg = torch.randn(B, H, N, D), config(list(sparse))
    got, found = WAYS[way](Model(program, *forms), x, cfg)
    assert {r.layer for r in found if r.decision == "triangle"} == set(sparse)
    for a, b in zip(tree_leaves(got), tree_leaves(expected_chain(program, x, cfg)), strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=0)


def mask_of_a_result(layers, x):
    """Which keys are valid is told by an earlier layer's result."""
    y = layers[0](x, x, x)
    valid = y[:, 0, :, 0] < 1e9
    mask = torch.ones(N, N, dtype=torch.bool).tril() & valid[:, None, None, :]
    return layers[1](y, x, mask)


@pytest.mark.parametrize("way", ["dynamo", "export"])
def test_a_result_masks_the_next_one(way):
    model = Model(mask_of_a_result, sdpa, lambda q, kv, mask: F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask))
    x, cfg = torch.randn(B, H, N, D), config([0, 1])
    got, found = WAYS[way](model, x, cfg)
    assert [r.decision for r in found] == ["triangle"] * 2
    first = oracle(x, x, x, None, *cfg.geometry.counts, SCALE)[0]
    right = oracle(first, x, x, None, *cfg.geometry.counts, SCALE)[0]
    torch.testing.assert_close(got.double(), right, atol=5e-5, rtol=0)


# Users ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("tmx_tests::rows", mutates_args=())
def rows(x: torch.Tensor) -> torch.Tensor:
    """Takes (B, N, H, D) in memory and nothing else."""
    assert x.transpose(1, 2).is_contiguous()
    return x.clone()


@rows.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("tmx_tests::triple_", mutates_args={"x"})
def triple_(x: torch.Tensor) -> None:
    x.mul_(3)


def twice(out, x):
    return out + out * 2, out


def nested(out, x):
    return {"a": out, "b": [x, (out,)]}


def multiplied(out, x):
    out.mul_(2)
    return out + 1


def added(out, x):
    out += x
    return out


def written_through_a_view(out, x):
    out.transpose(1, 2)[:, 3:5] += 1
    return out.sum(1)


def written_by_a_custom_operator(out, x):
    torch.ops.tmx_tests.triple_(out)
    return out + x


def given_to_a_custom_operator(out, x):
    return torch.ops.tmx_tests.rows(out.transpose(1, 2).contiguous().transpose(1, 2))


def into_another(out, x):
    made = torch.empty_like(x)
    torch.mul(out, 2, out=made)
    return made


def strided(out, x):
    return torch.as_strided(out, (4,), (1,)), out


USERS = {
    "itself": lambda out, x: out,
    "transposed": lambda out, x: (out.mT, out.permute(3, 2, 1, 0)),
    "flat": lambda out, x: (out.flatten(2), out[..., None], out[:, :, ::2]),
    "parts": lambda out, x: out[None].squeeze(0).split(30, 2),
    "detached": lambda out, x: out.detach() * 2,
    "unused": lambda out, x: x + 1,
    "like": lambda out, x: torch.zeros_like(out) + out.new_ones(()),
} | {f.__name__: f for f in (twice, nested, multiplied, added, written_through_a_view, written_by_a_custom_operator)}
USERS |= {f.__name__: f for f in (given_to_a_custom_operator, into_another, strided)}


def check_same(got, right):
    for a, b in zip(tree_leaves(got), tree_leaves(right), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("form", [sdpa, written_out])
def test_users_in_a_dynamo_graph(form, user):
    model, x = Model(lambda layers, x: USERS[user](layers[0](x, x, x), x), form), torch.randn(B, H, N, D)
    got, found = in_dynamo(model, x.clone(), WHOLE)
    assert [r.decision for r in found] == ["triangle"]
    check_same(got, model(x.clone()))


@pytest.mark.parametrize("user", sorted(USERS.keys() - {"written_through_a_view"}))
@pytest.mark.parametrize("kind", ["export", "make_fx", "symbolic_trace"])
def test_users_in_a_graph_of_ones_own(kind, user):
    model, x = Model(lambda layers, x: USERS[user](layers[0](x, x, x), x), sdpa), torch.randn(B, H, N, D)
    if kind == "export":
        program = torch.export.export(model, (x,))
        after, report = rewrite(program, WHOLE)
        before, after = program.module(), after.module()
    else:
        before = make_fx(model)(x.clone()) if kind == "make_fx" else torch.fx.symbolic_trace(model)
        if kind == "symbolic_trace":
            FakeTensorProp(before).propagate(x.clone())
        for node in before.graph.nodes:
            node.meta.setdefault("nn_module_stack", {"": ("layers.0", Call)})
        after, report = rewrite(before, WHOLE)
    assert {r.reason for r in report} <= {"", Reason.FORM.name, Reason.WEIGHTS_USED.name}
    assert user == "unused" or [r.decision for r in report] == ["triangle"]
    check_same(after(x.clone()), before(x.clone()))


# Transforms -----------------------------------------------------------------------------------------------------------


def mapped(layers, x):
    return torch.vmap(lambda y: layers[0](y, y, y), in_dims=1, out_dims=1)(x)


def mapped_twice(layers, x):
    return torch.vmap(torch.vmap(lambda y: layers[0](y[None], y[None], y[None])[0]))(x)


def gradients_of_samples(layers, x):
    return torch.vmap(torch.func.grad(lambda y: layers[0](y, y, y).sum()))(x)


def gradient_of_mapped(layers, x):
    return torch.func.grad(lambda y: torch.vmap(lambda z: layers[0](z, z, z))(y).sum())(x)


def of_what_is_not_mapped(layers, x):
    return torch.vmap(lambda y: y + layers[0](x[0], x[0], x[0]))(x)


@pytest.mark.parametrize("form", [sdpa, written_out])
@pytest.mark.parametrize(
    ("program", "around"),
    [
        (mapped, "vmap"),
        (mapped_twice, "vmap in vmap"),
        (gradients_of_samples, "grad in vmap"),
        (gradient_of_mapped, "vmap in grad"),
        (of_what_is_not_mapped, "vmap"),
    ],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_refused(program, around, form):
    model, x = Model(program, form), torch.randn(2, B, H, N, D)
    got, found = in_dynamo(model, x, config([0]))
    assert [(r.reason, r.detail) for r in found] == [(Reason.UNDER_TRANSFORM.name, around)]
    torch.testing.assert_close(got, model(x), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_beside_a_transform():
    def program(layers, x):
        x = torch.vmap(lambda y: y * 2)(x)
        return torch.vmap(lambda y: y + 1)(layers[0](x, x, x))

    x = torch.randn(B, H, N, D)
    got, found = in_dynamo(Model(program, sdpa), x, config([0]))
    assert [r.decision for r in found] == ["triangle"]
    right = oracle(x * 2, x * 2, x * 2, None, *config([0]).geometry.counts, SCALE)[0] + 1
    torch.testing.assert_close(got.double(), right, atol=5e-5, rtol=0)


@pytest.mark.parametrize("form", [sdpa, written_out])
@pytest.mark.parametrize("inner", ["grad", "vjp"])
def test_a_gradient_goes_through(form, inner):
    def program(layers, x):
        if inner == "grad":
            return torch.func.grad(lambda y: layers[0](y, y, y).square().sum())(x)
        out, pull = torch.func.vjp(lambda y: layers[0](y, y, y), x)
        return pull(2 * out)[0]

    x = torch.randn(B, H, N, D)
    got, found = in_dynamo(Model(program, form), x, config([0]))
    assert [r.decision for r in found] == ["triangle"]
    right = x.double().requires_grad_()
    oracle(right, right, right, None, *config([0]).geometry.counts, SCALE)[0].square().sum().backward()
    torch.testing.assert_close(got.double(), right.grad, atol=2e-4, rtol=0)


def test_a_gradient_of_a_gradient_is_refused():
    def program(layers, x):
        first = torch.func.grad(lambda y: layers[0](y, y, y).sum())
        return torch.func.grad(lambda y: first(y).sum())(x)

    x = torch.randn(1, 1, 40, 4)
    with torch.no_grad():
        report = explain(Model(program, written_out), x, config=config([0]))
    assert [r.reason for r in report] == [Reason.UNDER_TRANSFORM.name]
