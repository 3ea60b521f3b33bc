"""Transformers: TriangleMix as an attention implementation, and KV caches whose triangle layers keep sinks and window,
and prompts that are split over processes.

Imports Transformers, which the rest of the package does without.
"""

from tmx_compile.integrations.transformers.attention import TriangleAttention, register_attention
from tmx_compile.integrations.transformers.caches import StaticStreamingCache, StreamingCache
from tmx_compile.integrations.transformers.split_prompt import SplitPrompt

__all__ = ["SplitPrompt", "StaticStreamingCache", "StreamingCache", "TriangleAttention", "register_attention"]
