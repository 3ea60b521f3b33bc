"""The ``ascend`` lowering: its numbers, through CPU kernels that take what the operators' manual allows and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.ascend import npu_ops
from tests.support.ascend.ge import attention as manual
from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.oracle import oracle, tolerance
from tests.support.problems import CASES, check
from tmx_compile.lowering.ascend import Ascend, calls, eager
from tmx_compile.lowering.ascend import lowering as ascend
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Rejected

ASCEND = Ascend()
REFUSED = {name for name, case in CASES.items() if case.reach is not None} | {"one row, many keys"}


@pytest.fixture(autouse=True)
def _operators():
    npu_ops.install()
    npu_ops.called.clear()


@pytest.fixture
def float32(monkeypatch):
    """float32 all the way through, which the operators do not take: so that the arithmetic shows."""
    for module in (ascend, manual):
        monkeypatch.setattr(module, "DTYPES", (*module.DTYPES, torch.float32))


def graph_of(case):
    backend = LoweringBackend(ASCEND, inductor=False)
    return torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False)


@pytest.mark.parametrize("name", sorted(set(CASES) - REFUSED))
def test_arithmetic(name, float32):
    case = replace(CASES[name], dtype=torch.float32)
    check(case, graph_of(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(set(CASES) - REFUSED))
def test_numbers_in_half_precision(name, dtype):
    case = replace(CASES[name], dtype=dtype)
    check(case, graph_of(case))


class EveryLength(Ascend):
    """As in a graph for ``.air``: it serves every length, and nothing checks a guard."""

    def __init__(self, dense_up_to):
        self.dense_up_to = dense_up_to

    def supports(self, call):
        return super().supports(replace(call, dense_up_to=self.dense_up_to))

    def emit(self, write, call, operands):
        return super().emit(write, replace(call, dense_up_to=self.dense_up_to), operands)


class OneLength(OneCall):
    """The operator, with one length for queries and keys."""

    def forward(self, q, k, v, key_mask):
        torch._check(q.shape[2] == k.shape[2])
        return super().forward(q, k, v, key_mask)


class Graph:
    """A graph of one call for every length, run as it stands: no guard is evaluated."""

    def __init__(self, lowering, case):
        self.backend = LoweringBackend(lowering, inductor=False)
        self.graphs = []

        def keep(gm, inputs):
            self.graphs.append(self.backend(gm, inputs))
            self.kinds = [type(x) for x in inputs]
            return self.graphs[-1]

        *qkv, key_mask = case.tensors()
        for x, dim in ((qkv[0], 2), (qkv[1], 2), (qkv[2], 2), (key_mask, 1)):
            if x is not None:
                torch._dynamo.mark_dynamic(x, dim)
        with torch.no_grad():
            torch.compile(OneLength(*case.one_call), backend=keep)(*qkv, key_mask)

    def __call__(self, q, k, v, key_mask):
        tensors = iter([x for x in (q, k, v, key_mask) if x is not None])
        inputs = [q.shape[2] if kind in (int, torch.SymInt) else next(tensors) for kind in self.kinds]
        with torch.no_grad():
            return self.graphs[0](*inputs)[0]


GEOMETRIES = [(4, 32, 16), (1, 0, 1), (0, 0, 0), (0, 5, 3), (3, 0, 0), (7, 20, 50)]
EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 17, 33, 36, 37, 38, 52, 53, 54, 59, 60, 61, 75, 77, 78, 79, 128, 200)


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("dense_up_to", [0, 60])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_graph_without_guards_is_right_for_every_length(geometry, dense_up_to, valid, float32):
    def case(n):
        # An empty sequence, full ones, one key alone.
        ranges = ((n // 3, n), (0, n - n // 4), (0, n), (n - 1, n), (0, 0)) if valid else None
        shown = (0, 0, 2**31 - 1) if n <= dense_up_to else geometry
        size = dict(batch=5 if valid else 1, heads=4, kv_heads=2, valid=ranges, dtype=torch.float32, holes=valid)
        return Case(n, n, *geometry, **size), shown

    graph = Graph(EveryLength(dense_up_to), case(150)[0])
    for n in EDGES:
        problem, shown = case(n)
        *qkv, key_mask = problem.tensors()
        out = graph(*qkv, key_mask)
        want, _ = oracle(*qkv, key_mask, *shown, problem.scale)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_one_compile_serves_every_length(geometry, valid, float32):
    backend = LoweringBackend(ASCEND, inductor=False)
    compiled = torch.compile(OneCall(geometry, 0.25), backend=backend)
    for n in (150, *EDGES[1:]):
        ranges = ((n // 3, n), (0, n - n // 4)) if valid else None
        case = Case(n, n, *geometry, batch=2, heads=4, kv_heads=2, valid=ranges, dtype=torch.float32)
        check(case, compiled, dynamic=True)
    assert backend.compiles == 1


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
def test_dense_layers_of_every_length(valid, float32):
    geometry = (0, 0, 2**31 - 1)
    graphs = {}
    for dense_up_to in (None, 0, 60):
        lowering = ASCEND if dense_up_to is None else EveryLength(dense_up_to)
        for n in (150, *EDGES[dense_up_to is None :]):
            ranges = ((n // 3, n), (0, n - n // 4)) if valid else None
            case = Case(n, n, *geometry, batch=2, valid=ranges, dtype=torch.float32)
            graph = graphs.setdefault(dense_up_to, None) or Graph(lowering, case)
            graphs[dense_up_to] = graph
            *qkv, key_mask = case.tensors()
            want, _ = oracle(*qkv, key_mask, *case.arguments)
            torch.testing.assert_close(graph(*qkv, key_mask).double(), want, atol=2e-5, rtol=0)


sizes = st.integers(0, 40)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(float32, data):
    """Any geometry, padding and number of cached keys, eagerly: what the operator's kernel for NPU tensors does."""
    q_len = data.draw(st.integers(1, 60), "q_len")
    kv_len = q_len + data.draw(st.integers(0, 30), "before")
    geometry = tuple(data.draw(sizes, name) for name in ("sink", "window", "last"))
    valid = None
    if data.draw(st.booleans(), "padded"):
        cuts = [sorted(data.draw(st.tuples(st.integers(0, kv_len), st.integers(0, kv_len)))) for _ in range(2)]
        valid = tuple(map(tuple, cuts))
    heads = data.draw(st.sampled_from([(2, 1), (4, 4), (6, 2)]), "heads")
    dims = data.draw(st.sampled_from([(16, 16), (20, 20), (32, 16), (16, 32)]), "dims")
    case = Case(
        q_len, kv_len, *geometry, batch=2, heads=heads[0], kv_heads=heads[1], dim=dims[0], v_dim=dims[1], valid=valid,
        holes=data.draw(st.booleans(), "holes"), strided=data.draw(st.booleans(), "strided"),
    )  # fmt: skip
    *qkv, key_mask = case.tensors()
    out, lse = eager.forward(*qkv, key_mask, *case.arguments)
    want, want_lse = oracle(*qkv, key_mask, *case.arguments)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=0)


def test_eager_calls_are_the_fused_ones():
    """At 300 rows: a head of 37, a band over all rows and all of them against 4 sinks, a merge, 16 last rows."""
    case = Case(300, 300, 4, 32, 16, heads=4, kv_heads=2, dtype=torch.float16)
    eager.forward(*case.tensors(), *case.arguments)
    assert sorted(npu_ops.called) == [
        ("FIA", (1, 4, 16, 16), (1, 2, 300, 16), 3),
        ("FIA", (1, 4, 37, 16), (1, 2, 37, 16), 3),
        ("FIA", (1, 4, 300, 16), (1, 2, 4, 16), 0),
        ("FIA", (1, 4, 300, 16), (1, 2, 300, 16), 4),
        ("Update", (1200, 16), (), 1),
    ]


@pytest.mark.parametrize("change", [dict(reach=9), dict(dtype=torch.float32), dict(documents=True)], ids=str)
def test_eager_takes_what_the_fused_calls_cannot_in_plain_pytorch(change):
    case = Case(64, 64, 4, 8, 6, dtype=change.pop("dtype", torch.bfloat16), **change)
    *qkv, key_mask = case.tensors()
    out, _ = eager.forward(*qkv, key_mask, *case.arguments)
    want, _ = oracle(*qkv, key_mask, *case.arguments)
    torch.testing.assert_close(out.double(), want, atol=tolerance(case.dtype), rtol=0)
    assert npu_ops.called == []


def test_the_operator_has_the_kernel_for_npu_tensors():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tmx::triangle_attention", "PrivateUse1")
    q, k = torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 8, 8)
    with pytest.raises(ValueError, match="key"):
        eager.forward(q, k, k, None, 1, 1, 1, 0.25)


REFUSALS = {
    "float32": (dict(dtype=torch.float32), "the fused operator takes float16 and bfloat16, not float32"),
    "training": (dict(needs_grad=True), "the fused operator is for inference"),
    "documents": (dict(key_mask=torch.int64), "packed documents"),
    "reach": (dict(reach=20), "a sliding window of the layer's own"),
    "scale": (dict(scale=None), "a scale that is known only when the graph runs"),
    "empty": (dict(batch=0), "an empty tensor"),
    "head dim": (dict(dim=528), "head dim 528: at most 512"),
    "padded head dim": (dict(dim=512, key_mask=torch.bool), "head dim 512: at most 512, with the columns for the key"),
    "group": (dict(heads=130, kv_heads=2), "130 heads for 2 key heads: at most 64 for one"),
    "heads": (dict(heads=320, kv_heads=320), "320 heads: at most 256"),
    "rows": (dict(n=20 * 2**20 + 1, kv_heads=1), f"{20 * 2**20 + 1} rows: at most"),
    "padding with a strange scale": (dict(scale=1e-9, key_mask=torch.bool), "padding with scale=1e-09"),
    "one row": (dict(n=1, kv_len=300, last=0), "one row that is no last row"),
    "long window, padded": (dict(n=99999, window=70000, key_mask=torch.bool), "sink + window of 70005 rows"),
    "long last, padded": (dict(n=99999, last=40000, key_mask=torch.bool), "last of 40000 rows"),
    "every length with a cache": (dict(n=64, kv_len=70, dense_up_to=0), "needs as many rows as keys"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_have_reasons(name):
    changes, reason = REFUSALS[name]
    plain = dict(batch=1, heads=2, kv_heads=1, n=300, dim=16, dtype=torch.float16, sink=4, window=4, last=4, scale=0.25)
    given = plain | dict(needs_grad=False, key_mask=None, reach=None, dense_up_to=None, kv_len=None) | changes
    batch, n, kv_len = given["batch"], given["n"], given["kv_len"] or given["n"]

    def make(heads, rows):
        return torch.empty(batch, heads, rows, given["dim"], dtype=given["dtype"], device="meta")

    kind = given["key_mask"]
    mask = None if kind is None else torch.empty(batch, kv_len, dtype=kind, device="meta")
    query, key = make(given["heads"], n), make(given["kv_heads"], kv_len)
    geometry = Geometry(*(given[x] for x in ("sink", "window", "last", "reach")))
    rest = (given[x] for x in ("scale", "needs_grad", "dense_up_to"))
    answer = ASCEND.supports(AttentionCall(query, key, key, mask, geometry, *rest))
    assert isinstance(answer, Rejected)
    assert reason in answer.detail


def test_without_torch_npu_it_refuses(monkeypatch):
    monkeypatch.setattr(ascend, "missing", lambda: calls.missing_of(object()))
    case = Case(64, 64, 4, 8, 6, dtype=torch.float16)
    answer = ASCEND.supports(AttentionCall(*case.tensors(), case.mask, case.scale, False))
    assert isinstance(answer, Rejected)
    assert "pip install 'tmx-compile[npu]'" in answer.detail


def test_the_mask_is_made_once_for_all_layers():
    """Layers of two kinds, dense and sparse: one compressed mask in the graph."""

    class Both(torch.nn.Module):
        def forward(self, q, k, v):
            for geometry in ((4, 32, 16), (0, 0, 2**31 - 1), (4, 32, 16), (1, 8, 2)):
                q = torch.ops.tmx.triangle_attention(q, k, v, None, *geometry, 0.25)[0]
            return q

    backend = LoweringBackend(ASCEND, inductor=False)
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return backend(gm, inputs)

    *qkv, _ = Case(100, 100, 4, 32, 16, dtype=torch.float16).tensors()
    for x in qkv:
        torch._dynamo.mark_dynamic(x, 2)
    with torch.no_grad():
        torch.compile(Both(), backend=keep)(*qkv)
    masks = [n for n in graphs[0].graph.nodes if getattr(n.meta.get("example_value"), "shape", ()) == (2048, 2048)]
    assert len(masks) == 1
