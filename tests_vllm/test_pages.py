"""Reading tokens from vLLM's CPU cache: whatever order its kernels keep a block in, for each of their kinds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from tmx_compile.integrations.vllm.cpu import Impl, cache_order

HEADS = 3


@pytest.mark.parametrize("dim", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [32, 128])
def test_tokens_come_back_as_they_were_written(dim: int, dtype: torch.dtype, size: int) -> None:
    isa = _get_attn_isa(dtype, size, dim)
    blocks, tokens = 7, 5 * size
    key, value = torch.randn(2, tokens, HEADS, dim).to(dtype)
    cache = torch.full((blocks, HEADS, size, 2 * dim), float("nan"), dtype=dtype)
    table = torch.randperm(blocks)[:5]
    place = torch.arange(tokens)
    slots = table[place // size] * size + place % size
    halves = cache.view(blocks, HEADS, 2 * size, dim).chunk(2, dim=2)
    _custom_ops.cpu_attn_reshape_and_cache(
        key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    impl = Impl.__new__(Impl)
    impl.head_size = dim
    some = torch.cat([torch.arange(3), torch.randperm(tokens)[:50], torch.arange(tokens - 3, tokens)])
    found = impl.tokens(SimpleNamespace(isa=isa), cache, table[some // size], some % size)
    for mine, want in zip(found, (key, value), strict=True):
        assert mine.shape == (len(some), HEADS, dim)
        assert torch.equal(mine, want[some])


def test_the_order_is_learnt_once() -> None:
    isa = _get_attn_isa(torch.float32, 32, 64)
    assert cache_order(isa, torch.float32, 32, 64) is cache_order(isa, torch.float32, 32, 64)
