"""A platform with pages for the vLLM plugin's backend, which computes dense rows from them as vLLM's platforms do."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig
from tmx_compile.integrations.vllm import lengths
from tmx_compile.integrations.vllm.backend import TriangleBuilder, TriangleImpl
from tmx_compile.integrations.vllm.gather import from_packed
from tmx_compile.integrations.vllm.rows import look
from tmx_compile.integrations.vllm.settings import KEY, Settings

SIZE, HEADS, KV_HEADS, DIM, SCALE = 4, 4, 2, 8, 0.3
NAME = "model.layers.1.self_attn.attn"


@dataclass
class Common:
    """What the common metadata of vLLM has, as far as it is used here."""

    query_start_loc: Any
    query_start_loc_cpu: Any
    seq_lens: Any
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Any
    slot_mapping: Any
    causal: Any = True
    mm_req_doc_ranges: Any = None
    seq_lens_cpu_upper_bound: Any = None
    is_prefilling: Any = None

    def replace(self, **changes: Any) -> Common:
        return replace(self, **changes)


class PlatformBuilder:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        pass

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace(common=common_attn_metadata)


class PlatformImpl:
    """Dense attention of a step's rows, from pages (blocks, Hkv, SIZE, 2 D), as FlashAttention's are in vLLM."""

    alibi_slopes = sinks = kv_sharing_target_layer_name = None
    logits_soft_cap, attn_type, kv_cache_dtype = 0, "decoder", "auto"
    num_heads, num_kv_heads, head_size, scale = HEADS, KV_HEADS, DIM, SCALE

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        common = attn_metadata.common
        starts = common.query_start_loc_cpu.tolist()
        assert starts[-1] == query.shape[0] == common.num_actual_tokens
        assert common.max_query_len == max(end - start for start, end in itertools.pairwise(starts))
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            length = int(common.seq_lens[request])
            place = torch.arange(length)
            block = common.block_table_tensor.cpu()[request, place // SIZE].long()
            # On the host, where the oracle's masks are.
            cached = kv_cache.cpu()[block, :, place % SIZE].split(DIM, -1)
            q, k, v = (x.transpose(0, 1)[None] for x in (query[start:end].cpu(), *cached))
            out, _ = oracle(q, k, v, None, 0, 0, 2**31 - 1, SCALE)
            output[start:end] = out[0].transpose(0, 1)
        return output


class Attention(SimpleNamespace):
    """A layer, by the name of vLLM's class."""


class ChunkedLocalAttention(Attention):
    """One that hands its builder requests cut into chunks."""


class Builder(TriangleBuilder, PlatformBuilder):
    def lengths(self, common):
        return common.seq_lens.cpu()


class Impl(TriangleImpl, PlatformImpl):
    def tokens(self, layer, kv_cache, blocks, slots):
        return from_packed(kv_cache, KV_HEADS, DIM, blocks, slots)


def configured(config: TriangleMixConfig, impl: Any, lowering: str = "operator", **changes: Any) -> Any:
    """The configuration of an engine whose model has one layer more than is looked at."""
    asked = Settings(config, 2, lowering, **changes)
    layers = {
        name: Attention(impl=impl, sliding_window=None, layer_name=name)
        for name in ("model.layers.0.self_attn.attn", NAME)
    }
    return SimpleNamespace(
        additional_config={KEY: asked.to_dict()},
        compilation_config=SimpleNamespace(static_forward_context=layers | {"model.rotary": object()}),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        model_config=SimpleNamespace(is_mm_prefix_lm=False, dtype=torch.float32),
    )


CPU = torch.device("cpu")
CONFIG = TriangleMixConfig(2, 5, 6, triangle_layer_indices=[1], min_seq_len=10)


def told(builder, prompts, common, build, *args):
    """What ``build`` returns when a runner has told of the step."""
    on, prompts = builder.active, np.array(prompts)
    rows = common.query_start_loc_cpu.numpy()
    computed = common.seq_lens.cpu().numpy()[: len(prompts)] - (rows[1:] - rows[:-1])[: len(prompts)]
    step = look(int(rows[-1]), prompts, computed, on.limit, on.geometry.last)
    step.prompts = prompts
    return lengths.told(on, step, build, *args)


def planned(builder, prompts, common):
    return told(builder, prompts, common, builder.plan, builder.active, common)


class Sequences:
    """Some requests with their keys and values, in one paged cache."""

    def __init__(self, prompts, answers, dtype=torch.float64, device=CPU):
        self.prompts, self.tokens = prompts, [p + a for p, a in zip(prompts, answers, strict=True)]
        # One projection makes all three, so each is a view of every token's row.
        split = [HEADS, KV_HEADS, KV_HEADS]
        all_three = [torch.randn(n, sum(split), DIM, dtype=dtype).to(device).split(split, 1) for n in self.tokens]
        self.q, self.k, self.v = zip(*all_three, strict=True)
        most = max(-(-n // SIZE) for n in self.tokens)
        blocks = torch.randperm(most * len(prompts)).to(device, torch.int32)
        self.table = blocks.view(len(prompts), most)
        pages = most * len(prompts), KV_HEADS, SIZE, 2 * DIM
        self.pages = torch.full(pages, float("nan"), dtype=dtype, device=device)

    def step(self, builder, impl, layer, chosen):
        """Run one step of [(request, first token, rows)]: [(request, first token, out)]."""
        device = self.pages.device
        for request, first, rows in chosen:
            place = torch.arange(first, first + rows, device=device)
            block = self.table[request, place // SIZE].long()
            self.pages[block, :, place % SIZE] = torch.cat([self.k[request][place], self.v[request][place]], -1)
        starts = torch.tensor([0] + [rows for _, _, rows in chosen]).cumsum(0).to(torch.int32)
        requests = [request for request, _, _ in chosen]
        lengths = torch.tensor([first + rows for _, first, rows in chosen], dtype=torch.int32)
        common = Common(
            starts.to(device), starts, lengths.to(device), len(chosen), int(starts[-1]),
            max(rows for _, _, rows in chosen), int(lengths.max()), self.table[requests],
            torch.arange(int(starts[-1]), device=device),
        )  # fmt: skip
        prompts = [self.prompts[request] for request in requests]
        metadata = told(builder, prompts, common, builder.build, 0, common)
        taken = [slice(first, first + rows) for _, first, rows in chosen]
        parts = [
            torch.cat([x[request][rows] for x in (self.q, self.k, self.v)], 1)
            for request, rows in zip(requests, taken, strict=True)
        ]
        q, k, v = torch.cat(parts).split([HEADS, KV_HEADS, KV_HEADS], 1)
        out = q.new_full(q.shape, float("nan"))
        impl.forward(layer, q, k, v, self.pages, metadata, out)
        parts = out.split([rows for _, _, rows in chosen])
        return [(request, first, part) for (request, first, _), part in zip(chosen, parts, strict=True)]

    def want(self, request, config):
        """The rows of the prompt under its mask, and every later row over all keys: (tokens, H, D)."""
        prompt = self.prompts[request]
        last = config.num_last_tokens if prompt > config.min_seq_len else 2**31 - 1
        heads_first = [x[request].cpu().transpose(0, 1)[None] for x in (self.q, self.k, self.v)]
        rows = [x[:, :, :prompt] for x in heads_first]
        within, _ = oracle(*rows, None, *config.geometry.counts[:2], last, SCALE)
        behind, _ = oracle(*heads_first, None, 0, 0, 2**31 - 1, SCALE)
        return torch.cat([within[0], behind[0, :, prompt:]], 1).transpose(0, 1)
