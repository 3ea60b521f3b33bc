"""Which attention layers of a served model may go sparse: told from their names and from what they ask of a backend.

No vLLM here: :class:`LayerFacts` is what the plugin knows of one of its layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tmx_compile.config import TriangleMixConfig
from tmx_compile.report import Accepted, Reason, Rejected

# Whole names, so that draft models (draft_model.model.layers.0...), multi-token predictors and towers for pictures and
# sound stay out.
_NAME = re.compile(
    r"(?:language_model\.|llm\.)?"
    r"(?:model|model\.decoder|model\.text_model|transformer|gpt_neox)\.(?:layers|h)\.([0-9]+)\."
    r"(?:self_attn|self_attention|attention|attn)\.attn"
)
_PLAIN_CACHES = ("auto", "bfloat16", "float16", "float32")


def layer_number(name: str) -> int | None:
    """The number of a decoder layer, from 0, by the full name of its attention; None: the name is no decoder layer's.

    ``model.layers.7.self_attn.attn`` is layer 7. A draft model whose layers are numbered behind the model's (EAGLE)
    names layers that no configuration for the model can name.
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class LayerFacts:
    """What one attention layer is, as its backend is told.

    Attributes:
        name: its full name in the model.
        kind: its class; another one than vLLM's plain attention changes the mask, the cache or the rows of a step.
        causal: whether it is a decoder's attention to its own sequence, with a prefix that is causal too.
        alibi: whether distances are added to the scores.
        softcap: whether scores are capped.
        learned_sinks: whether the softmax has a learned term.
        window: how many keys before its own a row sees; None: all.
        cache_dtype: what the engine was told to keep keys and values in; "auto": as the model has them.
        shared_cache: the layer whose cache this one reads; None: its own.
        split_context: whether keys of one request lie on several devices (context parallelism).
        lowering: why no lowering takes its tensors; None: one does.
    """

    name: str
    kind: str = "Attention"
    causal: bool = True
    alibi: bool = False
    softcap: bool = False
    learned_sinks: bool = False
    window: int | None = None
    cache_dtype: str = "auto"
    shared_cache: str | None = None
    split_context: bool = False
    lowering: Rejected | None = None


def judge(facts: LayerFacts, config: TriangleMixConfig) -> Accepted | Rejected:
    """Whether a layer's long prompts go sparse, or the first reason why not."""
    number = layer_number(facts.name)
    if number is None:
        return Rejected(Reason.LAYER_UNKNOWN, f"{facts.name} is not the name of a decoder layer's attention")
    if not config.is_triangle_layer(number):
        return Rejected(Reason.NOT_SELECTED)
    if not facts.causal:
        return Rejected(Reason.NOT_CAUSAL, "an encoder's, a cross attention or a prefix that sees itself whole")
    if facts.alibi:
        return Rejected(Reason.FLOAT_BIAS, "ALiBi")
    if facts.softcap or facts.learned_sinks:
        return Rejected(Reason.SCORE_CHANGED, "a softcap" if facts.softcap else "learned sinks")
    if facts.window is not None:
        return Rejected(Reason.WINDOWED, f"a sliding window of {facts.window + 1} keys")
    if facts.kind != "Attention":
        return Rejected(Reason.NO_LOWERING, f"{facts.kind} is a kind of attention of its own")
    if facts.shared_cache is not None:
        return Rejected(Reason.KV_CACHE, f"it reads the cache of {facts.shared_cache}")
    if facts.cache_dtype not in _PLAIN_CACHES:
        return Rejected(Reason.KV_CACHE, f"kv_cache_dtype={facts.cache_dtype}")
    if facts.split_context:
        return Rejected(Reason.KV_CACHE, "context parallelism keeps a request's keys on several devices")
    return facts.lowering or Accepted()
