"""Operators that stand in for those of vLLM's CPU build: their signatures, dense attention from pages."""

import torch
import torch.nn.functional as F


class Kernels:
    """Causal attention, over a window where one is given; ``wrong`` leaves the causal mask out.

    Attributes:
        plans: (heads, key heads, head dim, lengths, starts, window) of every plan made.
    """

    def __init__(self, isa, wrong=False):
        self.isa, self.wrong, self.plans = isa, wrong, []

    def cpu_attn_reshape_and_cache(self, key, value, keys, values, slots, isa, k_scale, v_scale, dtype):
        assert (isa, k_scale, v_scale, dtype) == (self.isa, 1.0, 1.0, "auto")
        size = keys.shape[2]
        assert size % 32 == 0
        for half, new in ((keys, key), (values, value)):
            half[slots // size, :, slots % size] = new

    def get_scheduler_metadata(self, requests, heads, kv_heads, dim, lengths, dtype, starts, causal, window, *rest):
        assert rest == (self.isa, True, None)
        assert causal
        assert (lengths.dtype, starts.dtype, len(lengths)) == (torch.int32, torch.int32, requests)
        self.plans.append((heads, kv_heads, dim, lengths.tolist(), starts.tolist(), window))
        return torch.tensor([len(self.plans) - 1])

    def cpu_attention_with_kv_cache(
        self, query, keys, values, out, starts, lengths, scale, causal, alibi, window, table, softcap, plan, *rest
    ):
        assert (causal, alibi, softcap, rest) == (True, None, 0.0, (None, None, 1.0, 1.0, "auto"))
        # The plan is that of these very rows.
        assert self.plans[int(plan)][3:] == (lengths.tolist(), starts.tolist(), window)
        for request, n in enumerate(lengths.tolist()):
            first, end = starts[request : request + 2].tolist()
            rows = end - first
            key, value = (
                half[table[request].long()].transpose(0, 1).flatten(1, 2)[:, :n].nan_to_num() for half in (keys, values)
            )
            row, column = torch.arange(n - rows, n)[:, None], torch.arange(n)
            mask = torch.ones(rows, n, dtype=torch.bool) if self.wrong else column <= row
            if window >= 0:
                mask = mask & (row - column < window)
            q = query[first:end].transpose(0, 1)[None]
            found = F.scaled_dot_product_attention(q, key[None], value[None], mask, scale=scale, enable_gqa=True)
            out[first:end] = found[0].transpose(0, 1)
