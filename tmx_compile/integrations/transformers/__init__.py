"""Transformers: TriangleMix as an attention implementation, and KV caches whose triangle layers keep sinks and window.

Imports Transformers, which the rest of the package does without.
"""

from tmx_compile.integrations.transformers.attention import TriangleAttention, register_attention
from tmx_compile.integrations.transformers.caches import StaticStreamingCache, StreamingCache

__all__ = ["StaticStreamingCache", "StreamingCache", "TriangleAttention", "register_attention"]
