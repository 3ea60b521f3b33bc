"""Which layers of a served model go sparse, and the reasons of the others."""

from __future__ import annotations

import pytest

from tmx_compile import TriangleMixConfig
from tmx_compile.integrations.vllm.layers import LayerFacts, judge, layer_number
from tmx_compile.report import Accepted, Reason, Rejected

CONFIG = TriangleMixConfig(triangle_layer_indices=[1])
NAME = "model.layers.1.self_attn.attn"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (NAME, 1),
        ("language_model.model.layers.31.self_attn.attn", 31),
        ("model.text_model.layers.3.self_attn.attn", 3),
        ("llm.model.layers.2.self_attn.attn", 2),
        ("transformer.h.0.attn.attn", 0),
        ("model.decoder.layers.5.self_attn.attn", 5),
        ("draft_model.model.layers.1.self_attn.attn", None),
        ("visual.blocks.1.attn.attn", None),
        ("vision_tower.model.layers.1.self_attn.attn", None),
        ("text_model.encoder.layers.1.self_attn.attn", None),
        ("model.layers.1.mtp_block.self_attn.attn", None),
        ("model.layers.1.cross_attn.attn", None),
        ("model.encoder.layers.1.self_attn.attn", None),
        ("model.layers.1.self_attn.attn.more", None),
        ("model.layers.x.self_attn.attn", None),
    ],
)
def test_names(name, number):
    assert layer_number(name) == number


def test_a_plain_layer_that_was_chosen_goes_sparse():
    assert judge(LayerFacts(NAME), CONFIG) == Accepted()
    assert judge(LayerFacts(NAME, cache_dtype="bfloat16"), CONFIG) == Accepted()


@pytest.mark.parametrize(
    ("facts", "reason", "words"),
    [
        (LayerFacts("draft_model." + NAME), Reason.LAYER_UNKNOWN, "draft_model"),
        (LayerFacts("model.layers.0.self_attn.attn", alibi=True), Reason.NOT_SELECTED, ""),
        (LayerFacts(NAME, causal=False), Reason.NOT_CAUSAL, "cross attention"),
        (LayerFacts(NAME, alibi=True), Reason.FLOAT_BIAS, "ALiBi"),
        (LayerFacts(NAME, softcap=True), Reason.SCORE_CHANGED, "softcap"),
        (LayerFacts(NAME, learned_sinks=True), Reason.SCORE_CHANGED, "learned sinks"),
        (LayerFacts(NAME, window=127), Reason.WINDOWED, "128 keys"),
        (LayerFacts(NAME, kind="ChunkedLocalAttention"), Reason.NO_LOWERING, "ChunkedLocalAttention is a kind"),
        (LayerFacts(NAME, shared_cache="model.layers.0"), Reason.KV_CACHE, "model.layers.0"),
        (LayerFacts(NAME, cache_dtype="fp8_e4m3"), Reason.KV_CACHE, "fp8_e4m3"),
        (LayerFacts(NAME, split_context=True), Reason.KV_CACHE, "several devices"),
        (LayerFacts(NAME, lowering=Rejected(Reason.NO_LOWERING, "head dim")), Reason.NO_LOWERING, "head dim"),
    ],
)
def test_reasons(facts, reason, words):
    answer = judge(facts, CONFIG)
    assert isinstance(answer, Rejected)
    assert answer.reason is reason
    assert words in answer.detail
