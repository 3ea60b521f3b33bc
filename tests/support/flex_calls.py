"""Calls of FlexAttention: tensors, block masks, and the check of a rewritten call against the oracle."""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.support.layers import OneLayer
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend

B, H, KV, N, D = 2, 4, 2, 150, 8
CONFIG = TriangleMixConfig(
    num_sink_tokens=3, sliding_window_size=9, num_last_tokens=6, triangle_layer_indices=[0], min_seq_len=0
)
PADDING = torch.ones(B, N, dtype=torch.bool)
PADDING[0, :37] = False
PADDING[1, 140:] = False
FIRST_KEY = torch.tensor([37, 0])


def tensors(q_len=N, kv_len=N):
    return [torch.randn(B, heads, n, D) for heads, n in ((H, q_len), (KV, kv_len), (KV, kv_len))]


def attend(q, k, v, mask):
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


def block_mask(mask_mod, q_len=N, kv_len=N, batch=None, **kwargs):
    return create_block_mask(mask_mod, batch, None, q_len, kv_len, device="cpu", **kwargs)


def triangle(call, args, *, dynamic=False):
    """The result of the rewritten call, run as it is."""
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    out = torch.compile(OneLayer(call), backend=backend, dynamic=dynamic)(*args)
    assert len(backend.report.triangle()) == 1
    return out


def check(out, q, k, v, key_mask=None, scale=D**-0.5, reach=None):
    want, _ = oracle(q, k, v, key_mask, *CONFIG.geometry.counts, scale, reach)
    rows = slice(None) if key_mask is None else key_mask[:, None, :, None].expand(want.shape)
    torch.testing.assert_close(out.double()[rows], want[rows], atol=2e-5, rtol=0)


def causal(b, h, row, key):
    return row >= key
