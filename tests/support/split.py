"""What processes check of attention over a prompt that is split between them; each function runs in all of four.

Of a smaller group the others sit out. Nothing here needs Transformers before a check of a model runs.
"""

from __future__ import annotations

import datetime
import itertools
import random
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.oracle import oracle, tolerance
from tmx_compile import TriangleMixConfig, TriangleMixError, tmx_backend
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.context_parallel import Ranks
from tmx_compile.lowering.table import Role, Wish, choose
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=32, num_last_tokens=16, min_seq_len=128
)
WORLD = 4
# Those who sit out wait for the others.
LONG = datetime.timedelta(seconds=600)
HEADS = ((8, 2), (4, 4), (9, 3), (6, 1))
# The last four reach past a piece: a window, a number of last rows, both; a layer's own window.
GEOMETRIES = (
    *(Geometry(4, 8, 6), Geometry(0, 5, 3), Geometry(3, 0, 0), Geometry(2, 9, 0), Geometry(0, 0, 4), Geometry(7, 2, 1)),
    *(Geometry(0, 0, ALL_ROWS), Geometry(4, 30, 6), Geometry(4, 8, 30), Geometry(2, 90, 90), Geometry(3, 5, 4, 11)),
)


def mesh_of(size):
    """The first ``size`` processes; every process has to call this."""
    # Not by DeviceMesh, whose groups wait for half an hour.
    group = dist.new_group(list(range(size)), timeout=LONG)
    return DeviceMesh.from_group(group, "cpu") if dist.get_rank() < size else None


def part(x, rank, size, dim):
    return x.chunk(size, dim)[rank]


# The operator --------------------------------------------------------------------------------------------------------


def operator(size):
    mesh = mesh_of(size)
    if dist.get_rank() >= size:
        return
    drawn, ranks = random.Random(size), Ranks.of(mesh)
    for geometry, padded in itertools.product(GEOMETRIES if size > 1 else GEOMETRIES[:1], (False, True)):
        for dtype in (torch.float32, drawn.choice((torch.float64, torch.bfloat16, torch.float16))):
            heads, kv_heads = drawn.choice(HEADS)
            # Drawn alike everywhere: the left padding may end, and the valid keys too, anywhere in any piece.
            torch.manual_seed(drawn.randrange(1 << 30))
            n, batch = size * drawn.choice((17, 20)), drawn.choice((1, 2, 3))
            q, k, v = (torch.randn(batch, h, n, 16).to(dtype) for h in (heads, kv_heads, kv_heads))
            key_mask = None
            if padded:
                start, end = torch.randint(0, n // 2, (batch, 1)), torch.randint(n // 2, n + 1, (batch, 1))
                key_mask = (torch.arange(n) >= start) & (torch.arange(n) < end) & (torch.rand(batch, n) > 0.1)
            whole = [q, k, v, key_mask]
            own = [x if x is None else part(x, ranks.rank, size, 1 if x is key_mask else 2) for x in whole]
            call = AttentionCall(*own, geometry, 0.3, needs_grad=False)
            lowering = choose("cpu", Role.PROMPT, call, Wish(ranks=ranks))
            want, _ = oracle(q, k, v, key_mask, *geometry.counts, 0.3, geometry.reach)
            error = (immediate(lowering, call) - part(want, ranks.rank, size, 2)).abs().max().item()
            # The log-sum-exp that joins the parts is float32.
            assert error < max(tolerance(dtype), 1e-5), (size, heads, kv_heads, geometry, dtype, key_mask, error)


def operator_of_one():
    operator(1)


def operator_of_two():
    operator(2)


def operator_of_three():
    operator(3)


def operator_of_four():
    operator(4)


def heads_that_do_not_suffice():
    """Dense layers of fewer heads than processes, and of eight heads on three: some have less to do, all are right."""
    for size, heads, kv_heads in ((4, 2, 1), (4, 3, 3), (3, 8, 2), (3, 8, 8)):
        mesh = mesh_of(size)
        if dist.get_rank() >= size:
            continue
        rank, geometry = mesh.get_local_rank(), Geometry(0, 0, ALL_ROWS)
        torch.manual_seed(heads)
        whole = [torch.randn(2, h, 13 * size, 16, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]
        call = AttentionCall(*(part(x, rank, size, 2) for x in whole), None, geometry, 0.3, needs_grad=False)
        out = immediate(choose("cpu", Role.MASKLESS, call, Wish(ranks=Ranks.of(mesh))), call)
        want, _ = oracle(*whole, None, *geometry.counts, 0.3)
        torch.testing.assert_close(out, part(want, rank, size, 2), rtol=1e-10, atol=1e-10)


# Models --------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, heads=4, kv_heads=2, dim=16, hidden=64):
        super().__init__()
        self.dim = dim
        self.q, self.k, self.v = (nn.Linear(hidden, h * dim, bias=False) for h in (heads, kv_heads, kv_heads))
        self.o = nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x):
        q, k, v = (each(x).view(*x.shape[:2], -1, self.dim).transpose(1, 2) for each in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(out.transpose(1, 2).reshape(*x.shape[:2], -1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@contextmanager
def as_written():
    """Nothing is compiled: the rewritten graphs run as they are, and are listed."""
    graphs = []

    def keep(gm, inputs, *args, **kwargs):
        graphs.append(gm)
        return lambda *inputs: gm.forward(*inputs)

    with mock.patch("torch._inductor.compile_fx.compile_fx", keep), torch.no_grad():
        yield graphs


def llama(size):
    """Prompts of many lengths, with padding and without, above and below min_seq_len: two graphs for each."""
    from tests.support.models import masked_oracle
    from tests.support.models import tiny_llama as made

    mesh = mesh_of(size)
    if dist.get_rank() >= size:
        return
    plain, model, rank = made(), made(), mesh.get_local_rank()
    model.load_state_dict(plain.state_dict())
    backend = tmx_backend(CONFIG, context_parallel=mesh, strict=True)
    model.compile(backend=backend, dynamic=True)
    with as_written() as graphs:
        for n in (240, 300, 120, 360, 60):
            ids = torch.randint(0, 128, (2, n))
            sparse = CONFIG if n > CONFIG.min_seq_len else TriangleMixConfig(num_triangle_layers=0)
            mask = torch.ones_like(ids)
            mask[0, : n // 3 + 1] = 0
            mask[1, -2:] = 0
            own = dict(input_ids=part(ids, rank, size, 1), position_ids=part(torch.arange(n)[None], rank, size, 1))
            logits = model(**own, use_cache=True).logits
            want = masked_oracle(plain, sparse, ids)
            torch.testing.assert_close(logits.double(), part(want, rank, size, 1), rtol=2e-4, atol=2e-4)
            logits = model(**own, attention_mask=part(mask, rank, size, 1)).logits
            want, valid = masked_oracle(plain, sparse, ids, mask), part(mask, rank, size, 1).bool()
            torch.testing.assert_close(logits.double()[valid], part(want, rank, size, 1)[valid], rtol=2e-4, atol=2e-4)
        assert len(graphs) == 4, len(graphs)
    assert {site.layer for site in backend.report.triangle()} == {1, 2}


def llama_of_two():
    llama(2)


def llama_of_three():
    llama(3)


def tensor_parallel():
    """Heads over two processes, the prompt over two."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    plain = Net()
    many = Net()
    many.load_state_dict(plain.state_dict())
    columns = {f"layers.*.{name}": ColwiseParallel() for name in "qkv"}
    many = parallelize_module(many, mesh["tensor"], columns | {"layers.*.o": RowwiseParallel()})
    x, rank = torch.randn(2, 200, 64), mesh["context"].get_local_rank()
    plain.compile(backend=tmx_backend(CONFIG))
    many.compile(backend=tmx_backend(CONFIG, context_parallel=mesh["context"], strict=True))
    with as_written():
        torch.testing.assert_close(many(part(x, rank, 2, 1)), part(plain(x), rank, 2, 1), rtol=1e-5, atol=1e-5)


def inductor():
    """Compiled for real, on the first two: every process has its own graph, and they meet in the same order."""
    mesh = mesh_of(2)
    if dist.get_rank() >= 2:
        return
    plain, rank = Net(), mesh.get_local_rank()
    x = torch.randn(1, 200, 64)
    many = torch.compile(plain, backend=tmx_backend(CONFIG, context_parallel=mesh, strict=True))
    with as_written():
        want = torch.compile(plain, backend=tmx_backend(CONFIG))(x)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(many(part(x, rank, 2, 1)), part(want, rank, 2, 1), rtol=1e-4, atol=1e-5)


# Disagreement --------------------------------------------------------------------------------------------------------


def disagreement():
    """Pieces of different lengths, and configurations that differ: an error on every process, at once."""
    mesh, rank, model = mesh_of(WORLD), dist.get_rank(), Net()
    other = TriangleMixConfig(5, 32, 16, triangle_layer_indices=[1, 2], min_seq_len=128)
    with as_written():
        compiled = torch.compile(model, backend=tmx_backend(CONFIG, context_parallel=mesh), dynamic=True)
        with pytest.raises(
            TriangleMixError, match=r"shapes or dtypes .* between process 0 and 2; this one has float32"
        ):
            compiled(torch.randn(1, 70 if rank == 2 else 80, 64))
        assert compiled(torch.randn(1, 80, 64)).shape == (1, 80, 64)
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend=tmx_backend(other if rank == 3 else CONFIG, context_parallel=mesh), dynamic=True
        )
        with pytest.raises(TriangleMixError, match=r"configuration differ between process 0 and 3; .*num_sink_tokens"):
            compiled(torch.randn(1, 80, 64))
        # One lets its graph take pieces that are too short for a halo, and would exchange heads.
        torch._dynamo.reset()
        compiled, x = torch.compile(model, backend=tmx_backend(CONFIG, context_parallel=mesh)), torch.randn(1, 80, 64)
        torch._dynamo.mark_dynamic(x, 1, min=33 if rank == 2 else 36, max=512)
        with pytest.raises(TriangleMixError, match=r"attention or its .* differ between process 0 and 2; .*, by h"):
            compiled(x)


CHECKS = {
    each.__name__: each
    for each in (
        *(operator_of_one, operator_of_two, operator_of_three, operator_of_four, heads_that_do_not_suffice),
        *(llama_of_two, llama_of_three, tensor_parallel, inductor, disagreement),
    )
}
