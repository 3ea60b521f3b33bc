"""Every lowering compiled on a real NVIDIA GPU: the conformance problems, dynamic lengths, and 131,072 tokens.

On a GPU: ``python -m pytest tests/lowering/test_cuda.py -n 8``.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.oracle import oracle, tolerance
from tests.support.problems import CASES
from tmx_compile.lowering.table import NAMED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LOWERINGS = [name for name in ("triton", "flex", "blocked", "operator") if name in NAMED]
# One of each kind of problem: a compile costs seconds. The kernels that are this package's own run all of them.
COMPILED = {
    "triton": tuple(CASES),
    "operator": tuple(CASES),
    "flex": (
        "one token",
        "prime length",
        "no last rows",
        "huge counts",
        "window of many blocks",
        "sinks across a block border",
        "multi-query",
        "batch",
        "odd head dim",
        "head dim 256",
        "value dim differs",
        "bfloat16",
        "float16",
        "more keys than rows",
        "one row, many keys",
        "strided",
        "padding on both sides",
        "shorter than sinks and last",
        "no valid key",
        "holes",
        "padding and more keys than rows",
        "padding, bfloat16",
        "a window of the layer's own",
        "padding and a reach",
    ),
    "blocked": (
        "one token",
        "prime length",
        "bfloat16",
        "more keys than rows",
        "padding on both sides",
        "no valid key",
        "holes",
        "padding and a reach",
    ),
}


def allowed(dtype):
    """Absolute error against float64. Fused float32 kernels split their products into narrower ones."""
    return 1e-4 if dtype == torch.float32 else tolerance(dtype)


def check(case, compiled, dynamic=()):
    """One run against the oracle; ``dynamic`` are the dimensions of all tensors to mark (2: rows and keys)."""
    *qkv, key_mask = case.tensors(device="cuda")
    for dim in dynamic:
        for x in qkv:
            torch._dynamo.mark_dynamic(x, dim)
        if key_mask is not None:
            torch._dynamo.mark_dynamic(key_mask, min(dim, 1))
    with torch.no_grad():
        out = compiled(*qkv, key_mask)
    want, _ = oracle(*(x.cpu() for x in qkv), None if key_mask is None else key_mask.cpu(), *case.arguments)
    assert out.shape == want.shape
    assert out.dtype == case.dtype
    torch.testing.assert_close(out.cpu().double(), want, atol=allowed(case.dtype), rtol=0)


def compiled(name, call, **kwargs):
    backend = LoweringBackend(NAMED[name], inductor=True)
    return torch.compile(call, backend=backend, **kwargs), backend


@pytest.mark.parametrize(("lowering", "name"), [(low, name) for low in LOWERINGS for name in COMPILED[low]])
def test_compiled(lowering, name):
    case = CASES[name]
    call, _ = compiled(lowering, OneCall(*case.one_call), dynamic=False)
    check(case, call)


@pytest.mark.parametrize("valid", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("geometry", [(4, 32, 64), (70, 300, 100)], ids=str)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_compile_serves_every_length(lowering, geometry, valid):
    """Lengths around blocks, from the least that Inductor's FlexAttention gives one graph (128) upwards."""
    call, backend = compiled(lowering, OneCall(geometry, 0.25))
    for n in (300, 128, 777, 150, 1030, 129, 512):
        ranges = ((n // 3, n), (0, n - n // 4)) if valid else None
        check(Case(n, n, *geometry, batch=2, heads=4, kv_heads=2, valid=ranges), call, dynamic=(2,))
    assert backend.compiles == 1


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_one_compile_serves_rows_keys_and_batches(lowering):
    call, backend = compiled(lowering, OneCall((4, 32, 16), 0.25, 90))
    for q_len, kv_len, batch in ((200, 300, 2), (131, 140, 4), (256, 700, 3)):
        valid = tuple((10 * b, kv_len - 7 * b) for b in range(batch))
        case = Case(q_len, kv_len, 4, 32, 16, batch=batch, valid=valid, holes=True, reach=90)
        check(case, call, dynamic=(0, 2))
    assert backend.compiles == 1


class Fused(torch.nn.Module):
    """The operator on slices of one buffer, as a fused projection makes them, and an elementwise operation after it."""

    def forward(self, x):
        q, k, v = x.view(*x.shape[:2], 8, 32).split([4, 2, 2], 2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return torch.ops.tmx.triangle_attention(q, k, v, None, 4, 20, 8, 0.2)[0].transpose(1, 2).flatten(2) * 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_operands_that_share_a_buffer(lowering, dynamic):
    call, _ = compiled(lowering, Fused(), dynamic=dynamic)
    x = torch.randn(2, 333, 256, device="cuda")
    with torch.no_grad():
        out = call(x)
    q, k, v = (part.transpose(1, 2) for part in x.cpu().view(2, 333, 8, 32).split([4, 2, 2], 2))
    want, _ = oracle(q, k, v, None, 4, 20, 8, 0.2)
    torch.testing.assert_close(out.cpu().double(), want.transpose(1, 2).flatten(2) * 2, atol=2e-4, rtol=0)


def on_hopper():
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


hopper_only = pytest.mark.skipif(not on_hopper(), reason="needs an NVIDIA GPU of compute capability 9")
HOPPER_CASES = {
    **{name: replace(case, dtype=torch.bfloat16, dim=64, v_dim=None) for name, case in CASES.items()},
    "head dim 128": Case(700, 700, 8, 256, 32, heads=8, kv_heads=2, dim=128, dtype=torch.float16),
    "head dim 80": Case(700, 700, 8, 256, 32, heads=8, kv_heads=2, dim=80, dtype=torch.bfloat16),
    "one head a group": Case(900, 900, 20, 100, 64, heads=3, kv_heads=3, dim=64, dtype=torch.bfloat16),
    "three heads a group": Case(900, 900, 20, 100, 64, heads=9, kv_heads=3, dim=64, dtype=torch.bfloat16),
    "seven heads a group": Case(900, 900, 70, 100, 64, heads=14, kv_heads=2, dim=128, dtype=torch.bfloat16),
    "every row a last row": Case(2000, 2000, 4, 100, 2000, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16),
    "many sinks": Case(2000, 2000, 500, 100, 64, heads=4, kv_heads=1, dim=64, dtype=torch.bfloat16),
}


@hopper_only
@pytest.mark.parametrize("name", HOPPER_CASES)
def test_the_hopper_kernel(name):
    """The kernel for long prompts, on the short ones of the conformance suite, in the dtypes and head dims it takes."""
    from tmx_compile.lowering.triton import hopper_launch
    from tmx_compile.lowering.triton.lowering import extents
    from tmx_compile.lowering.triton.prepared import kind

    case = HOPPER_CASES[name]
    *qkv, key_mask = case.tensors(device="cuda")
    kinds = tuple(map(kind, qkv))
    assert hopper_launch.takes(*kinds)
    extent = None if key_mask is None else extents(key_mask, case.kv_len, case.last)
    geometry = case.mask.bounded(case.kv_len, case.q_len)
    mask_kind = None if key_mask is None else kind(key_mask)
    launch = hopper_launch.forward(*kinds, mask_kind, geometry, case.scale, None)
    out, nothing = launch(*qkv, key_mask, extent, None, None, None)
    assert nothing is None
    # Prepared by now.
    assert torch.equal(launch(*qkv, key_mask, extent, None, None, None)[0], out)
    training = hopper_launch.forward(*kinds, mask_kind, geometry, case.scale, None, with_lse=True)
    same, lse = training(*qkv, key_mask, extent, None, None, None)
    assert torch.equal(same, out)
    want, want_lse = oracle(*(x.cpu() for x in qkv), None if key_mask is None else key_mask.cpu(), *case.arguments)
    torch.testing.assert_close(out.cpu().double(), want, atol=allowed(case.dtype), rtol=0)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=allowed(case.dtype), rtol=0)


@pytest.mark.parametrize("name", ["prime length", "left padding", "holes", "padding and a reach"])
@pytest.mark.parametrize("lowering", [low for low in ("triton", "blocked", "operator") if low in NAMED])
def test_gradients(lowering, name):
    case = CASES[name]
    *qkv, key_mask = case.tensors(requires_grad=True, device="cuda")
    call, _ = compiled(lowering, OneCall(*case.one_call), dynamic=False)
    out = call(*qkv, key_mask)
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, qkv, weight)
    leaves = [x.detach().cpu().requires_grad_() for x in qkv]
    want, _ = oracle(*leaves, None if key_mask is None else key_mask.cpu(), *case.arguments)
    expected = torch.autograd.grad(want, leaves, weight.cpu().double())
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.double(), atol=1e-3, rtol=1e-3)


N = 131072


def long_oracle(q, k, v, sink, window, last):
    """The definition in float32, all keys, for chunks of rows: (1, H, N, D) from (1, H, N, D) and (1, Hkv, N, D)."""
    _, heads, n, dim = q.shape
    kv_heads = k.shape[1]
    k, v = k[0].float().transpose(1, 2), v[0].float()
    out = torch.empty(heads, n, dim, device=q.device)
    step = 512
    for first in range(0, n, step):
        row = torch.arange(first, first + step, device=q.device)[:, None]
        key = torch.arange(first + step, device=q.device)[None, :]
        masked = (key > row) | ((key >= sink) & (row - key > window) & (row < n - last))
        for group in range(kv_heads):
            mine = slice(group * heads // kv_heads, (group + 1) * heads // kv_heads)
            scores = q[0, mine, first : first + step].float() * dim**-0.5 @ k[group, :, : first + step]
            scores.masked_fill_(masked, float("-inf"))
            out[mine, first : first + step] = torch.softmax(scores, -1) @ v[group, : first + step]
    return out[None]


@pytest.mark.parametrize("geometry", [(4, 32, 64), (8, 512, 128)], ids=str)
def test_a_long_prompt(geometry, record_property):
    """Fresh random bfloat16 inputs, 32 heads over 8 of dim 128; the error of a row against the row's own norm."""
    case = Case(N, N, *geometry, heads=32, kv_heads=8, dim=128, dtype=torch.bfloat16)
    *qkv, _ = case.tensors(device="cuda")
    want = long_oracle(*qkv, *geometry)
    norms = want.norm(dim=-1)
    for lowering in LOWERINGS:
        if lowering == "operator":
            continue  # plain PyTorch, minutes at this length
        torch._dynamo.reset()
        call, _ = compiled(lowering, OneCall(geometry, case.scale), dynamic=False)
        with torch.no_grad():
            out = call(*qkv, None)
            again = call(*qkv, None)
        assert out.isfinite().all()
        assert torch.equal(out, again), lowering
        del again
        error = float(((out.float() - want).norm(dim=-1) / norms).max())
        record_property(f"{lowering} {geometry} worst row's relative error", f"{error:.4f}")
        assert error < 0.02, lowering
