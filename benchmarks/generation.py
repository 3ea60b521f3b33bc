"""One variant of a model, compiled, that reads a prompt and generates after it: what throughput.py times."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.shapes import CAUSAL, check_layers, lowerings
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.integrations.transformers import StreamingCache


@dataclass(frozen=True)
class Variant:
    """How prompts and single rows are run. ``triangle``: by tmx_backend, which is told what ``decode`` does."""

    triangle: bool = False
    decode: str = "dense"
    shrinks: bool = False


VARIANTS = {
    "dense": Variant(),
    "triangle": Variant(triangle=True),
    "streaming": Variant(triangle=True, decode="streaming"),
    "streaming-cache": Variant(triangle=True, shrinks=True),
}


@dataclass(frozen=True)
class Run:
    """One prompt and what was generated after it."""

    prefill_s: float
    decode_s: float
    prompt_bytes: int
    end_bytes: int
    peak_gib: float | None
    chosen: Tensor
    graphs: int


class Runner:
    """One variant of a model, compiled: prompts, and rows of forced tokens behind them.

    Args:
        model: with the implementation ``CAUSAL``, for which no mask is made. It stays as it is.
        name: one of ``VARIANTS``.
        plan: ``layers``, the geometry of the deepest half of them, and ``min_seq_len``.
    """

    def __init__(self, model: nn.Module, name: str, plan: dict[str, Any]) -> None:
        # The caches' hooks and what Dynamo knows of a module are each variant's own; the weights are shared.
        shared = [*model.parameters(), *model.buffers()]
        self._model: Any = copy.deepcopy(model, {id(x): x for x in shared})
        self._variant, self._wanted = VARIANTS[name], plan["layers"] // 2
        geometry = {key: plan[key] for key in ("num_sink_tokens", "sliding_window_size", "num_last_tokens")}
        self._config = TriangleMixConfig.deepest(
            self._wanted, num_layers=plan["layers"], min_seq_len=plan["min_seq_len"], **geometry
        )
        self._backend: Any = None
        if self._variant.triangle:
            with _unwarned():
                self._backend = tmx_backend(self._config, decode=self._variant.decode, strict=True)
        self._compiled = torch.compile(self._model, backend=self._backend or "inductor", dynamic=True)

    def __call__(self, ids: Tensor, tokens: int) -> Run:
        """A prompt, the first ``tokens`` of ids (B, N), then one call for each other id but the last."""
        device = ids.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        graphs = counters["stats"]["unique_graphs"]
        prompt = ids[:, :tokens].contiguous()
        rows = [ids[:, at : at + 1].contiguous() for at in range(tokens, ids.shape[1] - 1)]
        start = _now(device)
        cache = self._cache()
        chosen = [self._step(prompt, cache)]
        middle = _now(device)
        prompt_bytes = memory_bytes(cache)
        again = _now(device)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
        chosen += [self._step(row, cache) for row in rows]
        end = _now(device)
        return Run(
            middle - start,
            end - again,
            prompt_bytes,
            memory_bytes(cache),
            torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
            torch.cat(chosen, 1).cpu(),
            counters["stats"]["unique_graphs"] - graphs,
        )

    def _step(self, ids: Tensor, cache: Any) -> Tensor:
        # All variants are one function to Dynamo, which compiles it so many times and no more.
        with torch._dynamo.config.patch(recompile_limit=64):
            logits = self._compiled(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        chosen: Tensor = logits.argmax(-1)
        return chosen

    def _cache(self) -> Any:
        from transformers import DynamicCache

        if not self._variant.shrinks:
            return DynamicCache(config=self._model.config)
        settings = self._model.config
        settings._attn_implementation = "sdpa"
        try:
            with _unwarned():
                return StreamingCache(self._model, self._config)
        finally:
            settings._attn_implementation = CAUSAL

    def check(self) -> None:
        """That the layers are what was asked for.

        Raises:
            RuntimeError: other layers than wanted are triangle layers, or stream.
        """
        kinds = ["triangle"] if self._variant.triangle else []
        kinds += ["streaming"] if self._variant.decode == "streaming" else []
        for kind in kinds:
            check_layers(self._backend, self._config.layers(), kind)

    def lowerings(self) -> str:
        """What the attention of all graphs became."""
        return lowerings(self._backend)


def memory_bytes(cache: Any) -> int:
    """Bytes that a cache's keys and values hold on to, by its own report where it has one."""
    if hasattr(cache, "memory_bytes"):
        return sum(cache.memory_bytes())
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Without the message that tells what streaming costs: this is where its gain is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="streaming decode")
        yield


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
