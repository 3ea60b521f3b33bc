"""What two processes check of operators and modules that are split over them; each function runs in both
(support/processes.py)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend, triangle_attention
from tmx_compile.lowering.chunk import CHUNK
from tmx_compile.lowering.triton.lowering import extents
from tmx_compile.lowering.triton.op import TRAINING_OPERATOR, TRITON_OPERATOR

R, BATCH, HEADS, TOKENS = Replicate(), Shard(0), Shard(1), Shard(2)
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=128
)
N, DIM, HEAD_DIM = 200, 64, 16


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(got, want, tolerance):
    torch.testing.assert_close(whole(got).double(), want.double(), rtol=tolerance, atol=tolerance)


# The operators -------------------------------------------------------------------------------------------------------


def operands(heads, kv_heads, dtype=torch.float64, batch=2, tokens=50):
    q, k, v = (torch.randn(batch, h, tokens, 16, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    key_mask = torch.ones(batch, tokens, dtype=torch.bool)
    key_mask[0, :7] = False
    return q, k, v, key_mask


def operator(heads, kv_heads, given, expected, mask=R, with_lse=True):
    """The operator on tensors placed as ``given`` (query, then key and value) gives results placed as ``expected``."""
    *qkv, key_mask = operands(heads, kv_heads)
    key_mask = None if mask is None else key_mask
    grad_out, grad_lse = torch.randn(2, heads, 50, 16, dtype=torch.float64), torch.randn(2, heads, 50)

    def results(qkv, key_mask, attend):
        out, lse = attend(*qkv, key_mask)
        loss = (out * like(grad_out, out)).sum()
        if with_lse:
            loss = loss + torch.where(lse.isinf(), 0.0, lse * like(grad_lse, lse)).sum()
        return out, *torch.autograd.grad(loss, qkv)

    def like(x, other):
        return distribute_tensor(x, other.device_mesh, other.placements) if isinstance(other, DTensor) else x

    placements = (given[0], given[1], given[1])
    split = [distribute_tensor(x, mesh(), [p]).requires_grad_() for x, p in zip(qkv, placements, strict=True)]
    split_mask = None if mask is None else distribute_tensor(key_mask, mesh(), [mask])
    got = results(split, split_mask, lambda *x: triangle_attention(*x, sink=3, window=5, last=6))
    want = results([x.requires_grad_() for x in qkv], key_mask, lambda *x: oracle(*x, 3, 5, 6, 16**-0.5))
    assert [x.placements for x in got] == [(expected,)] * 4
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)


def operator_split():
    operator(4, 2, (HEADS, HEADS), HEADS)
    operator(4, 2, (BATCH, BATCH), BATCH, mask=BATCH)
    operator(4, 2, (BATCH, BATCH), BATCH)
    operator(4, 2, (HEADS, R), HEADS)
    operator(3, 3, (HEADS, HEADS), HEADS)
    operator(4, 2, (HEADS, HEADS), HEADS, mask=None, with_lse=False)


def operator_gathered():
    """What cannot stay split is redistributed: tokens, and key heads that part from their query heads."""
    operator(4, 2, (TOKENS, TOKENS), R)
    operator(9, 3, (HEADS, HEADS), R)
    operator(4, 1, (HEADS, R), R)
    operator(4, 2, (Shard(3), R), R)


def kernels():
    """The Triton kernels' operators and that of chunks, forward and backward, by heads and by batch."""
    q, k, v, key_mask = operands(4, 2, torch.float32, tokens=70)
    args, scale = (3, 5, 6), 16**-0.5
    want = oracle(q, k, v, key_mask, *args, scale)[0]
    extent, first = extents(key_mask, 70, 6), torch.tensor([64, 64])
    for placement in (HEADS, BATCH):
        without_heads = R if placement == HEADS else BATCH
        qkv = [distribute_tensor(x, mesh(), [placement]).requires_grad_() for x in (q, k, v)]
        mask, where, firsts = (distribute_tensor(x, mesh(), [without_heads]) for x in (key_mask, extent, first))
        out = TRITON_OPERATOR(*qkv, mask, where, *args, scale)
        trained, _ = TRAINING_OPERATOR(*qkv, mask, where, *args, scale)
        chunked = CHUNK(*qkv, mask, firsts, *args, scale, None, "auto")
        grads = torch.autograd.grad(trained, qkv, distribute_tensor(torch.ones_like(q), mesh(), [placement]))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(oracle(*leaves, key_mask, *args, scale)[0].sum(), leaves)
        assert {x.placements for x in (out, trained, chunked, *grads)} == {(placement,)}
        for a, b in zip((out, trained, chunked, *grads), (want, want, want, *expected), strict=True):
            close(a, b, 1e-4)


# Modules -------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, heads, kv_heads, attend):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, h * HEAD_DIM, bias=False) for h in (heads, kv_heads, kv_heads))
        self.o = nn.Linear(heads * HEAD_DIM, DIM, bias=False)
        self.attend = attend

    def forward(self, x):
        q, k, v = (each(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.o(self.attend(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))


class Net(nn.Module):
    def __init__(self, attend, heads=4, kv_heads=2):
        super().__init__()
        self.layers = nn.ModuleList(Attention(heads, kv_heads, attend) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def by_operator(q, k, v):
    return triangle_attention(q, k, v, sink=4, window=32, last=16)[0]


def by_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def parallelized(model, local):
    columns = {f"layers.*.{name}": ColwiseParallel(use_local_output=local) for name in "qkv"}
    return parallelize_module(model, mesh(), columns | {"layers.*.o": RowwiseParallel()})


def assert_same(one, many, x):
    """The same output and gradients from one process and from several."""
    results = []
    for model in (one, many):
        out = model(x)
        (out**2).sum().backward()
        results.append([out.detach(), *(whole(p.grad) for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        close(b, a, 2e-4)


def parallel_modules():
    for local in (True, False):
        one = Net(by_operator)
        assert_same(one, parallelized(copy.deepcopy(one), local), torch.randn(2, N, DIM))


def nine_heads():
    """torch says it, in words that change with its version: a view that the processes do not divide."""
    x = torch.randn(2, N, DIM)
    for local, message in ((True, "is invalid for input of size"), (False, "sharded")):
        with pytest.raises(RuntimeError, match=message):
            parallelized(Net(by_operator, 9, 9), local)(x)


def parallel_compiled():
    one = Net(by_sdpa)
    many = parallelized(copy.deepcopy(one), True)
    backends = [tmx_backend(CONFIG, strict=True), tmx_backend(CONFIG, strict=True)]
    one.compile(backend=backends[0])
    many.compile(backend=backends[1])
    assert_same(one, many, torch.randn(2, N, DIM))
    for backend in backends:
        assert [site.layer for site in backend.report.triangle()] == [1, 2], backend.report


CHECKS = {
    each.__name__: each
    for each in (
        operator_split,
        operator_gathered,
        kernels,
        parallel_modules,
        nine_heads,
        parallel_compiled,
    )
}
