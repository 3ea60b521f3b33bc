"""The scheduler's side: which cached blocks a new prompt may use.

Two prompts with the same beginning need not have the same keys there: in a prompt over the limit most rows streamed, in
a short one none did, and its last rows saw every key. So

- a hit never covers last rows of the new prompt, which are computed anew;
- prompts over the limit and others find each other's blocks no more than those of another salt.

What is left: rows that were last rows, or generated, in an earlier long prompt saw every key, and are used as they are
by a longer prompt that begins with it. That is more than the triangle mask of the new prompt would show them, not less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore

from tmx_compile.integrations.vllm.rows import first_dense_row
from tmx_compile.integrations.vllm.settings import handed_over
from tmx_compile.integrations.vllm.wrap import wrap

_RULE = "trianglemix_rule"


class Rule:
    """Which blocks a request may find, for one engine."""

    def __init__(self, config: Any) -> None:
        settings = handed_over(config.additional_config)
        self.limit = 2**62 if settings is None else settings.limit(current_platform.device_type)
        self.last = 0 if settings is None else settings.config.num_last_tokens
        self.salt = "" if settings is None else f"trianglemix:{settings.config.fingerprint()[:16]}"

    def is_long(self, request: Any) -> bool:
        """Whether rows of the request's prompt stream."""
        return first_dense_row(request.num_prompt_tokens, self.limit, self.last) > 0

    def longest_hit(self, request: Any) -> int:
        """How many tokens of a request may come from the cache (a request that is not long: any number)."""
        return first_dense_row(request.num_prompt_tokens, self.limit, self.last) or 2**62

    def salted(self, hasher: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A hasher of a request's blocks that gives long prompts a salt of their own, in addition to theirs."""

        def hash_blocks(request: Any) -> Any:
            # The hash of the first block goes into those of all others.
            if request.block_hashes or not self.is_long(request):
                return hasher(request)
            salt = request.cache_salt
            request.cache_salt = f"{self.salt}:{salt}" if salt else self.salt
            try:
                return hasher(request)
            finally:
                request.cache_salt = salt

        setattr(hash_blocks, _RULE, self)
        return hash_blocks


def install() -> None:
    """Wrap what looks blocks up and what hashes them; engines without TriangleMix in the process see no difference."""
    wrap(Scheduler, "__init__", _with_rule)
    wrap(KVCacheManager, "get_computed_blocks", _capped)
    wrap(EngineCore, "preprocess_add_request", _with_salt)


def _with_rule(plain: Any) -> Any:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, vllm_config, *args, **kwargs)
        if handed_over(vllm_config.additional_config) is not None:
            setattr(self.kv_cache_manager, _RULE, Rule(vllm_config))

    return __init__


def _capped(plain: Any) -> Any:
    def get_computed_blocks(self: Any, request: Any) -> Any:
        rule = getattr(self, _RULE, None)
        if rule is None or not rule.is_long(request):
            return plain(self, request)
        coordinator, most = self.coordinator, rule.longest_hit(request)
        find = coordinator.find_longest_cache_hit
        # Inside, because what is looked up is also what is counted and what the blocks are taken from.
        coordinator.find_longest_cache_hit = lambda hashes, length: find(hashes, min(length, most))
        try:
            return plain(self, request)
        finally:
            del coordinator.find_longest_cache_hit

    return get_computed_blocks


def _with_salt(plain: Any) -> Any:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        hasher = self.request_block_hasher
        if hasher is not None and not hasattr(hasher, _RULE) and handed_over(self.vllm_config.additional_config):
            self.request_block_hasher = Rule(self.vllm_config).salted(hasher)
        return plain(self, request)

    return preprocess_add_request
