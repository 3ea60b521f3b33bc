"""The caches, a layer of the right kind for each of the model, and the hooks that give those a fitting mask."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache, StaticLayer

from tmx_compile.config import TriangleMixConfig, as_count
from tmx_compile.config.prices import streaming_message
from tmx_compile.integrations.transformers.layer import StreamingLayer
from tmx_compile.integrations.transformers.ring import RingLayer
from tmx_compile.legacy.inference import TriangleMixInferenceConfig

_HOOKED = "_tmx_streaming_hook"
_IMPLEMENTATIONS = ("sdpa", "eager")
# What attention modules call the cache that they are given.
_CACHE_NAMES = ("past_key_values", "layer_past")


class _Streaming:
    """What both caches tell about themselves."""

    layers: list[Any]

    @property
    def streaming_layers(self) -> tuple[int, ...]:
        """The layers that keep sinks and window only, in a :class:`StreamingCache` once decoding has begun."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, (StreamingLayer, RingLayer)))

    def memory_bytes(self) -> tuple[int, ...]:
        """Bytes that each layer's keys and values hold on to right now, whole storages counted."""
        held = [[x for x in (layer.keys, layer.values) if x is not None] for layer in self.layers]
        return tuple(sum(x.untyped_storage().nbytes() for x in tensors) for tensors in held)


class StreamingCache(_Streaming, DynamicCache):
    """A ``DynamicCache`` whose triangle layers keep everything for the prompt, then sinks and window only.

    ``model.generate(**inputs, past_key_values=StreamingCache(model, config))``, compiled or not, on any device. The
    other layers are those of ``DynamicCache``. So are triangle layers with a sliding window of their own: they are
    short already.

    A triangle layer begins to stream with the first call that brings one row to a cache that holds something; from then
    on every row, those of a continued conversation too, attends to sinks and window there. The quality that costs is
    the price of the memory: docs/serving.md.

    Args:
        model: a decoder-only Transformers model with ``attn_implementation`` "sdpa" or "eager". Its attention modules
            get a hook that cuts the mask to the held keys; it does nothing for other caches.
        config: which layers stream, with ``num_sink_tokens`` and ``sliding_window_size``. ``num_last_tokens`` and
            ``min_seq_len`` belong to the prompt and play no part.
        prompt_tokens: the prompt's length, padding included. Needed where a chunk of the prompt may be one token long.

    Raises:
        ValueError: a configuration without layers or with layers that the model lacks, another ``attn_implementation``,
            or a model in which a layer's attention cannot be told.

    Warns:
        UserWarning: once per program line, what streaming costs.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.integrations.transformers import StreamingCache
    >>> shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> cache = StreamingCache(model, TriangleMixConfig(4, 8, 0, triangle_layer_indices=[1]))
    >>> cache.streaming_layers
    (1,)
    >>> out = model.generate(torch.randint(0, 50, (1, 60)), past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    >>> [layer.keys.shape[2] for layer in cache.layers]  # 4 sinks, the window of 8, the row itself
    [63, 13]
    """

    def __init__(
        self,
        model: nn.Module,
        config: TriangleMixConfig | TriangleMixInferenceConfig,
        *,
        prompt_tokens: int | None = None,
    ) -> None:
        effective, wanted = _wanted(model, config)
        if prompt_tokens is not None:
            prompt_tokens = as_count("prompt_tokens", prompt_tokens)
        super().__init__(config=model.config)
        for index in wanted:
            if type(self.layers[index]) is DynamicLayer:
                self.layers[index] = StreamingLayer(
                    effective.num_sink_tokens, effective.sliding_window_size, prompt_tokens
                )
        _attach(model, self.streaming_layers)
        warnings.warn(streaming_message(len(self.streaming_layers), len(self.layers), effective), stacklevel=2)


class StaticStreamingCache(_Streaming, StaticCache):
    """A ``StaticCache`` whose triangle layers are rings of sinks and window, for compiled decoding.

    The prompt comes in one call (a triangle layer's rows see all of it), then one token a call, in tensors whose sizes
    and addresses stay. Chunks, continued prompts and assisted generation need :class:`StreamingCache`.

    Args:
        model: as in :class:`StreamingCache`.
        config: as in :class:`StreamingCache`.
        max_cache_len: the most tokens of prompt and generation together.

    Raises:
        ValueError: as in :class:`StreamingCache`.

    Warns:
        UserWarning: once per program line, what streaming costs.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tmx_compile import TriangleMixConfig
    >>> from tmx_compile.integrations.transformers import StaticStreamingCache
    >>> shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape)).eval()
    >>> config = TriangleMixConfig(4, 8, 0, triangle_layer_indices=[1])
    >>> cache = StaticStreamingCache(model, config, max_cache_len=64)
    >>> out = model.generate(torch.randint(0, 50, (1, 60)), past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    >>> out.shape, cache.memory_bytes()  # 64 tokens, and 4 + 8 + 1, of 2 x 32 float32
    (torch.Size([1, 64]), (16384, 3328))
    """

    def __init__(
        self, model: nn.Module, config: TriangleMixConfig | TriangleMixInferenceConfig, *, max_cache_len: int
    ) -> None:
        effective, wanted = _wanted(model, config)
        max_cache_len = as_count("max_cache_len", max_cache_len, 1)
        super().__init__(config=model.config, max_cache_len=max_cache_len)
        sink, window = effective.num_sink_tokens, effective.sliding_window_size
        for index in wanted:
            # Where the ring would be no shorter there is nothing to leave out either.
            if type(self.layers[index]) is StaticLayer and sink + window + 1 < max_cache_len:
                self.layers[index] = RingLayer(max_cache_len, sink, window)
        _attach(model, self.streaming_layers)
        warnings.warn(streaming_message(len(self.streaming_layers), len(self.layers), effective), stacklevel=2)


def _wanted(
    model: nn.Module, config: TriangleMixConfig | TriangleMixInferenceConfig
) -> tuple[TriangleMixConfig, tuple[int, ...]]:
    """The effective configuration and its layers, checked against the model."""
    effective = config.to_trianglemix_config() if isinstance(config, TriangleMixInferenceConfig) else config
    if not isinstance(effective, TriangleMixConfig):
        raise ValueError(f"config must be a TriangleMixConfig or an enabled TriangleMixInferenceConfig, got {config!r}")
    wanted = tuple(effective.layers())
    if not wanted:
        raise ValueError("the configuration selects no layer: a DynamicCache does the same")
    settings: Any = model.config
    if getattr(settings, "is_encoder_decoder", False):
        raise ValueError(f"streaming caches are for decoder-only models, got {type(model).__name__}")
    implementation = settings._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation must be one of {', '.join(_IMPLEMENTATIONS)}, got {implementation!r}")
    layers = settings.get_text_config(decoder=True).num_hidden_layers
    beyond = [index for index in wanted if index >= layers]
    if beyond:
        raise ValueError(f"the configuration names layers {beyond}, and the model has layers 0-{layers - 1}")
    return effective, wanted


def _attach(model: nn.Module, layers: tuple[int, ...]) -> None:
    """Hook the attention module of every streaming layer, once."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and not isinstance(index, bool) and _places(module) is not None:
            # A decoder layer may carry its number and take a cache as well: the module further in is the attention.
            outer = [m for m in found.get(index, []) if any(x is module for x in m.modules())]
            found[index] = [m for m in found.get(index, []) if all(m is not o for o in outer)] + [module]
    for index in layers:
        modules = found.get(index, [])
        if len(modules) != 1:
            raise ValueError(
                f"layer {index} of {type(model).__name__} has {len(modules)} modules that take a mask and a cache: "
                "its attention cannot be told"
            )
        if not hasattr(modules[0], _HOOKED):
            places = _places(modules[0])
            assert places is not None
            hook = modules[0].register_forward_pre_hook(_hook(index, places), with_kwargs=True)
            setattr(modules[0], _HOOKED, hook)


@dataclass(frozen=True)
class _Places:
    """Where a module's forward takes the mask and the cache."""

    mask: int
    cache: int
    cache_name: str


def _places(module: nn.Module) -> _Places | None:
    """The places, or None where a module takes not both."""
    names = list(inspect.signature(module.forward).parameters)
    caches = [name for name in _CACHE_NAMES if name in names]
    if "attention_mask" not in names or not caches:
        return None
    return _Places(names.index("attention_mask"), names.index(caches[0]), caches[0])


def _hook(index: int, at: _Places) -> Callable[..., Any]:
    """Before a layer's attention: the mask over all keys becomes one over the keys that its cache layer returns."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get(at.cache_name, args[at.cache] if len(args) > at.cache else None)
        if not isinstance(cache, (StreamingCache, StaticStreamingCache)):
            return None
        layer = cache.layers[index]
        if not isinstance(layer, (StreamingLayer, RingLayer)):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        by_place = len(args) > at.mask
        mask = args[at.mask] if by_place else kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 4:
            raise ValueError(f"expected a mask of shape (batch, 1, rows, keys), got {tuple(mask.shape)}")
        fitting = layer.mask_for(mask, hidden.shape[1], hidden.device)
        if by_place:
            return (*args[: at.mask], fitting, *args[at.mask + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": fitting}

    return before
