"""The models of the zoo: every architecture as its real Transformers class, with few and narrow layers.

Random weights, 2 to 4 layers, and room for prompts of 512 tokens. Nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf

VOCABULARY = 100
# Windowed layers see this many keys: fewer than a prompt has, more than the triangle's own window.
WINDOW = 32
IMAGE = dict(image_size=40, patch_size=5, num_channels=3)
PATCHES = (40 // 5) ** 2
START, IMAGE_TOKEN = 1, 2

# The weights of random models are small, and so are their scores: larger ones make a wrong mask show.
LARGE = dict(initializer_range=0.2)
WIDTH = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    **LARGE,
)
TEXT = WIDTH | dict(
    vocab_size=VOCABULARY,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=START,
    eos_token_id=None,
)
ENCODER_DECODER = dict(
    vocab_size=VOCABULARY,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    init_std=0.2,
    bos_token_id=START,
    pad_token_id=0,
    eos_token_id=None,
    decoder_start_token_id=START,
)
# Every expert takes part, so that rounding cannot change which.
EXPERTS = dict(num_experts_per_tok=4, moe_intermediate_size=24)

Inputs = dict[str, Any]
Outputs = list[tuple[torch.Tensor, bool]]


def ids(batch: int, tokens: int) -> torch.Tensor:
    """Random tokens without a meaning."""
    return torch.randint(3, VOCABULARY, (batch, tokens))


def _text(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    return {"input_ids": ids(batch, tokens)} | ({} if mask is None else {"attention_mask": mask})


def _target(batch: int, tokens: int) -> torch.Tensor:
    """It begins with the start token, so that ``generate`` puts none before it."""
    target = ids(batch, tokens)
    target[:, 0] = START
    return target


def _text_to_text(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    """The source is longer than the target, and padded alike."""
    given = {"input_ids": ids(batch, tokens + 20), "decoder_input_ids": _target(batch, tokens)}
    if mask is not None:
        given |= {"attention_mask": F.pad(mask, (0, 20), value=1), "decoder_attention_mask": mask}
    return given


def _speech_to_text(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    given = {"input_features": torch.randn(batch, 8, 200), "decoder_input_ids": _target(batch, tokens)}
    return given | ({} if mask is None else {"decoder_attention_mask": mask})


def _image(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    return {"pixel_values": torch.randn(batch, IMAGE["num_channels"], IMAGE["image_size"], IMAGE["image_size"])}


def _image_and_text(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    return _text(batch, tokens, mask) | _image(batch, tokens, mask)


def _image_in_text(batch: int, tokens: int, mask: torch.Tensor | None) -> Inputs:
    """The image's tokens stand near the end, where no padding is."""
    given = _image_and_text(batch, tokens, mask)
    given["input_ids"][:, -5 - PATCHES : -5] = IMAGE_TOKEN
    return given


def _logits(out: Any) -> Outputs:
    return [(out.logits, True)]


def _hidden(out: Any) -> Outputs:
    return [(out.last_hidden_state, False)]


def _towers(out: Any) -> Outputs:
    return [(out.text_model_output.last_hidden_state, True), (out.vision_model_output.last_hidden_state, False)]


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        name: as the page calls it.
        config: makes its configuration.
        of: the model's class.
        causal: pattern of the module paths of causal self-attention; "" where there is none.
        inputs: (batch, tokens, 2-D mask or None) to the arguments of a forward call.
        outputs: what is compared of a result: tensors, and whether their second dimension is the 2-D mask's.
        text: takes a 2-D mask and a key-value cache.
        generates: generates tokens.
        offers: the values of ``attn_implementation`` that its class takes, and runs on a CPU.
        reference: what the oracle's model runs under: "" for the attention that the oracle puts in. A class with
            attention of its own takes "sdpa", which the oracle can replace, or "itself", in float32 and left as it is.
        dense: reasons with which the causal sites are right to stay dense, by implementation, call or both ("sdpa",
            "no mask", "sdpa, no mask"; "*" for all). Without an entry they have to go sparse.
        brief: called with a full mask and with left padding alone.
    """

    name: str
    config: Callable[[], Any]
    of: type
    causal: str
    inputs: Callable[[int, int, torch.Tensor | None], Inputs] = _text
    outputs: Callable[[Any], Outputs] = _logits
    text: bool = True
    generates: bool = True
    offers: tuple[str, ...] = ("sdpa", "eager", "flex_attention")
    reference: str = ""
    dense: Mapping[str, frozenset[str]] = field(default_factory=dict)
    brief: bool = False

    def is_causal(self, path: str) -> bool:
        """Whether a module path is that of a causal self-attention."""
        return bool(self.causal) and re.fullmatch(self.causal, path) is not None

    def build(self, implementation: str) -> Any:
        """The model with that ``attn_implementation``, its weights always the same.

        Raises:
            ValueError: its class does not offer that implementation.
        """
        config = self.config()
        config._attn_implementation = implementation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.of(config).eval()
        if model.config._attn_implementation != implementation:
            raise ValueError(f"{self.of.__name__} runs {model.config._attn_implementation} instead")
        return model


LLAMA_STYLE = r"model\.layers\.\d+\.self_attn"
# What the scores are changed by, beside the mask.
BIAS = frozenset({"FLOAT_BIAS"})


def _decoder(
    name: str,
    causal: str = LLAMA_STYLE,
    *,
    title: str = "",
    offers: tuple[str, ...] = Model.offers,
    reference: str = "",
    dense: Mapping[str, frozenset[str]] | None = None,
    **changes: Any,
) -> Model:
    """``<name>ForCausalLM`` with ``<name>Config``."""
    config, of = getattr(hf, f"{name}Config"), getattr(hf, f"{name}ForCausalLM")
    return Model(
        title or name,
        lambda: config(**(TEXT | changes)),
        of,
        causal,
        offers=offers,
        reference=reference,
        dense=dense or {},
    )


MODELS: tuple[Model, ...] = (
    _decoder("Llama"),
    _decoder("Qwen2"),
    _decoder("Qwen3", head_dim=8),
    _decoder("Qwen3Moe", title="Qwen3-MoE", head_dim=8, num_experts=4, **EXPERTS),
    _decoder("Mistral", title="Mistral (sliding window)", sliding_window=WINDOW),
    _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=4, sliding_window=None),
    _decoder(
        "Gemma2",
        title="Gemma 2 (softcap, alternating windows)",
        offers=("eager", "flex_attention"),
        head_dim=8,
        sliding_window=WINDOW,
    ),
    _decoder(
        "Gemma2",
        title="Gemma 2 without softcap (alternating windows)",
        offers=("eager", "flex_attention"),
        head_dim=8,
        sliding_window=WINDOW,
        attn_logit_softcapping=None,
    ),
    Model(
        "Gemma 3 text (alternating windows)",
        lambda: hf.Gemma3TextConfig(
            **(TEXT | dict(head_dim=8, sliding_window=WINDOW, num_hidden_layers=4)),
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        hf.Gemma3ForCausalLM,
        LLAMA_STYLE,
    ),
    _decoder("Phi3", title="Phi-3", sliding_window=None),
    Model(
        "GPT-2",
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            bos_token_id=START,
            eos_token_id=None,
            pad_token_id=0,
            **LARGE,
        ),
        hf.GPT2LMHeadModel,
        r"transformer\.h\.\d+\.attn",
        offers=("sdpa", "eager"),
    ),
    _decoder("GPTNeoX", r"gpt_neox\.layers\.\d+\.attention", title="GPT-NeoX"),
    _decoder("OPT", r"model\.decoder\.layers\.\d+\.self_attn", ffn_dim=48, word_embed_proj_dim=32),
    _decoder(
        "Bloom",
        r"transformer\.h\.\d+\.self_attention",
        title="Bloom (ALiBi)",
        reference="itself",
        offers=("eager",),
        n_layer=2,
        n_head=4,
        dense={"*": BIAS},
    ),
    _decoder(
        "Falcon",
        r"transformer\.h\.\d+\.self_attention",
        title="Falcon (ALiBi)",
        reference="itself",
        offers=("sdpa", "eager"),
        alibi=True,
        dense={"*": BIAS},
    ),
    _decoder(
        "Falcon",
        r"transformer\.h\.\d+\.self_attention",
        title="Falcon without ALiBi",
        reference="sdpa",
        offers=("sdpa", "eager"),
        alibi=False,
    ),
    _decoder("Olmo2", title="OLMo 2"),
    _decoder("SmolLM3"),
    _decoder(
        "DeepseekV3",
        title="DeepSeek-V3 (values narrower than keys)",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **EXPERTS,
    ),
    _decoder(
        "GptOss",
        title="gpt-oss (learned sinks, alternating windows)",
        offers=("eager",),
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=4,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    _decoder("Cohere"),
    _decoder("Granite"),
    Model(
        "T5 (relative bias)",
        lambda: hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=START,
            eos_token_id=None,
        ),
        hf.T5ForConditionalGeneration,
        r"decoder\.block\.\d+\.layer\.0\.SelfAttention",
        inputs=_text_to_text,
        # With flex_attention it reads its bias, which has a batch of one, at every sequence of the batch.
        offers=("sdpa", "eager"),
        dense={"*": BIAS | {"LAYER_AMBIGUOUS"}},
    ),
    Model(
        "BART",
        lambda: hf.BartConfig(
            max_position_embeddings=512,
            forced_eos_token_id=None,
            **ENCODER_DECODER,
        ),
        hf.BartForConditionalGeneration,
        r"model\.decoder\.layers\.\d+\.self_attn",
        inputs=_text_to_text,
    ),
    Model(
        "Whisper",
        lambda: hf.WhisperConfig(
            num_mel_bins=8,
            max_source_positions=100,
            max_target_positions=512,
            **ENCODER_DECODER,
        ),
        hf.WhisperForConditionalGeneration,
        r"model\.decoder\.layers\.\d+\.self_attn",
        inputs=_speech_to_text,
    ),
    Model(
        "ViT (encoder)",
        lambda: hf.ViTConfig(**WIDTH, **IMAGE),
        hf.ViTModel,
        "",
        inputs=_image,
        outputs=_hidden,
        text=False,
        generates=False,
    ),
    Model(
        "SigLIP (encoders)",
        lambda: hf.SiglipConfig(
            text_config=WIDTH | dict(vocab_size=VOCABULARY, max_position_embeddings=128, projection_size=32),
            vision_config=WIDTH | IMAGE,
        ),
        hf.SiglipModel,
        "",
        inputs=_image_and_text,
        outputs=_towers,
        generates=False,
    ),
    Model(
        "CLIP (causal text tower)",
        lambda: hf.CLIPConfig(
            text_config=WIDTH | dict(vocab_size=VOCABULARY, max_position_embeddings=128, eos_token_id=2),
            vision_config=WIDTH | IMAGE,
            projection_dim=32,
        ),
        hf.CLIPModel,
        r"text_model\.(encoder\.)?layers\.\d+\.self_attn",
        inputs=_image_and_text,
        outputs=_towers,
        generates=False,
    ),
    Model(
        "LLaVA (CLIP and Llama)",
        lambda: hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**WIDTH, **IMAGE),
            text_config=hf.LlamaConfig(**TEXT),
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
        ),
        hf.LlavaForConditionalGeneration,
        r"model\.language_model\.layers\.\d+\.self_attn",
        inputs=_image_in_text,
    ),
)
