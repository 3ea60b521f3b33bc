"""One layer's sinks and window in tensors of fixed size and address, for compiled decoding with static shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from tmx_compile.integrations.transformers.masks import first_valid, limited, take


class RingLayer(StaticLayer):
    """The cache of a triangle layer under streaming decode: ``sink`` columns, then ``window + 1`` as a ring.

    The prompt comes in one call, whose rows are given all of it; every later call brings one token. The key at position
    p is at column ``sink + p mod (window + 1)``; a sink that the ring overwrites goes to its sink column.

    Args:
        max_cache_len: number of tokens that the whole cache is made for.
        sink: number of sink keys, counted from each sequence's first valid key.
        window: how far back a row sees.
    """

    is_sliding = False

    def __init__(self, max_cache_len: int, sink: int, window: int) -> None:
        super().__init__(max_cache_len=sink + window + 1)
        self.capacity = max_cache_len
        self.sink = sink
        self.size = window + 1
        self.filled = False
        self.settled = False  # every sink is in its column
        self._first: Tensor | None = None
        self.start: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate (B, Hkv, sink + window + 1, D) keys and values."""
        super().lazy_initialization(key_states, value_states)
        self.start = torch.zeros(key_states.shape[0], dtype=torch.int64, device=key_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.start)

    def mask_for(self, mask: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
        """The mask of the next call over the columns that :meth:`update` will return; see ``StreamingLayer``."""
        del device
        if not self.filled:
            self._first = None if mask is None else first_valid(mask)
            return mask if mask is None else mask[..., :rows]
        row = self.cumulative_length
        sinks, ring = self._positions(row)
        ring = ring.expand(sinks.shape[0], -1)
        kept = torch.cat([sinks < row - self.size + 1, ring >= sinks[:, :1] if self.sink else ring >= 0], 1)
        return limited(mask, kept[:, None, :], torch.cat([sinks, ring], 1))

    def _positions(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the columns once the row is in: (B, sink) and (1, window + 1); negative: nothing yet."""
        sinks = self.start[:, None] + torch.arange(self.sink, device=row.device)[None, :]
        slot = torch.arange(self.size, device=row.device)
        return sinks, (row - torch.remainder(row - slot, self.size))[None, :]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, rows, D) keys and values; returns the prompt's own, or the fixed columns.

        Raises:
            ValueError: more than one row after the prompt, or more tokens than the cache is made for.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows = key_states.shape[-2]
        if not self.filled:
            if rows > self.capacity:
                raise ValueError(f"max_cache_len={self.capacity} is less than the prompt's {rows} tokens")
            self._fill(key_states, value_states)
            return key_states, value_states
        if rows != 1:
            raise ValueError(
                f"{rows} tokens at once: a static streaming cache takes the prompt in one call and then one token a "
                "call; use StreamingCache for chunks, continued prompts and assisted generation"
            )
        row = self.cumulative_length
        slot = (self.sink + torch.remainder(row, self.size)).reshape(1)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            if not self.settled and self.sink:
                leaving = row - self.size - self.start[:, None] == torch.arange(self.sink, device=row.device)
                old = held.index_select(2, slot)
                held[:, :, : self.sink].copy_(torch.where(leaving[:, None, :, None], old, held[:, :, : self.sink]))
            held.index_copy_(2, slot, new)
        self.cumulative_length.add_(1)
        return self.keys, self.values

    def _fill(self, key_states: Tensor, value_states: Tensor) -> None:
        rows = key_states.shape[-2]
        self.filled = True
        if self._first is not None:
            self.start.copy_(self._first)
        self.settled = self._first is None and rows >= self.sink + self.size
        position = torch.arange(max(0, rows - self.size), rows, device=key_states.device)
        slot = self.sink + torch.remainder(position, self.size)
        column = self.start[:, None] + torch.arange(self.sink, device=key_states.device)[None, :]
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held[:, :, : self.sink].copy_(take(new, column.clamp(max=rows - 1)))
            held.index_copy_(2, slot, new.index_select(2, position))
        self.cumulative_length.add_(rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a static layer that holds everything."""
        return self.capacity, 0

    def get_max_length(self) -> int:
        """Tokens that the cache is made for."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; the tensors stay where they are."""
        super().reset()
        self.filled = self.settled = False
        self._first = None
        if self.is_initialized:
            self.start.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence b becomes what sequence ``beam_idx[b]`` is."""
        if self.is_initialized:
            for held in (self.keys, self.values, self.start):
                held.copy_(held.index_select(0, beam_idx.to(held.device)))
