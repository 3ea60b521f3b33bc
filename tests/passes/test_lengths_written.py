"""Lengths that a mask computes: ``max(0, n - w)``, ``n // k``, ``n % k``; and symbols that no input has as they are."""

import operator

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.support.oracle import under_mask
from tmx_compile import Report, TriangleMixConfig, rewrite, tmx_backend
from tmx_compile.graph.nodes import value_of
from tmx_compile.proof.expressions import Lengths, Unwritable
from tmx_compile.testing import captured_graphs

# A window wider than any prompt here: the result is that of dense attention.
CONFIG = TriangleMixConfig(triangle_layer_indices=list(range(12)), sliding_window_size=4000, min_seq_len=64)
LENGTHS = (200, 333, 470)


class Layer(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x, keys):
        mask = self.mask(x.shape[2], torch.arange(x.shape[2])[:, None], torch.arange(keys.shape[2])[None])
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)


class Model(nn.Module):
    """A layer for each mask, all of the same operands, so that one compilation tells about all of them."""

    def __init__(self, masks):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, masks))

    def forward(self, x, keys):
        return [layer(x, keys) for layer in self.layers]


PADDING = {
    "max(0, n - w)": lambda n, row, key: (key <= row) & (key >= max(0, n - 300)),
    "n // k": lambda n, row, key: (key <= row) & (key >= n // 3),
    "ceil(n / k)": lambda n, row, key: (key <= row) & (key >= -(-n // 7)),
    "n % k": lambda n, row, key: (key <= row) & (key >= n % 7),
    "sym_min": lambda n, row, key: (key <= row) & (key >= torch.sym_min(n // 2, 100)),
    "sym_max": lambda n, row, key: (key <= row) & (key >= torch.sym_max(n - 400, n % 5)),
    "behind the keys": lambda n, row, key: (key <= row) & (key < max(n - n % 16, 150)),
    "n * n": lambda n, row, key: (key <= row) & (key * n >= n * n // 4 - key),
    "int(n * 0.3)": lambda n, row, key: (key <= row) & (key >= int(n * 0.3)),
    "sqrt": lambda n, row, key: (key <= row) & (key >= int(n**0.5)),
    "a hole": lambda n, row, key: (key <= row) & (key != n // 2),
    "several": lambda n, row, key: (key <= row) & (key >= max(n % 16, min(n // 9, 20)) + n // 50),
}


def check(masks, report, model, x, keys):
    with torch.no_grad():
        results = model(x, keys)
    for name, result in zip(masks, results, strict=True):
        mask = masks[name](x.shape[2], torch.arange(x.shape[2])[:, None], torch.arange(keys.shape[2])[None])
        assert (result - under_mask(x, keys, mask)).abs().max() < 2e-5, name
    assert report.graphs == 1


def run_padding(names):
    masks = {name: PADDING[name] for name in names}
    report = Report()
    model = torch.compile(Model(masks.values()), backend=tmx_backend(CONFIG, report=report, lowering="blocked"))
    for n in LENGTHS:
        x = torch.randn(1, 2, n, 16)
        torch._dynamo.mark_dynamic(x, 2)
        check(masks, report, model, x, x)
    # A product of lengths with a key is no affine function of the key: it may stay dense, it must not stop.
    assert {name for name, site in zip(masks, report, strict=True) if site.decision != "triangle"} <= {"n * n"}


def test_padding_from_a_computed_length(eager):
    run_padding(PADDING)


def test_padding_from_a_computed_length_through_inductor():
    run_padding(["several", "int(n * 0.3)", "a hole"])


OFFSETS = {
    "n // k": lambda n: n // 2,
    "n % k": lambda n: n % 16,
    "ceil(n / k)": lambda n: -(-n // 16),
    "sym_min": lambda n: torch.sym_min(n // 3, 50),
    "int(n * 0.5)": lambda n: int(n * 0.5),
}


def run_offsets(names, lowering):
    masks = {name: lambda n, row, key, first=OFFSETS[name]: key <= row + first(n) for name in names}
    report = Report()
    model = torch.compile(Model(masks.values()), backend=tmx_backend(CONFIG, report=report, lowering=lowering))
    for n in LENGTHS:
        x, keys = torch.randn(1, 2, n, 16), torch.randn(1, 2, 1000, 16)
        torch._dynamo.mark_dynamic(x, 2, min=129, max=500)
        check(masks, report, model, x, keys)
    assert {site.decision for site in report} == {"triangle"}


@pytest.mark.parametrize("lowering", ["operator", "blocked"])
def test_rows_that_start_at_a_computed_length(lowering, eager):
    run_offsets(["n // k", "ceil(n / k)", "sym_min", "int(n * 0.5)"], lowering)


def test_rows_that_start_at_a_computed_length_through_inductor():
    # Integer divisions of a symbolic length, in the block plan of FlexAttention too.
    run_offsets(["n // k"], "flex")


class Paired(nn.Module):
    """Tokens that lie in pairs (2n) with a head of one more (2n + 1): no input has the length n itself."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.layers = nn.ModuleList([Layer(lambda n, row, key: (key <= row) & (key >= n % 5))])

    def forward(self, packed):
        x = packed[:, self.extra :].reshape(1, -1, 2, 16).transpose(1, 2)
        return self.layers[0](x, x)


@pytest.mark.parametrize("extra", [0, 1])
def test_a_length_that_only_an_expression_carries(extra):
    model, half = Paired(extra), Dim("half", min=65, max=4000)
    example = torch.randn(1, 400 + extra, 16)
    with torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({1: 2 * half + extra},))
        sparse, report = rewrite(program, CONFIG, strict=True)
        assert [site.decision for site in report] == ["triangle"]
        for n in (231, 600):
            packed = torch.randn(1, 2 * n + extra, 16)
            x = packed[:, extra:].reshape(1, n, 2, 16).transpose(1, 2)
            key = torch.arange(n)
            mask = (key[None] <= key[:, None]) & (key >= n % 5)
            assert (sparse.module()(packed) - under_mask(x, x, mask)).abs().max() < 2e-5


def test_what_a_graph_tells_and_what_it_does_not():
    def sizes(x):
        return x.reshape(2, -1) * (x.shape[0] // 2)

    x = torch.randn(60)
    torch._dynamo.mark_dynamic(x, 0)
    (gm,) = captured_graphs(sizes, x)
    (given,) = [
        node for node in gm.graph.nodes if isinstance(value_of(node), torch.Tensor) and node.op == "placeholder"
    ]
    symbol = value_of(given).shape[0].node.expr
    lengths, end = Lengths(gm.graph), gm.graph.output_node()
    written = []

    def call(function, *arguments):
        written.append(function)
        return function(*(value_of(x) if isinstance(x, torch.fx.Node) else x for x in arguments))

    from torch.utils._sympy.functions import FloorDiv, Max, Mod

    for expr in (symbol - 7, Max(3, symbol - 20), Mod(symbol, 7), FloorDiv(symbol, 3) * symbol, symbol**2 + 1):
        assert lengths.write(expr, end, call).node.expr == expr
    assert lengths.write(12, end, call) == 12
    assert operator.floordiv in written
    assert torch.sym_max in written
    for unknown in (sympy.Symbol("u7", integer=True), sympy.sin(symbol), symbol ** sympy.Rational(1, 2), symbol**-1):
        with pytest.raises(Unwritable):
            lengths.write(unknown, end, call)
