"""Counters in vLLM's metrics endpoint, which another process than the workers answers.

What became of a finished request's prompt follows from its length and from how much of it was cached, which vLLM tells
there; so nothing has to be sent between processes.
"""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter
from vllm.platforms import current_platform
from vllm.v1.metrics.loggers import StatLoggerBase, StatLoggerManager

from tmx_compile.integrations.vllm.counts import why_dense
from tmx_compile.integrations.vllm.rows import first_dense_row
from tmx_compile.integrations.vllm.settings import handed_over
from tmx_compile.integrations.vllm.wrap import wrap
from tmx_compile.report import Reason


def install() -> None:
    """Add our counters to the loggers of engines that have TriangleMix on, where they log at all."""
    wrap(StatLoggerManager, "__init__", _with_counters)


def _with_counters(plain: Any) -> Any:
    def __init__(
        self: Any, vllm_config: Any, engine_idxs: Any = None, custom_stat_loggers: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if handed_over(vllm_config.additional_config) is not None:
            custom_stat_loggers = [*(custom_stat_loggers or []), Prompts]
        plain(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    return __init__


@functools.cache
def counters() -> tuple[Counter, Counter]:
    """Of this process, for tokens and requests. Not named ``vllm:``: what is, vLLM takes out when it makes its own."""
    labels = ["model_name", "engine"]
    tokens = "Tokens of finished requests' prompts: rows that streamed in triangle layers, dense rows, cached tokens."
    requests = "Finished requests: those whose prompts are long enough for triangle layers, others by the reason."
    return (
        Counter("trianglemix:prompt_tokens", tokens, ["kind", *labels]),
        Counter("trianglemix:requests", requests, ["outcome", *labels]),
    )


class Prompts(StatLoggerBase):
    """Counts the prompts of finished requests, for one engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        settings = handed_over(vllm_config.additional_config)
        assert settings is not None
        self._limit, self._least = settings.limit(current_platform.device_type), settings.config.min_seq_len
        self._last = settings.config.num_last_tokens
        labels = vllm_config.model_config.served_model_name, str(engine_index)
        tokens, requests = counters()
        self._kinds = {kind: tokens.labels(kind, *labels) for kind in ("triangle", "dense", "cached")}
        outcomes = ("triangle", Reason.SHORT_PROMPT.name, Reason.NOT_FASTER.name)
        self._outcomes = {outcome: requests.labels(outcome, *labels) for outcome in outcomes}

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM after every step."""
        for request in () if iteration_stats is None else iteration_stats.finished_requests:
            # How far one that was given up came is not told.
            if request.finish_reason.name not in ("ABORT", "ERROR"):
                self._outcomes[self.outcome(request.num_prompt_tokens)].inc()
                for kind, tokens in self.split(request.num_prompt_tokens, request.num_cached_tokens).items():
                    self._kinds[kind].inc(tokens)

    def split(self, prompt: int, cached: int) -> dict[str, int]:
        """What became of a prompt's tokens, of which some were cached."""
        streamed = max(first_dense_row(prompt, self._limit, self._last) - cached, 0)
        return {"triangle": streamed, "dense": prompt - cached - streamed, "cached": cached}

    def outcome(self, prompt: int) -> str:
        """ "triangle", or the reason why a prompt of so many tokens is dense as a whole."""
        if first_dense_row(prompt, self._limit, self._last):
            return "triangle"
        # One that is all last rows is short, wherever the limit is.
        return (why_dense(prompt, self._least, self._limit) or Reason.SHORT_PROMPT).name

    def log_engine_initialized(self) -> None:
        """Called by vLLM; the workers have said it."""
