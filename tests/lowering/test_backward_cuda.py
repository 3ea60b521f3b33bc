"""The backward kernels on a real NVIDIA GPU: the conformance problems, up to 8,192 tokens, and what training does.

On a GPU: ``python -m pytest tests/lowering/test_backward_cuda.py -n 8``.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.gradients import reference, worst_errors
from tests.support.problems import CASES
from tmx_compile.lowering.table import TRITON
from tmx_compile.lowering.triton.lowering import extents

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
# Of the largest number in a gradient. The weights and their gradients are rounded to the inputs' dtype.
ERROR = {f32: 1e-3, f16: 5e-3, bf16: 4e-2}


def arguments(case, qkv, key_mask):
    """Those of the kernels' operators."""
    extent = None if key_mask is None else extents(key_mask, case.kv_len, case.last)
    return (*qkv, key_mask, extent, *case.arguments)


def gradients(case, tensors, grad_out, grad_lse=None):
    """By the operator that keeps the log-sum-exp."""
    *qkv, key_mask = tensors
    out, lse = torch.ops.tmx.triangle_attention_triton_training(*arguments(case, qkv, key_mask))
    if grad_lse is None:
        return torch.autograd.grad(out, qkv, grad_out)
    return torch.autograd.grad((out, lse), qkv, (grad_out, grad_lse))


def check(case, with_lse=True):
    tensors = case.tensors(requires_grad=True, device="cuda")
    v_dim = case.v_dim or case.dim
    grad_out = torch.randn(case.batch, case.q_len, case.heads, v_dim, dtype=case.dtype, device="cuda").transpose(1, 2)
    grad_lse = torch.randn(case.batch, case.heads, case.q_len, device="cuda") if with_lse else None
    got = gradients(case, tensors, grad_out, grad_lse)
    want = reference(case, tensors, grad_out, grad_lse, f32)
    assert all(x.isfinite().all() for x in got)
    assert max(worst_errors(got, want)) < ERROR[case.dtype]
    # Fewer digits are lost in all of a gradient than in its worst number.
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.float() - theirs).norm() < ERROR[case.dtype] / 2 * theirs.norm() + 1e-3


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_problem(name, dtype):
    check(replace(CASES[name], dtype=dtype))


DIMS = {"16": (16, None), "33": (33, None), "64": (64, None), "80": (80, None), "128": (128, None), "192": (192, 128),
        "256": (256, None), "96 and 40": (96, 40), "40 and 256": (40, 256)}  # fmt: skip


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
def test_head_dims(dims, dtype):
    dim, v_dim = dims
    check(Case(700, 700, 8, 256, 32, heads=8, kv_heads=2, dim=dim, v_dim=v_dim, dtype=dtype))
    check(Case(300, 400, 4, 32, 20, heads=4, kv_heads=4, dim=dim, v_dim=v_dim, dtype=dtype, valid=((9, 390),)))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1), (10, 2), (14, 2), (32, 1), (64, 1)], ids=str)
def test_groups_of_any_size(heads, kv_heads):
    check(Case(900, 900, 20, 100, 64, heads=heads, kv_heads=kv_heads, dim=64, dtype=bf16))


@pytest.mark.parametrize("dtype", [f16, bf16], ids=str)
@pytest.mark.parametrize("geometry", [(4, 32, 64), (8, 512, 128), (64, 1024, 128), (500, 100, 0)], ids=str)
@pytest.mark.parametrize("n", [2048, 4099, 8192])
def test_long_sequences(n, geometry, dtype):
    check(Case(n, n, *geometry, heads=8, kv_heads=2, dim=128, dtype=dtype), with_lse=False)


@pytest.mark.parametrize("reach", [None, 700])
def test_long_sequences_with_padding(reach):
    valid = ((0, 4000), (1000, 4000), (5, 2500))
    case = Case(3500, 4000, 8, 256, 128, batch=3, heads=8, kv_heads=2, dim=64, dtype=bf16, valid=valid, reach=reach)
    check(case, with_lse=False)
    check(replace(case, holes=True), with_lse=False)


@pytest.mark.parametrize("geometry", [(4, 32, 64), (8, 512, 128)], ids=str)
def test_two_runs_give_the_same_bits(geometry):
    case = Case(8192, 8192, *geometry, heads=32, kv_heads=8, dim=128, dtype=bf16)
    tensors = case.tensors(requires_grad=True, device="cuda")
    grad_out = torch.randn_like(tensors[0])
    first = gradients(case, tensors, grad_out)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(case, tensors, grad_out), strict=True))


@pytest.mark.parametrize("name", ["prime length", "padding on both sides", "a window of the layer's own"])
def test_opcheck(name):
    case = replace(CASES[name], dtype=f16)
    *qkv, key_mask = case.tensors(requires_grad=True, device="cuda")
    for operator in (torch.ops.tmx.triangle_attention_triton_training, torch.ops.tmx.triangle_attention_triton):
        results = torch.library.opcheck(operator, arguments(case, qkv, key_mask), atol=2e-2, rtol=2e-2)
        assert set(results.values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """A projection, the operator, and an elementwise operation: what a compiler may fuse lies around it."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.case = case
        self.project = torch.nn.Linear(64, (case.heads + 2 * case.kv_heads) * case.dim, device="cuda", dtype=case.dtype)

    def forward(self, x):
        heads, kv_heads = self.case.heads, self.case.kv_heads
        both = self.project(x).unflatten(2, (-1, self.case.dim)).transpose(1, 2)
        q, k, v = both.split((heads, kv_heads, kv_heads), 1)
        out = torch.ops.tmx.triangle_attention(q, k, v, None, *self.case.arguments)[0]
        return torch.tanh(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("way", ["checkpoint", "checkpoint in the graph"])
def test_checkpointing(way):
    """What is computed again gives the same gradients, bit by bit."""
    case = Case(600, 600, 4, 100, 64, heads=4, kv_heads=2, dim=64, dtype=bf16)
    layer = Layer(case)
    compiled = torch.compile(layer, backend=LoweringBackend(TRITON, inductor=True), dynamic=False)
    x = torch.randn(1, 600, 64, device="cuda", dtype=bf16, requires_grad=True)
    parameters = (x, *layer.parameters())
    out = compiled(x)
    weight = torch.randn_like(out)
    want = torch.autograd.grad(out, parameters, weight)
    if way == "checkpoint in the graph":

        def inside(x):
            return checkpoint(layer, x, use_reentrant=False)

        torch._dynamo.reset()
        again = torch.compile(inside, backend="inductor", dynamic=False)(x)
        got = torch.autograd.grad(again, parameters, weight)
        # The operator was not lowered here: other kernels, other last digits.
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=5e-1, rtol=5e-2)
        return
    got = torch.autograd.grad(checkpoint(compiled, x, use_reentrant=False), parameters, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_training_of_several_lengths(dynamic):
    case = Case(512, 512, 4, 60, 30, heads=4, kv_heads=2, dim=32)
    backend = LoweringBackend(TRITON, inductor=True)
    compiled = torch.compile(OneCall(*case.one_call), backend=backend, dynamic=None if dynamic else False)
    lengths = (512, 300, 777) if dynamic else (512,)
    for n in lengths:
        this = replace(case, q_len=n, kv_len=n)
        *qkv, _ = tensors = this.tensors(requires_grad=True, device="cuda")
        for x in qkv if dynamic else ():
            # The length alone: a kernel is for one head dim.
            torch._dynamo.mark_dynamic(x, 2)
        out = compiled(*qkv, None)
        weight = torch.randn_like(out)
        got = torch.autograd.grad(out, qkv, weight)
        assert max(worst_errors(got, reference(this, tensors, weight, dtype=f32))) < ERROR[f32]
    assert backend.compiles == 1


def test_memory_is_linear():
    """At 32,768 tokens scores of one head would take 2 GiB in bfloat16."""
    case = Case(32768, 32768, 8, 512, 128, heads=8, kv_heads=2, dim=128, dtype=bf16)
    *qkv, _ = case.tensors(device="cuda")
    out, lse = torch.ops.tmx.triangle_attention_triton_training(*arguments(case, qkv, None))
    grad_out = torch.randn_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.ops.tmx.triangle_attention_triton_backward(
        grad_out, None, *qkv, None, None, out, lse, *case.arguments
    )
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    # Two numbers a row, and partial sums that the multiprocessors bound.
    assert extra < 64 * 2**20
