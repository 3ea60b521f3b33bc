"""Masks of real models beyond padding: a static cache filled in chunks, packed sequences. Triangle with every row among
the last ones is dense causal attention: so the logits must be the model's own."""

import pytest
import torch
from transformers import StaticCache

from tests.support.models import tiny_qwen3
from tmx_compile import TriangleMixConfig, tmx_backend

N = 90
CONFIG = TriangleMixConfig(triangle_layer_indices=[0, 1], num_last_tokens=10**6, min_seq_len=50)


def compiled(model):
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    return torch.compile(model, backend=backend), backend


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@torch.no_grad()
def test_a_static_cache_is_filled_in_chunks(padded, eager):
    model = tiny_qwen3()
    ids = torch.randint(0, 128, (2, 2 * N))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :17] = 0
    ours, backend = compiled(model)
    logits = []
    for run in (model, ours):
        cache = StaticCache(config=model.config, max_cache_len=300)
        for end in (N, 2 * N):
            out = run(
                ids[:, end - N : end],
                attention_mask=mask[:, :end] if padded else None,
                past_key_values=cache,
                use_cache=True,
            )
        logits.append(out.logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == len(backend.report) > 0


@torch.no_grad()
def test_packed_sequences(eager):
    model = tiny_qwen3()
    ids = torch.randint(0, 128, (2, N))
    lengths = ((30, 60), (1, 20, 69))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ours, backend = compiled(model)
    want = model(ids, position_ids=positions, use_cache=False).logits
    got = ours(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert len(backend.report.triangle()) == 2
    # Each document alone gives the same, so the packing was seen at all.
    alone = model(ids[:1, 30:], use_cache=False).logits
    torch.testing.assert_close(got[:1, 30:], alone, atol=2e-5, rtol=0)
