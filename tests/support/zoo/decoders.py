"""More decoders of the zoo: hybrids of attention and recurrent layers, and those that came later."""

from __future__ import annotations

from typing import Any

import transformers as hf

from tests.support.zoo.models import EXPERTS, LLAMA_STYLE, MODELS, TEXT, WINDOW, Model

_TWO = ["sliding_attention", "full_attention"]
_LATENT = dict(
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
)
# One layer of each kind: a recurrent one is hundreds of operations to Dynamo.
_LINEAR = dict(
    head_dim=8,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
_MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=32)
SECOND = r"model\.layers\.1\.self_attn"
OWN_MASK = frozenset({"MASK_UNKNOWN", "FLOAT_BIAS", "NOT_CAUSAL", "POSITIONS_UNKNOWN"})


def _decoder(
    title: str,
    name: str,
    config: str = "",
    causal: str = LLAMA_STYLE,
    *,
    reference: str = "",
    dense: Any = None,
    **changes: Any,
) -> Model:
    of, kind = getattr(hf, f"{name}ForCausalLM"), getattr(hf, f"{config or name}Config")
    return Model(
        title,
        lambda: kind(**(TEXT | changes)),
        of,
        causal,
        offers=("sdpa", "tmx"),
        reference=reference,
        dense=dense or {},
        brief=True,
    )


DECODERS: tuple[Model, ...] = (
    _decoder("Qwen3-Next", "Qwen3Next", num_experts=4, shared_expert_intermediate_size=24, **EXPERTS, **_LINEAR),
    _decoder("Qwen3.5", "Qwen3_5", "Qwen3_5Text", **_LINEAR),
    _decoder(
        "Qwen3.5-MoE",
        "Qwen3_5Moe",
        "Qwen3_5MoeText",
        num_experts=4,
        shared_expert_intermediate_size=24,
        **EXPERTS,
        **_LINEAR,
    ),
    _decoder("Falcon-H1", "FalconH1", mamba_d_ssm=64, **_MAMBA),
    _decoder(
        "Granite 4 hybrid",
        "GraniteMoeHybrid",
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        num_experts_per_tok=4,
        shared_intermediate_size=48,
        **_MAMBA,
    ),
    _decoder(
        "Jamba",
        "Jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=4,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    _decoder("Bamba", "Bamba", attn_layer_indices=[1], **_MAMBA),
    _decoder(
        "Nemotron-H",
        "NemotronH",
        causal=r"model\.layers\.[13]\.mixer",
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention"] * 2,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=32,
        head_dim=8,
        use_mamba_kernels=False,
    ),
    _decoder("LFM2", "Lfm2", num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2),
    _decoder(
        "OLMo hybrid",
        "OlmoHybrid",
        **(_LINEAR | dict(linear_num_key_heads=4, num_key_value_heads=4)),
    ),
    _decoder(
        "Kimi-Linear",
        "KimiLinear",
        causal=SECOND,
        layer_types=["linear_attention", "full_attention"],
        **_LATENT,
        **EXPERTS,
    ),
    _decoder(
        "MiniMax",
        "MiniMax",
        causal=SECOND,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=4,
        block_size=32,
    ),
    _decoder("MiniMax-M2", "MiniMaxM2", head_dim=8, num_local_experts=4, num_experts_per_tok=4),
    _decoder(
        "Gemma 3n",
        "Gemma3n",
        "Gemma3nText",
        head_dim=8,
        sliding_window=WINDOW,
        num_hidden_layers=4,
        layer_types=_TWO * 2,
        num_kv_shared_layers=0,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=100,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=[48] * 4,
        altup_num_inputs=2,
    ),
    _decoder(
        "Gemma 4",
        "Gemma4",
        "Gemma4Text",
        head_dim=8,
        global_head_dim=16,
        sliding_window=WINDOW,
        num_hidden_layers=4,
        layer_types=_TWO * 2,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=100,
    ),
    _decoder(
        "Llama 4 (chunked layers)",
        "Llama4",
        "Llama4Text",
        head_dim=8,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=4,
        intermediate_size_mlp=48,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"] * 2,
        dense={"*": frozenset({"triangle", "MASK_UNKNOWN"})},
    ),
    _decoder("GLM-4", "Glm4", head_dim=8),
    _decoder("GLM-4.5 (MoE)", "Glm4Moe", head_dim=8, n_routed_experts=4, first_k_dense_replace=1, **EXPERTS),
    _decoder("SeedOss", "SeedOss", head_dim=8),
    _decoder("OLMo 3", "Olmo3", sliding_window=WINDOW, layer_types=_TWO),
    _decoder("Apertus", "Apertus"),
    _decoder("EXAONE 4", "Exaone4", sliding_window=WINDOW, sliding_window_pattern=2, layer_types=_TWO),
    _decoder("Cohere 2", "Cohere2", sliding_window=WINDOW, layer_types=_TWO),
    _decoder("Ministral 3", "Ministral3", head_dim=8),
    _decoder("ERNIE 4.5", "Ernie4_5", head_dim=8),
    _decoder("Arcee", "Arcee"),
    _decoder(
        "DeepSeek-V3.2 (picks its keys)",
        "DeepseekV32",
        reference="itself",
        index_topk=30,
        index_n_heads=2,
        index_head_dim=16,
        dense={"*": OWN_MASK},
        **_LATENT,
        **EXPERTS,
    ),
    _decoder(
        "GLM-5 (picks its keys)",
        "GlmMoeDsa",
        reference="itself",
        index_topk=30,
        index_n_heads=2,
        index_head_dim=16,
        dense={"*": OWN_MASK},
        **_LATENT,
        **EXPERTS,
    ),
)
ZOO: tuple[Model, ...] = (*MODELS, *DECODERS)
