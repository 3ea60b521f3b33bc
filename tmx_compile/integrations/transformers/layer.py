"""One layer's keys and values that grow while the prompt is read, and then hold sinks and window only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tmx_compile.integrations.transformers.masks import first_valid, limited, take


class StreamingLayer(DynamicLayer):
    """The cache of a triangle layer under streaming decode.

    Every token is kept until the first decode step: a call with one row where something is held already (or with any
    number of rows once ``prompt_tokens`` tokens are held, or once a rollback was announced by
    ``activate_past_recording``). From then on a row at position p is given the sinks and the keys at p - window .. p,
    and what no later row can see is freed.

    The held columns are ``sink`` sink keys of each sequence, where anything was freed already, and then the keys of
    the positions from ``begin`` to the last. A sink that is still among the latter is masked in its sink column, which
    it reaches when it leaves the window.

    Args:
        sink: number of sink keys, counted from each sequence's first valid key.
        window: how far back a row sees.
        prompt_tokens: the prompt's length, where its last chunk may be one token long; None: not known.
    """

    keys: Any
    values: Any

    def __init__(self, sink: int, window: int, prompt_tokens: int | None = None) -> None:
        super().__init__()
        self.sink = sink
        self.window = window
        self.prompt_tokens = prompt_tokens
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.length = 0  # tokens seen
        self.streaming = False
        self.entered = 0  # tokens seen when streaming began
        self.start: Tensor | None = None  # (B,) first valid position of each sequence; None: 0
        self.evicted = False
        self.begin = 0

    def streams(self, rows: int) -> bool:
        """Whether the next call, of so many rows, attends to sinks and window only."""
        if self.streaming:
            return True
        if self.length == 0 or self.length < (self.prompt_tokens or 0):
            return False
        return rows == 1 or self.record_past or self.prompt_tokens is not None

    def mask_for(self, mask: Tensor | None, rows: int, device: torch.device) -> Tensor | None:
        """The mask of the next call over the columns that :meth:`update` will return.

        Args:
            mask: what the model would use with all keys: (B, 1, rows, tokens seen + rows), bool (True: attended) or
                float (0: attended); None: causal.
            rows: number of new tokens.
            device: where they are.
        """
        prompt = self.prompt_tokens or 0
        streams = self.streams(rows)
        if not streams and not self.length < prompt < self.length + rows:
            return mask
        if not self.streaming and mask is not None:
            self.start = first_valid(mask)
        if streams:
            self._enter()
        if mask is None and rows == 1 and self.start is None:
            return None
        row = (torch.arange(rows, device=device) + self.length)[None, :, None]
        begin = self._begin() if streams else 0
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if self.start is None else self.start[:, None]
        # Sizes are told by the window, not by positions: they are static in a compiled graph.
        held = self.window if begin > 0 else self.length
        key = (torch.arange(held + rows, device=device) + begin)[None, :]
        kept = (key < first + self.sink)[:, None, :] | (row - key[:, None, :] <= self.window)
        if not streams:
            # The prompt's end and what follows it, in one call (assisted generation begins so).
            kept = kept | (row < prompt)
        kept = kept & (key[:, None, :] <= row) & (key >= first)[:, None, :]
        if begin > 0:
            sinks = first + torch.arange(self.sink, device=device)[None, :]
            kept = torch.cat([(sinks < begin)[:, None, :].expand(-1, rows, -1), kept], 2)
            key = torch.cat([sinks, key.expand(sinks.shape[0], -1)], 1)
        return limited(mask, kept, key)

    def _enter(self) -> None:
        if not self.streaming:
            self.streaming, self.entered = True, self.length

    def _begin(self) -> int:
        """The first position after the sinks in what the next call returns; 0: everything is returned."""
        begin = max(0, self.length - self.window)
        return begin if self.evicted or begin > self.sink else 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, Hkv, rows, D) keys and values; returns what the new rows may attend to."""
        rows = key_states.shape[-2]
        if self.streams(rows):
            self._enter()
        begin = self._begin() if self.streaming else 0
        if begin == 0:
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            self.length += rows
            return both
        keys = torch.cat([*self._held(self.keys), key_states], 2)
        values = torch.cat([*self._held(self.values), value_states], 2)
        self.length += rows
        if self.record_past:
            # A rollback may need what the window leaves behind: crop() frees it.
            self.keys = torch.cat([self.keys, key_states], 2)
            self.values = torch.cat([self.values, value_states], 2)
        else:
            self.keys, self.values, self.begin, self.evicted = keys, values, begin, True
        return keys, values

    def _held(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Held columns as the sinks and the last ``window`` positions."""
        before = self.sink if self.evicted else 0
        tail = x[:, :, x.shape[2] - self.window :]
        # After so many steps every sequence's sinks have left the window, wherever it starts.
        settled = self.evicted and self.begin >= self.entered + self.sink
        if self.start is None or settled:
            return x[:, :, : self.sink], tail
        column = torch.arange(self.sink, device=x.device)[None, :]
        position = self.start[:, None] + column
        column = torch.where(position < self.begin, column, before + position - self.begin)
        return take(x, column.clamp(max=x.shape[2] - 1)), tail

    def get_seq_length(self) -> int:
        """Tokens seen, freed ones included: positions and masks count from it."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a layer that holds everything: the mask is cut to the columns in :meth:`mask_for`."""
        return self.length + query_length, 0

    def activate_past_recording(self) -> None:
        """Free nothing until ``crop`` tells how much of a step is taken back (assisted generation)."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, and free what the window has left behind.

        Raises:
            ValueError: a positive number, or more than is still held.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must not be positive, got {tokens_to_remove}")
        left = self.length + tokens_to_remove
        if not self.is_initialized:
            return
        if left <= 0:
            self.reset()
            return
        if self.begin > max(0, left - self.window):
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: {left} tokens would be left, and of those in their window the "
                f"ones before position {self.begin} are freed already; call activate_past_recording() before the "
                "tokens to take back are added"
            )
        if tokens_to_remove < 0:
            self.keys = self.keys[:, :, :tokens_to_remove]
            self.values = self.values[:, :, :tokens_to_remove]
            self.length = left
        begin = left - self.window
        if self.streaming and begin > self.begin and (self.evicted or begin > self.sink):
            self.keys = torch.cat(self._held(self.keys), 2)
            self.values = torch.cat(self._held(self.values), 2)
            self.begin, self.evicted = begin, True

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence b becomes what sequence ``beam_idx[b]`` is."""
        super().reorder_cache(beam_idx)
        if self.start is not None:
            self.start = self.start.index_select(0, beam_idx.to(self.start.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        if self.start is not None:
            self.start = self.start.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the sequences ``indices``."""
        super().batch_select_indices(indices)
        if self.start is not None:
            self.start = self.start[indices]
