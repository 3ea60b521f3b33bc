"""KV caches for Transformers whose triangle layers keep only sinks and window once the prompt is read.

Imports Transformers, which the rest of the package does without.
"""

from tmx_compile.integrations.transformers.caches import StaticStreamingCache, StreamingCache

__all__ = ["StaticStreamingCache", "StreamingCache"]
