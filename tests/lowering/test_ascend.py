"""The ``ascend`` lowering: its numbers, through CPU kernels that take what the operators' manual allows and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import Case, LoweringBackend, OneCall, oracle, tolerance
from test_conformance import CASES

from tests.ascend import npu_ops
from tests.ascend.ge import attention as manual
from tmx_compile.lowering.ascend import Ascend
from tmx_compile.lowering.ascend import lowering as ascend

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
        monkeypatch.setattr(module, "_DTYPES", (*module._DTYPES, torch.float32))


def check(case, compiled, dynamic=()):
    *qkv, key_mask = case.tensors()
    for x, dims in ((qkv[0], (2, 0)), (qkv[1], (2, 0)), (qkv[2], (2, 0)), (key_mask, (1, 0))):
        if x is not None:
            for dim in dims[: len(dynamic)]:
                torch._dynamo.mark_dynamic(x, dim)
    with torch.no_grad():
        out = compiled(*qkv, key_mask)
    want, _ = oracle(*qkv, key_mask, *case.arguments)
    assert out.shape == want.shape
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.double(), want, atol=tolerance(case.dtype), rtol=0)


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
EDGES = (1, 2, 3, 4, 5, 6, 7, 8, 17, 33, 36, 37, 38, 52, 53, 54, 75, 77, 78, 79, 128, 200)


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
        check(case, compiled, dynamic=(2,))
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
