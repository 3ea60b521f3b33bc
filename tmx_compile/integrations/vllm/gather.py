"""Keys and values that streaming rows need from the engine's pages, in memory that steps and layers share.

A chunk's rows see ``[sinks | window before the chunk | the chunk]``. Laid side by side these are a problem of the
operator's usual kind: distances inside the window stay what they are, and a sink is seen from everywhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tmx_compile.integrations.vllm.rows import Streaming, spans_before
from tmx_compile.mask.geometry import Geometry

Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(blocks (n,), slots (n,)) -> keys and values (n, Hkv, D) of these tokens of a layer's cache."""


@dataclass
class Places:
    """Where the earlier tokens lie that a chunk's rows see.

    Attributes:
        table: (blocks,) the request's row of the block table.
        size: tokens of a block.
        tokens: how many there are.
        sinks: how many of them are the sequence's first.
        low: where the others begin in the sequence.
    """

    table: Tensor
    size: int
    tokens: int
    sinks: int
    low: int

    @functools.cached_property
    def at(self) -> tuple[Tensor, Tensor]:
        """Their blocks (n,) and slots inside these (n,), int64 on the table's device: for all layers made once."""
        # One after another on the device itself: nothing is copied there, and nothing waits.
        token = torch.arange(self.tokens, device=self.table.device)
        token = torch.where(token < self.sinks, token, token - self.sinks + self.low)
        return self.table[token // self.size].long(), token % self.size


def places(part: Streaming, table: Tensor, block_size: int, geometry: Geometry) -> Places | None:
    """Where the tokens before a chunk lie that its rows see; None: there are none.

    Args:
        part: the chunk.
        table: (blocks,) the request's row of the block table.
        block_size: tokens of a block.
        geometry: its sinks and window count here.
    """
    spans = spans_before(part.position, geometry)
    if not spans:
        return None
    sinks = spans[0][1] if spans[0][0] == 0 else 0
    return Places(table, block_size, sum(end - begin for begin, end in spans), sinks, spans[-1][0])


def from_packed(
    kv_cache: Tensor, kv_heads: int, head_size: int, blocks: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values (n, Hkv, D) from a cache (blocks, Hkv, size, 2 D) whose tokens have key and value side by side.

    Raises:
        RuntimeError: the cache is not laid out so.
    """
    check_packed(kv_cache, kv_heads, head_size)
    found = kv_cache[blocks, :, slots]
    return found[..., :head_size], found[..., head_size:]


def together(
    kv_cache: Tensor, head_size: int, earlier: Places, key: Tensor, value: Tensor, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """As :func:`seen`, from a cache as of :func:`from_packed`, by one launch of a kernel of Triton.

    Raises:
        RuntimeError: the cache is not laid out so.
    """
    check_packed(kv_cache, key.shape[1], head_size)
    keys, values = scratch.take(earlier.tokens + key.shape[0], key)
    _kernel()(kv_cache, earlier.table, (earlier.tokens, earlier.sinks, earlier.low), key, value, keys, values)
    return keys, values


# Needs Triton, which is not where vLLM serves on a CPU.
@functools.cache
def _kernel() -> Callable[..., None]:
    found: Callable[..., None] = importlib.import_module("tmx_compile.lowering.triton.together").put_together
    return found


def check_packed(kv_cache: Tensor, kv_heads: int, head_size: int) -> None:
    """Raise ``RuntimeError`` unless a cache is (blocks, Hkv, size, 2 D)."""
    if kv_cache.dim() != 4 or kv_cache.shape[1] != kv_heads or kv_cache.shape[3] != 2 * head_size:
        raise RuntimeError(
            f"vLLM's cache must be (blocks, {kv_heads}, size, {2 * head_size}), got {tuple(kv_cache.shape)}"
        )


class Scratch:
    """Memory for keys and values of one chunk at a time, kept from step to step and shared by all layers."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens, Hkv, D) of whatever was there before, in ``like``'s dtype; valid until the next."""
        heads, dim = like.shape[1:]
        need = 2 * tokens * heads * dim
        memory = self._memory
        if memory is None or memory.numel() < need or memory.dtype != like.dtype or memory.device != like.device:
            self._memory = memory = torch.empty(need, dtype=like.dtype, device=like.device)
        both = memory[:need].view(2, tokens, heads, dim)
        return both[0], both[1]


def seen(read: Read, earlier: Places | None, key: Tensor, value: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Keys and values (n, Hkv, D) that a chunk's rows see, the chunk's own last.

    Args:
        read: takes tokens out of the layer's cache.
        earlier: where the tokens before the chunk lie; None: the chunk is all that there is.
        key, value: (rows, Hkv, D) of the chunk, as the step computed them.
        scratch: where they are put together.
    """
    if earlier is None:
        return key, value
    before = earlier.tokens
    found = scratch.take(before + key.shape[0], key)
    for out, part, own in zip(found, read(*earlier.at), (key, value), strict=True):
        out[:before] = part
        out[before:] = own
    return found
