"""Tiny random models of real Transformers classes, and their logits in float64 under masks written out."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.support.oracle import attended


def tiny_qwen3(layers=2, impl="sdpa", seed=0, **changes):
    """A random Qwen3 of real classes: 4 heads, 2 key heads, head dim 16."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1 << 17,
    )
    config = Qwen3Config(**(settings | changes))
    config._attn_implementation = impl
    return Qwen3ForCausalLM(config).eval()


LAYERS = 3


def tiny_llama():
    """A random Llama of three layers, of other weights in each call."""
    shape = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, initializer_range=0.2, **shape)).eval()


def stored_model():
    """The model that the commands find on disk; its weights are large enough for attention to matter."""
    return tiny_qwen3(layers=LAYERS, initializer_range=0.2)


def attentions(model):
    """The self-attention module of every layer."""
    body = getattr(model, "model", None) or model.transformer
    body = getattr(body, "language_model", body)
    return [getattr(layer, "self_attn", None) or layer.attn for layer in getattr(body, "layers", None) or body.h]


def masked_oracle(model, config, ids, attention_mask=None):
    """Logits of a Hugging Face model in float64 with the triangle mask in the layers that ``config`` names.

    Every attention module is called with an explicit additive mask; nothing of the package takes part.
    """
    n = ids.shape[1]
    key_mask = None if attention_mask is None else attention_mask.bool()
    tri = attended(n, n, key_mask, *config.geometry.counts)
    dense = attended(n, n, key_mask, 0, 0, n)
    masks = {index: tri if index in config.layers() else dense for index in range(len(attentions(model)))}
    return with_masks(model, ids, masks, attention_mask)


def with_masks(model, ids, masks, attention_mask=None, **settings):
    """Logits of a Hugging Face model in float64 with a mask, (N, N) or (B, N, N), True = attend, for each layer named.

    Other layers are causal; ``settings`` go to the model.
    """
    with torch.no_grad():
        double = masked(model, *ids.shape, masks)
        return double(ids, attention_mask=attention_mask, use_cache=False, **settings).logits


def masked(model, batch, n, masks):
    """A copy of a Hugging Face model in float64, for prompts of one size, that attends under the masks given."""
    model = copy.deepcopy(model).double()
    causal = torch.ones(n, n, dtype=torch.bool).tril()

    def hook(index):
        def before(module, args, kwargs):
            mask = masks.get(index, causal).expand(batch, n, n)
            # A row without keys sees itself: it is padding, and its result is never looked at.
            mask = mask | (torch.eye(n, dtype=torch.bool) & ~mask.any(-1, keepdim=True))
            zero = torch.zeros((), dtype=torch.float64)
            kwargs["attention_mask"] = torch.where(mask, zero, float("-inf"))[:, None]
            return args, kwargs

        return before

    for index, attention in enumerate(attentions(model)):
        # A model copied after it got the caches' hooks has them too; they do nothing without those caches.
        attention.register_forward_pre_hook(hook(index), with_kwargs=True)
    return model
