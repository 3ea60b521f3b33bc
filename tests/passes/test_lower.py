"""The lowerer shares what layers have in common, and nothing else."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.graphs import called
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.errors import VerificationError
from tmx_compile.graph.nodes import INSERTED, fake_mode_of, op_name, tensor_of
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import BLOCKED, FLEX, REFERENCE
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import OPERATOR
from tmx_compile.passes.lower import Lowerer
from tmx_compile.testing import captured_graphs, rewritten_graphs

N = 150
LOWERINGS = ["blocked", "flex", "reference"]


def config_for(layers):
    return TriangleMixConfig(
        triangle_layer_indices=range(layers),
        num_sink_tokens=4,
        sliding_window_size=16,
        num_last_tokens=8,
        min_seq_len=100,
    )


class Layer(nn.Module):
    """Attention over what ``choose(x)`` makes of the input, (B, H, N, D) each."""

    def __init__(self, choose):
        super().__init__()
        self.choose = choose

    def forward(self, x, mask=None):
        q, k, v = self.choose(x)
        if mask is None:
            return x + F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        position = torch.arange(x.shape[2])
        allowed = (position[None, :] <= position[:, None]) & mask[:, None, None, :]
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)


class Stack(nn.Module):
    def __init__(self, *choices):
        super().__init__()
        self.layers = nn.ModuleList(Layer(choose) for choose in choices)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


def different(x):
    return x * 0.5, x.roll(1, -1) + 0.25, x.flip(-1) * 0.5


def grouped(x):
    q, k, v = different(x)
    return q, k[:, :2] * 1.0, v[:, :2] * 1.0


def one(x):
    return x, x, x


def key_is_value(x):
    return x.sin(), x, x


def query_is_key(x):
    return x, x, x.sin()


def query_is_value(x):
    return x, x.sin(), x


def narrow(x):
    """Another head dim: a slice in memory of its own, so that only the shape tells."""
    q, k, v = different(x)
    return q[..., :8] * 1.0, k[..., :8] * 1.0, v


def expected(choices, x, mask=None):
    x = x.double()
    for choose in choices:
        q, k, v = choose(x)
        x = x + oracle(q, k, v, mask, *config_for(1).geometry.counts, q.shape[-1] ** -0.5)[0]
    return x


def graph_of(choices, lowering, mask=None, dynamic=False):
    x = torch.randn(2, 4, N, 16)
    inputs = (x,) if mask is None else (x, mask)
    if dynamic:
        for tensor, dim in zip(inputs, (2, 1), strict=False):
            torch._dynamo.mark_dynamic(tensor, dim)
    torch._dynamo.reset()
    with torch.no_grad():
        (gm,) = rewritten_graphs(
            Stack(*choices),
            *inputs,
            config=config_for(len(choices)),
            lowering=lowering,
            strict=True,
            dynamic=None if dynamic else False,
        )
    return gm


def inserted(gm):
    """How often each operation was inserted."""
    return Counter(called(node) for node in gm.graph.nodes if node.meta.get(INSERTED))


# What is made of positions alone, and has to exist once.
SHARED = ("arange", "le", "lt", "ge", "where", "and_", "and", "or", "rshift", "as_strided", "cumsum", "gt")


def padding():
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[0, :40] = False
    return mask


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_masks_and_plans_exist_once(lowering, padded, dynamic):
    single, triple = (
        graph_of([grouped] * layers, lowering, padding() if padded else None, dynamic) for layers in (1, 3)
    )
    before, after = inserted(single), inserted(triple)
    assert before["arange"] > 0
    # A padded result is chosen by a mask, which is work on the layer's own tensors.
    own = {"where"} if padded or lowering == "reference" or dynamic else set()
    for name in SHARED:
        if name not in own:
            assert after[name] == before[name], name
    attention = {"blocked": "scaled_dot_product_attention", "flex": "flex_attention", "reference": "softmax"}[lowering]
    assert after[attention] == 3 * before[attention] > 0
    # Three layers cost three times their own nodes and once the shared ones.
    assert after.total() < 3 * before.total() - 2 * before["arange"]


def test_flex_layers_share_their_mask_graph():
    assert len([n for n in graph_of([grouped] * 3, "flex").graph.nodes if n.op == "get_attr"]) == 2


def run(choices, lowering, mask=None):
    # float64 where the lowering takes it: the errors of one layer are the next one's input.
    exact = lowering != "flex"
    x = torch.randn(2, 4, N, 16, dtype=torch.float64 if exact else torch.float32) * 0.5
    backend = tmx_backend(config_for(len(choices)), lowering=lowering, strict=True)
    with torch.no_grad():
        out = torch.compile(Stack(*choices), backend=backend, dynamic=False)(x, mask)
    assert len(backend.report.triangle()) == len(choices)
    torch.testing.assert_close(out.double(), expected(choices, x, mask), atol=1e-10 if exact else 1e-4, rtol=0)


ALIASED = {
    "one tensor, then three": [one, different],
    "three tensors, then one": [different, one],
    "one, three, one, three": [one, different, one, different],
    "key is value, then three": [key_is_value, different],
    "key is value, then query is key": [key_is_value, query_is_key],
    "query is value, then key is value": [query_is_value, key_is_value, query_is_key, query_is_value],
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ALIASED)
def test_operands_that_are_one_tensor(name, lowering, eager):
    run(ALIASED[name], lowering)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", ["one tensor, then three", "query is value, then key is value"])
def test_operands_that_are_one_tensor_with_padding(name, lowering, eager):
    run(ALIASED[name], lowering, padding())


@pytest.mark.parametrize(
    "choices",
    [[different, grouped], [grouped, different, grouped], [different, narrow], [narrow, grouped, narrow, different]],
    ids=["heads", "heads, alternating", "head dim", "three kinds"],
)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_of_different_shapes_are_not_shared(choices, lowering, eager):
    run(choices, lowering)
    kinds = {choose.__name__: choose for choose in choices}.values()
    alone = [inserted(graph_of([choose], lowering))["arange"] for choose in kinds]
    assert inserted(graph_of(choices, lowering))["arange"] == sum(alone)


def strided(x):
    """The shapes of ``different``, in another memory layout."""
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in different(x))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_layers_of_different_strides(lowering, eager):
    run([different, strided, different], lowering)


class Operators(nn.Module):
    """Bare operators in one graph, each with its own geometry and key mask."""

    def __init__(self, *geometries):
        super().__init__()
        self.geometries = geometries

    def forward(self, x, *masks):
        for index, geometry in enumerate(self.geometries):
            mask = masks[index] if masks else None
            q, k, v = different(x)
            x = x + torch.ops.tmx.triangle_attention(q, k, v, mask, *geometry, 0.25)[0]
        return x


def lower_all(gm, lowering):
    lowerer = Lowerer(gm, fake_mode_of(gm))
    for node in [n for n in gm.graph.nodes if n.target in (OPERATOR, torch.ops.tmx.triangle_attention)]:
        node.target = OPERATOR
        fakes = [None if a is None else tensor_of(a) for a in node.args[:4]]
        lowerer.lower(node, AttentionCall(*fakes, Geometry(*node.args[4:7]), node.args[7], needs_grad=False), lowering)
    gm.graph.lint()
    gm.recompile()


def operators_expected(geometries, x, masks):
    x = x.double()
    for geometry, mask in zip(geometries, masks, strict=True):
        x = x + oracle(*different(x), mask, *geometry, 0.25)[0]
    return x


def lowered_operators(geometries, masks, lowering):
    x, seen = torch.randn(2, 4, N, 16, dtype=torch.float64) * 0.5, []

    def backend(gm, inputs):
        lower_all(gm, lowering)
        seen.append(gm)
        return gm.forward

    inputs = (x,) if masks[0] is None else (x, *masks)
    with torch.no_grad():
        out = torch.compile(Operators(*geometries), backend=backend, dynamic=False)(*inputs)
    torch.testing.assert_close(out, operators_expected(geometries, x, masks), atol=1e-9, rtol=0)
    return seen[0]


@pytest.mark.parametrize("lowering", [BLOCKED, FLEX, REFERENCE], ids=lambda low: low.name)
def test_different_geometries_in_one_graph(lowering):
    lowered_operators([(4, 16, 8), (0, 16, 8), (4, 5, 8), (4, 16, 0), (4, 16, 8)], [None] * 5, lowering)


@pytest.mark.parametrize("lowering", [BLOCKED, FLEX, REFERENCE], ids=lambda low: low.name)
def test_different_key_masks_in_one_graph(lowering):
    """The same shapes and geometry, another padding: the masks must not be taken for one another."""
    left, right = padding(), padding().flip(1)
    lowered_operators([(4, 16, 8)] * 3, [left, right, padding().flip(0)], lowering)


def test_the_result_is_checked():
    class Wrong:
        name = "wrong"

        def emit(self, write, call, operands):
            return operands.query[:, :, 1:]

    (gm,) = captured_graphs(Operators((4, 16, 8)), torch.randn(2, 4, N, 16))
    with pytest.raises(VerificationError, match=r"lowering 'wrong' gave .*the operator gives"):
        lower_all(gm, Wrong())


def test_copies_carry_the_origin_of_their_own_layer():
    gm = graph_of([grouped] * 3, "blocked")
    calls = [
        node for node in gm.graph.nodes if op_name(node) == "scaled_dot_product_attention" and node.meta.get(INSERTED)
    ]
    paths = [str(list(node.meta["nn_module_stack"].values())[-1][0]) for node in calls]
    assert [sum(f"layers.{i}" in path or f"'{i}'" in path for path in paths) for i in range(3)] == [2, 2, 2]
