"""Prompts in chunks: caches, the loop that feeds them, and the problems of the operator for one chunk."""

import torch
from transformers import DynamicCache, StaticCache

from tests.support.calls import Case
from tests.support.oracle import oracle
from tmx_compile.lowering.chunk import CHUNK, OWN_END

NO_LAST = 2**62


def growing(model):
    return DynamicCache(config=model.config)


def fixed(model):
    return StaticCache(config=model.config, max_cache_len=150)


def feed(model, cache, ids, sizes, mask=None, begin=0):
    """Logits of all rows, chunk by chunk; the sizes repeat."""
    got, at = [], begin
    while at < ids.shape[1]:
        end = min(ids.shape[1], at + sizes[len(got) % len(sizes)])
        seen = None if mask is None else mask[:, :end].contiguous()
        places = None if mask is None else (mask.cumsum(1)[:, at:end] - 1).clamp(min=0)
        with torch.no_grad():
            # Contiguous: the stride of a slice is a length to Dynamo, and one more to guard on.
            part = ids[:, at:end].contiguous()
            out = model(part, attention_mask=seen, position_ids=places, past_key_values=cache)
        got.append(out.logits)
        at = end
    return torch.cat(got, 1)


SIZES = [(100,), (1,), (33,), (92, 8), (95, 5), (60, 1, 39)]
CASES = {
    "plain": Case(60, 60, 4, 8, 0),
    "a later chunk": Case(30, 90, 4, 8, 0),
    "padding": Case(30, 90, 4, 8, 0, batch=3, valid=((0, 90), (40, 90), (85, 90)), holes=True),
    "reach": Case(30, 90, 4, 8, 0, reach=40, batch=2, valid=((0, 90), (10, 90))),
    "groups, bf16": Case(30, 90, 4, 8, 0, heads=6, kv_heads=2, v_dim=8, dtype=torch.bfloat16, strided=True),
}


def check_operator(case, lowering, device, allowed):
    q, k, v, key_mask = case.tensors(device=device)
    host = [x if x is None else x.cpu() for x in (q, k, v, key_mask)]
    for first in (0, 59, 60, 61, 75, 89, 90, NO_LAST, OWN_END):
        last = 5 if first == OWN_END else max(0, case.kv_len - first)
        where = torch.full((case.batch,), first)
        got = CHUNK(q, k, v, key_mask, where, case.sink, case.window, 5, case.scale, case.reach, lowering)
        want = oracle(*host, case.sink, case.window, last, case.scale, case.reach)[0]
        torch.testing.assert_close(got.cpu().double(), want, atol=allowed, rtol=0)
