"""What processes check of the answer that follows a split prompt: steps over split caches, and gathered ones."""

from __future__ import annotations

import itertools
import random
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

from tests.support.models import with_masks
from tests.support.oracle import attended, oracle, tolerance
from tests.support.split import CONFIG, HEADS, as_written, mesh_of, part
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.lowering.base import AttentionCall, immediate
from tmx_compile.lowering.context_parallel import Ranks
from tmx_compile.lowering.table import Role, Wish, choose
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

DENSE = Geometry(0, 0, ALL_ROWS)
GREEDY = dict(max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True)


def operator_of_steps():
    """New rows over pieces whose masks say what counts: on any one process, or where a sequence has ended on none."""
    for size in (1, 2, 3):
        mesh = mesh_of(size)
        if dist.get_rank() >= size:
            continue
        drawn, ranks = random.Random(size), Ranks.of(mesh)
        for new, dtype in itertools.product((1, 3), (torch.float64, torch.float32, torch.bfloat16)):
            torch.manual_seed(drawn.randrange(1 << 30))
            heads, kv_heads = drawn.choice(HEADS)
            piece, batch, before = drawn.choice((1, 17)), 3, drawn.choice((0, 2))
            prompt = piece * size
            q = torch.randn(batch, heads, new, 16).to(dtype)
            k, v = (torch.randn(batch, kv_heads, prompt + before + new, 16).to(dtype) for _ in range(2))
            mask = torch.rand(batch, k.shape[2]) > 0.3
            mask[0, -new:] = False
            own = [torch.cat([part(x[:, :, :prompt], ranks.rank, size, 2), x[:, :, prompt:]], 2) for x in (k, v)]
            keeper = drawn.randrange(size)
            counted = mask[:, prompt:] & (ranks.rank == keeper)
            own_mask = torch.cat([part(mask[:, :prompt], ranks.rank, size, 1), counted], 1)
            call = AttentionCall(q, *own, own_mask, DENSE, 0.3, needs_grad=False)
            lowering = choose("cpu", Role.MASKLESS, call, Wish(ranks=ranks))
            want, _ = oracle(q, k, v, mask, *DENSE.counts, 0.3)
            error = (immediate(lowering, call) - want).abs().max().item()
            assert error < max(tolerance(dtype), 1e-5), (size, heads, kv_heads, new, piece, before, dtype, error)


def as_one(model, config, ids, mask, prompt):
    """Logits of one process in float64: triangle rows in the prompt, dense rows behind it."""
    n = ids.shape[1]
    valid, causal = mask.bool(), torch.ones(n, n, dtype=torch.bool).tril()
    masks = {}
    for layer in range(len(model.model.layers)):
        masks[layer] = causal & valid[:, None]
        if layer in config.layers():
            masks[layer][:, :prompt, :prompt] = attended(prompt, prompt, valid[:, :prompt], *config.geometry.counts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return with_masks(model, ids, masks, mask, position_ids=positions)


def padded(n, side):
    """(2, n) tokens and their mask: padding on the left of the first sequence, on the right of the second, or none."""
    ids = torch.randint(0, 128, (2, n))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, : n // 3] = 0
    if side == "right":
        mask[1, n - n // 4 :] = 0
    return ids, mask if side else None


def answers(size, prompts):
    """Greedy decoding over split caches, then over gathered ones: the logits of one process, at every step."""
    from tests.support.models import tiny_llama as made
    from tmx_compile.integrations.transformers import SplitPrompt

    mesh = mesh_of(size)
    if dist.get_rank() >= size:
        return
    torch.manual_seed(0)
    plain = made()
    backend = tmx_backend(CONFIG, context_parallel=mesh, strict=True)
    many = torch.compile(plain, backend=backend, dynamic=True)
    with as_written() as graphs:
        for n, side in prompts:
            ids, mask = padded(n, side)
            split = SplitPrompt(plain, mesh, ids, mask)
            out = many(**split.piece())
            logits = [split.last(out.logits)]
            for _ in range(3):
                token = logits[-1].argmax(-1, keepdim=True)
                # What the others draw does not count.
                drawn = token if mesh.get_local_rank() == size - 1 else token * 0
                out = many(**split.step(drawn), past_key_values=out.past_key_values)
                logits.append(out.logits[:, -1])
            # A question of two tokens at once.
            out = many(**split.step(torch.randint(0, 128, (2, 2))), past_key_values=out.past_key_values)
            logits += out.logits.unbind(1)
            # One process goes on, with nothing compiled.
            cache, token = split.gathered(out.past_key_values), logits[-1].argmax(-1, keepdim=True)
            assert cache.get_seq_length() == n + split.new_tokens == n + 5
            ids = torch.cat([split.input_ids, token], 1)
            mask = torch.cat([split.attention_mask, torch.ones_like(token)], 1)
            more = plain.generate(ids, attention_mask=mask, past_key_values=cache, **GREEDY)
            logits += more.logits
            ids, mask = more.sequences[:, :-1], F.pad(mask, (0, 1), value=1)
            config = CONFIG if n > CONFIG.min_seq_len else TriangleMixConfig(num_triangle_layers=0)
            want = as_one(plain, config, ids, mask, n)
            ends = (mask[:, :n] * torch.arange(n)).amax(1)
            want = torch.cat([want[torch.arange(2), ends][:, None], want[:, n:]], 1)
            torch.testing.assert_close(torch.stack(logits, 1).double(), want, rtol=2e-4, atol=2e-4)
        # Prompts above min_seq_len and below, with padding and without; steps of one token and of two.
        assert len(graphs) == 5, len(graphs)


def counted_twice():
    """A loop that gives every process the mask of one: an error on all of them, and no wrong number."""
    mesh = mesh_of(2)
    if dist.get_rank() >= 2:
        return
    rows, mask = torch.randn(1, 2, 1, 16), torch.ones(1, 9, dtype=torch.bool)
    keys = torch.randn(1, 2, 9, 16)
    for counts in (True, False):
        mask[:, -1] = counts
        call = AttentionCall(rows, keys, keys, mask, DENSE, 0.3, needs_grad=False)
        lowering = choose("cpu", Role.MASKLESS, call, Wish(ranks=Ranks.of(mesh)))
        with pytest.raises(RuntimeError, match="counts on more than one process") if counts else nullcontext():
            immediate(lowering, call)


def answers_of_two():
    answers(2, ((240, ""), (241, "right"), (100, "left")))


def answers_of_three():
    answers(3, ((240, ""), (241, "left"), (101, "")))


def windows():
    """A model's own window is the prompt's, shorter than a piece or longer; a step there is refused by all."""
    from transformers import MistralConfig, MistralForCausalLM

    from tmx_compile.integrations.transformers import SplitPrompt

    mesh = mesh_of(2)
    if dist.get_rank() >= 2:
        return
    config = TriangleMixConfig(4, 16, 8, triangle_layer_indices=[1], min_seq_len=64)
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    for window in (60, 150):
        torch._dynamo.reset()
        settings = MistralConfig(num_hidden_layers=2, initializer_range=0.2, sliding_window=window, **shape)
        plain = MistralForCausalLM(settings).eval()
        many = torch.compile(plain, backend=tmx_backend(config, context_parallel=mesh), dynamic=False)
        ids = torch.randint(0, 128, (2, 200))
        with as_written():
            split = SplitPrompt(plain, mesh, ids)
            out = many(**split.piece())
            reach = attended(200, 200, None, 0, window - 1, 0)
            want = with_masks(plain, ids, {0: reach, 1: reach & attended(200, 200, None, *config.geometry.counts)})
            own = part(want, mesh.get_local_rank(), 2, 1)
            torch.testing.assert_close(out.logits.double(), own, rtol=2e-4, atol=2e-4)
            with pytest.raises(BackendCompilerFailed, match="LoweringError: context_parallel cannot split"):
                many(**split.step(ids[:, :1]), past_key_values=out.past_key_values)


CHECKS = {each.__name__: each for each in (operator_of_steps, counted_twice, windows, answers_of_two, answers_of_three)}
