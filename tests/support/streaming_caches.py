"""The caches that shrink, each as the tests make it."""

import pytest

from tests.support.serving import CONFIG
from tmx_compile.integrations.transformers import StaticStreamingCache, StreamingCache

SINK, WINDOW, _ = CONFIG.geometry.counts
HELD = SINK + WINDOW + 1


def dynamic(model, config=CONFIG, **kwargs):
    return StreamingCache(model, config, **kwargs)


def static(model, config=CONFIG, **kwargs):
    return StaticStreamingCache(model, config, max_cache_len=256, **kwargs)


KINDS = pytest.mark.parametrize("make", [dynamic, static])
