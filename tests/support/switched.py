"""Models for the attention implementation of Transformers, each with the masks that its layers have of themselves."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tests.support.models import masked
from tests.support.oracle import attended
from tmx_compile import TriangleMixConfig
from tmx_compile.integrations.transformers import register_attention

CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=32
)
_SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=3,
    initializer_range=0.2,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
WINDOW = 24
"""The sliding window of the layers that have one, their own key included: longer than the triangle's."""
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=_MIXED)
_LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=12,
    first_k_dense_replace=3,
)
_MODELS = {
    "Llama": ("Llama", {}, ()),
    "Qwen3": ("Qwen3", dict(head_dim=16), ()),
    "Mistral": ("Mistral", dict(sliding_window=WINDOW), (0, 1, 2)),
    "Gemma3": ("Gemma3", _GEMMA, (0, 2)),
    "Gemma2": ("Gemma2", _GEMMA, (0, 2)),
    "GptOss": (
        "GptOss",
        dict(
            head_dim=16,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=WINDOW,
            layer_types=_MIXED,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        (0, 2),
    ),
    "DeepseekV3": ("DeepseekV3", _LATENT, ()),
    "DeepseekV32": (
        "DeepseekV32",
        _LATENT | dict(index_topk=30, index_n_heads=2, index_head_dim=16, first_k_dense_replace=3),
        (),
    ),
    "GPT2": ("GPT2", dict(n_embd=64, n_layer=3, n_head=4), ()),
}

WITH_SCORES = ("Gemma2", "GptOss")
"""Those that have a softcap or learned sinks."""


def switched_model(name="Llama", implementation="tmx", **changes):
    """A tiny random model; equal arguments give equal weights."""
    family, special, _ = _MODELS[name]
    kind = {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    config = getattr(transformers, {"Gemma3": "Gemma3Text"}.get(family, family) + "Config")
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(config(**(_SIZES | special | changes))).eval()
    model.set_attn_implementation(implementation)
    return model


def model_of_images(implementation="tmx"):
    """A Qwen3-VL, whose vision tower's features go into the decoder between its layers (DeepStack)."""
    rope = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0, mrope_interleaved=True)
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        patch_size=4,
        out_hidden_size=64,
        deepstack_visual_indexes=[0],
        num_position_embeddings=256,
    )
    config = transformers.Qwen3VLConfig(
        text_config=_SIZES | dict(head_dim=16, rope_parameters=rope),
        vision_config=vision,
        image_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        video_token_id=8,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    return model


def prompt_with_an_image(n=150):
    """What the model takes: an image of 64 tokens in a prompt."""
    ids = torch.randint(10, 120, (1, n))
    ids[0, 19], ids[0, 20:84], ids[0, 84] = 6, 5, 7
    return dict(
        input_ids=ids,
        pixel_values=torch.randn(256, 96),
        image_grid_thw=torch.tensor([[1, 16, 16]]),
        mm_token_type_ids=(ids == 5).long(),
    )


def plan_oracle(name, config, ids, attention_mask=None):
    """Logits in float64 with the triangle in the layers that ``config`` names, and each layer's own window."""
    with torch.no_grad():
        return plan_model(name, config, ids, attention_mask)(ids, attention_mask=attention_mask, use_cache=False).logits


def plan_model(name, config, ids, attention_mask=None):
    """The model of :func:`plan_oracle`, for prompts of this size and padding."""
    batch, n = ids.shape
    key_mask = None if attention_mask is None else attention_mask.bool()
    masks = {}
    for index in range(3):
        reach = WINDOW - 1 if index in _MODELS[name][2] else None
        geometry = config.geometry.counts if index in config.layers() and n > config.min_seq_len else (0, 0, n)
        masks[index] = attended(n, n, key_mask, *geometry, reach)
    # What sdpa does not know, the models' own files write out; the grouped product of experts has no float64.
    model = switched_model(name, "eager" if name in WITH_SCORES else "sdpa")
    if name == "GptOss":
        model.set_experts_implementation("eager")
    return masked(model, batch, n, masks)


@contextlib.contextmanager
def interfaces_kept():
    """What is registered inside is forgotten."""
    with (
        mock.patch.dict(AttentionInterface._global_mapping),
        mock.patch.dict(AttentionMaskInterface._global_mapping),
    ):
        yield


@contextlib.contextmanager
def registered(config=CONFIG, **options):
    """The switch, registered as ``tmx`` for a while."""
    with interfaces_kept():
        yield register_attention(config, **options)


def prompt(batch=2, n=100):
    return torch.randint(3, 128, (batch, n))


def padded(sides, n=100):
    """(B, n) attention mask of sequences that each have so many hidden tokens on the left and on the right."""
    mask = torch.ones(len(sides), n, dtype=torch.long)
    for row, (left, right) in enumerate(sides):
        mask[row, :left] = 0
        mask[row, n - right :] = 0
    return mask


def decisions(report, graph=0):
    """(decision, reason) by layer."""
    return {site.layer: (site.decision, site.reason) for site in report.of_graph(graph)}
