"""Lists of blocks handed to FlashAttention-4: what it is called with, and which calls are its own."""

from collections import namedtuple

import pytest
import torch

from tests.support.blocks import listed_oracle
from tests.support.oracle import tolerance
from tmx_compile.lowering import fa4, fa4_lists
from tmx_compile.lowering.triton.dynamic.launch import attend
from tmx_compile.lowering.triton.dynamic.op import TRITON_BLOCK_SPARSE
from tmx_compile.mask.selection import Selection
from tmx_compile.operator.dynamic import Lists, select

SELECTION = Selection("sampled", 0.5, 128, 16, sink=4, last=20)
SCALE = 64**-0.5
Sparse = namedtuple("Sparse", "mask_cnt mask_idx full_cnt full_idx block_size")


def package(q, k, v, *, softmax_scale, causal, block_sparse_tensors):
    """Stands for the package: the blocks that need a mask, then those that need none, both by the causal mask."""
    mask_cnt, mask_idx, full_cnt, full_idx, block_size = block_sparse_tensors
    assert causal is True
    assert block_size == (128, 128)
    assert {x.dtype for x in block_sparse_tensors[:4]} == {torch.int32}
    assert {x.stride(-1) for x in (q, k, v)} == {1}
    batch, heads, rows = full_cnt.shape
    # Each row's own block is the one that needs a mask.
    assert mask_cnt.shape == full_cnt.shape
    assert mask_cnt.eq(1).all()
    assert mask_idx.shape == full_idx.shape == (batch, heads, rows, rows)
    assert all(x.is_contiguous() for x in block_sparse_tensors[:4])
    own = mask_idx[..., :1]
    assert (own.squeeze(3) == torch.arange(rows, device=own.device)).all()
    place = torch.arange(full_idx.shape[3], device=own.device).expand(full_idx.shape)
    blocks = torch.where(place == full_cnt[..., None], own, full_idx)
    lists = Lists(blocks.cpu(), full_cnt.cpu() + 1, None)
    by_heads = [x.transpose(1, 2).cpu() for x in (q, k, v)]
    out = listed_oracle(*by_heads, None, lists, 128, softmax_scale)
    return out.transpose(1, 2).to(q), None


@pytest.fixture
def stand_in(monkeypatch):
    calls = []
    monkeypatch.setattr(fa4, "missing", lambda device: None)
    monkeypatch.setattr(fa4, "LEAST_TOKENS", 300)
    monkeypatch.setattr(fa4_lists, "functions", lambda: (lambda *q, **k: calls.append(1) or package(*q, **k), Sparse))
    return calls


def tensors(n=500, dtype=torch.float16, kv_len=None, dim=64):
    sizes = (4, n), (2, kv_len or n), (2, kv_len or n)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.randn(1, length, heads, dim, dtype=dtype, device=device).transpose(1, 2) for heads, length in sizes]


def test_the_operator_hands_its_lists_over(stand_in):
    query, key, value = tensors()
    out, visited = TRITON_BLOCK_SPARSE(query, key, value, None, *SELECTION.arguments, SCALE)
    lists = select(*(x.cpu() for x in (query, key)), None, SELECTION, SCALE)
    want = listed_oracle(*(x.cpu() for x in (query, key, value)), None, lists, 128, SCALE)
    torch.testing.assert_close(out.cpu().double(), want, atol=tolerance(out.dtype), rtol=0)
    assert visited.tolist() == lists.visited.tolist()
    assert stand_in == [1]


@pytest.mark.parametrize(
    "unlike",
    ["short", "float32", "fewer rows", "padding", "block", "head dim", "no package"],
)
def test_what_is_left_to_the_general_kernel(unlike, stand_in, monkeypatch):
    query, key, value = tensors()
    mask, block = None, 128
    assert fa4_lists.serves(query, key, value, mask, block)
    if unlike == "short":
        query, key, value = tensors(299)
    elif unlike == "float32":
        query, key, value = tensors(dtype=torch.float32)
    elif unlike == "fewer rows":
        query, key, value = tensors(400, kv_len=500)
    elif unlike == "padding":
        mask = torch.ones(1, 500, dtype=torch.bool)
    elif unlike == "block":
        block = 64
    elif unlike == "head dim":
        query, key, value = tensors(dim=96)
    else:
        monkeypatch.setattr(fa4, "missing", lambda device: "flash-attn-4 is not installed")
    assert not fa4_lists.serves(query, key, value, mask, block)


@pytest.mark.skipif(fa4.missing(torch.device("cuda" if torch.cuda.is_available() else "cpu")) is not None,
                    reason="FlashAttention-4 is not here")  # fmt: skip
@pytest.mark.parametrize("n", [4096, 4500])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_package_itself(n, dim):
    query, key, value = tensors(n, torch.bfloat16, dim=dim)
    lists = Lists(*(x.cuda() for x in select(query.cpu(), key.cpu(), None, SELECTION, SCALE)))
    want = attend(query, key, value, None, lists, 128, SCALE)
    out = fa4_lists.attend(query, key, value, lists, SCALE)
    torch.testing.assert_close(out, want, atol=2e-2, rtol=1e-2)
    assert torch.equal(out, fa4_lists.attend(query, key, value, lists, SCALE))
