"""A result has the strides of what it replaces, whichever lowering writes it, so that the same views can be taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import Call
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, explain, rewrite, tmx_backend
from tmx_compile.graph.layout import inverse, memory_order
from tmx_compile.operator import OPERATOR
from tmx_compile.passes import pipeline
from tmx_compile.passes.record import records
from tmx_compile.report import Reason
from tmx_compile.request import INDUCTOR, Request

B, H, N, D = 2, 3, 70, 16
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[0], num_sink_tokens=2, sliding_window_size=9, num_last_tokens=7, min_seq_len=32
)
LOWERINGS = ["auto", "blocked", "flex", "operator", "triton", "reference"]
# The order of (batch, heads, tokens, head_dim) in memory.
LAYOUTS = {"BHND": (0, 1, 2, 3), "BNHD": (0, 2, 1, 3), "HBND": (1, 0, 2, 3), "NDBH": (2, 3, 0, 1), "BHDN": (0, 1, 3, 2)}


def made(layout, n=N, dtype=torch.float32, device="cpu"):
    """Random query, key and value as one tensor (3, B, H, N, D), each with this order in memory."""
    shape, order = (B, H, n, D), LAYOUTS[layout]
    x = torch.randn(3, *(shape[i] for i in order), dtype=dtype, device=device)
    return x.permute(0, *(1 + i for i in inverse(order)))


def written_out(q, k, v):
    scores = (q @ k.transpose(-1, -2) * D**-0.5).masked_fill(~causal(q), float("-inf"))
    return scores.softmax(-1) @ v


def summed(q, k, v):
    """The result has heads after tokens."""
    scores = torch.einsum("bhqd,bhkd->bhqk", q * D**-0.5, k).masked_fill(~causal(q), float("-inf"))
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)


def causal(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


FORMS = {"sdpa": sdpa, "written out": written_out, "summed": summed}


class Model(nn.Module):
    """One layer; the result, and a view of it that needs its layout."""

    def __init__(self, form, order=None):
        super().__init__()
        self.layers = nn.ModuleList([Call(form)])
        self.order = order

    def forward(self, x):
        out = self.layers[0](*x.unbind(0))
        return out, out if self.order is None else out.permute(self.order).view(-1)


def order_of(out):
    return tuple(sorted(range(out.dim()), key=lambda dim: -out.stride(dim)))


class Eager:
    """The pass, and then no compiler: what runs is what the pass wrote."""

    def __init__(self, **options):
        self.options = options
        self.records = []

    def __call__(self, gm, example_inputs):
        plan = pipeline.decide(gm, Request(CONFIG, **self.options), INDUCTOR, example_inputs)
        before = [(site.node.meta["example_value"], site.node) for site in plan.triangle]
        for value, node in before:
            assert memory_order(node) is not None, value.stride()
        done = pipeline.rewrite(plan, gm)
        self.records += records(done.plan, 0)
        for node in done.graph.graph.nodes:
            assert "laid_out" not in str(node.target)
        return done.graph.forward


def check(form, layout, backend, dynamic, dtype=torch.float32, device="cpu"):
    x = made(layout, dtype=dtype, device=device)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 3)
    expected = Model(FORMS[form])(x)[0]
    order = order_of(expected)
    torch._dynamo.reset()
    out, flat = torch.compile(Model(FORMS[form], order), backend=backend)(x)
    assert out.stride() == expected.stride()
    right = oracle(*x.cpu(), None, *CONFIG.geometry.counts, D**-0.5)[0]
    right = right.transpose(1, 2) if form == "summed" else right
    torch.testing.assert_close(out.cpu().double(), right, atol=2e-5, rtol=0)
    torch.testing.assert_close(flat, out.permute(order).reshape(-1), atol=0, rtol=0)
    return backend


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_strides_of_sdpa(lowering, layout, dynamic):
    # Where there is a GPU, its kernels run nowhere else.
    device = "cuda" if lowering == "triton" and torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        backend = check("sdpa", layout, Eager(lowering=lowering), dynamic, device=device)
    assert [(r.decision, lowering in ("auto", r.lowering)) for r in backend.records] == [("triangle", True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["written out", "summed"])
@pytest.mark.parametrize("lowering", ["blocked", "operator", "flex"])
def test_strides_of_attention_written_out(lowering, form, layout):
    with torch.no_grad():
        backend = check(form, layout, Eager(lowering=lowering), dynamic=layout == "BNHD")
    assert [r.decision for r in backend.records] == ["triangle"]


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_strides_of_a_chunk(layout):
    with torch.no_grad():
        check("sdpa", layout, Eager(chunked_prefill=True), dynamic=True)


@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_strides_in_double_precision(layout):
    """SDPA's plain kernel has another layout than its fused one."""
    with torch.no_grad():
        check("sdpa", layout, Eager(), dynamic=True, dtype=torch.float64)


@pytest.mark.parametrize("lowering", ["auto", "flex", "operator"])
def test_the_view_compiles(lowering):
    with torch.no_grad():
        backend = check("sdpa", "BHND", tmx_backend(CONFIG, lowering=lowering), dynamic=True)
    assert [r.decision for r in backend.report] == ["triangle"]


class Masked(nn.Module):
    """Layer 1 stays dense, and loses the mask that both read."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Call(self.attend), Call(self.attend)])

    @staticmethod
    def attend(q, kv, mask):
        return F.scaled_dot_product_attention(q, kv, kv, attn_mask=mask)

    def forward(self, x):
        mask = causal(x)
        y = self.layers[0](x, x, mask)
        return y, self.layers[1](y, x, mask)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_dense_layer_without_its_mask(dynamic):
    backend, x = Eager(), made("BHND")[0].clone()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 2)
    torch._dynamo.reset()
    with torch.no_grad():
        y, z = torch.compile(Masked(), backend=backend)(x)
        eager = Masked()(x)
    assert [r.lowering for r in backend.records] == ["blocked", "sdpa"]
    assert (y.stride(), z.stride()) == (eager[0].stride(), eager[1].stride())
    right = oracle(y, x, x, None, 0, 0, N, D**-0.5)[0]
    torch.testing.assert_close(z.double(), right, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lowering", ["auto", "blocked", "operator"])
@pytest.mark.parametrize("layout", ["BHND", "BNHD"])
def test_strides_in_an_exported_program(layout, lowering):
    x = made(layout)
    expected = Model(sdpa)(x)[0]
    program = torch.export.export(Model(sdpa, order_of(expected)), (x,))
    after, report = rewrite(program, CONFIG, lowering=lowering)
    assert [r.decision for r in report] == ["triangle"]
    out, _ = after.module()(x)
    assert out.stride() == expected.stride()
    torch.testing.assert_close(out.double(), oracle(*x, None, *CONFIG.geometry.counts, D**-0.5)[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_say_what_they_return(layout):
    q, k, v = (x.detach().requires_grad_() for x in made(layout))
    torch.library.opcheck(OPERATOR, (q, k, v, None, 2, 9, 7, D**-0.5))
    documents = torch.ones(B, N, dtype=torch.int64)
    real = OPERATOR(q, k, v, documents, 2, 9, 7, D**-0.5)[0]
    assert real.stride() == OPERATOR(q, k, v, None, 2, 9, 7, D**-0.5)[0].stride()


def test_an_overlapping_result_is_refused(monkeypatch):
    """No kernel of torch gives one; the pass must not depend on it."""
    monkeypatch.setattr("tmx_compile.passes.judge.memory_order", lambda node: None)
    report = explain(Model(sdpa), made("BHND"), config=CONFIG)
    assert [r.reason for r in report] == [Reason.LAYOUT.name]


@pytest.mark.parametrize(
    ("shape", "strides", "order"),
    [
        ((2, 3, 5, 4), (60, 20, 4, 1), (0, 1, 2, 3)),
        ((2, 3, 5, 4), (60, 4, 12, 1), (0, 2, 1, 3)),
        ((2, 3, 5, 4), (4, 8, 24, 1), (2, 1, 0, 3)),
        ((2, 3, 5, 4), (120, 8, 24, 1), (0, 2, 1, 3)),
        ((2, 3, 5, 4), (0, 20, 4, 1), None),
        ((2, 3, 5, 4), (60, 20, 1, 1), None),
        ((1, 3, 5, 4), (7, 4, 12, 1), (0, 2, 1, 3)),
        ((2, 0, 5, 4), (20, 20, 4, 1), (0, 1, 2, 3)),
    ],
)
def test_the_order_in_memory(shape, strides, order):
    node = torch.fx.Graph().placeholder("x")
    node.meta["example_value"] = torch.empty_strided(shape, strides, device="meta")
    assert memory_order(node) == order


def test_gaps_matter_where_the_strides_are_spelt_out():
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["example_value"] = torch.empty_strided((2, 3, 5, 4), (120, 8, 24, 1), device="meta")
    graph.call_function(torch.as_strided, (node, (4,), (1,)))
    assert memory_order(node) is None
