"""A prompt that several processes hold a piece of each, and the answer that follows it over their split caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tmx_compile.lowering.base import Immediate
from tmx_compile.lowering.context_parallel import Ranks


class SplitPrompt:
    """What each process gives a model whose prompt is split, and what it makes of the results.

    For a model compiled with ``tmx_backend(config, context_parallel=mesh)``. The cache stays split: every process
    stores its piece of the prompt and all new tokens, whose keys count on the final process only. Every method that
    exchanges something has to be called by all processes.

    Args:
        model: the Transformers model; it tells whether layers have a window of their own.
        mesh: the ``torch.distributed.DeviceMesh`` of one dimension that the backend got.
        input_ids: (B, N) int64, the whole prompt, alike on every process.
        attention_mask: (B, N), 1 where a token counts, padding on either side; None: everywhere.

    Raises:
        ValueError: shapes that are none of a prompt, naming the argument.

    >>> import torch
    >>> import torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from tmx_compile.integrations.transformers import SplitPrompt
    >>> shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> split = SplitPrompt(model, init_device_mesh("cpu", (1,)), torch.tensor([[5, 6, 7]]))
    >>> split.piece()  # for the model; split.last(logits) gives the logits of the last token to all processes
    {'input_ids': tensor([[5, 6, 7]]), 'position_ids': tensor([[0, 1, 2]]), 'use_cache': True}
    >>> step = split.step(torch.tensor([[8]]))  # for the model, with its cache
    >>> step["position_ids"], step["attention_mask"]
    (tensor([[3]]), tensor([[1, 1, 1, 1]]))
    >>> dist.destroy_process_group()
    """

    def __init__(self, model: Any, mesh: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (batch, tokens), got {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        self._ranks = Ranks.of(mesh)
        self._prompt_tokens = input_ids.shape[1]
        self._input_ids = input_ids
        self._masked = attention_mask is not None
        self._mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
        # A prompt that the processes do not divide gets more padding, on the left: its last row stays the last.
        self._added = -self._prompt_tokens % self._ranks.size
        self._piece_tokens = (self._prompt_tokens + self._added) // self._ranks.size
        # Without a mask Transformers leaves out a window, or chunks, that a piece does not fill; the prompt may.
        self._masked |= self._added > 0 or self._piece_tokens < _longest_window(model)

    @property
    def input_ids(self) -> Tensor:
        """(B, N + t) int64: the prompt, and the t tokens of :meth:`step` so far."""
        return self._input_ids

    @property
    def attention_mask(self) -> Tensor:
        """(B, N + t) int64 for :attr:`input_ids`, as one process that goes on alone gives it."""
        return self._mask

    @property
    def new_tokens(self) -> int:
        """How many tokens follow the prompt."""
        return self._input_ids.shape[1] - self._prompt_tokens

    def piece(self) -> dict[str, Any]:
        """Arguments of the model for this process's piece: (B, P) tokens and positions, and a mask where needed."""
        arguments = {
            "input_ids": self._own(self._input_ids[:, : self._prompt_tokens]),
            "position_ids": self._own(self._positions()[:, : self._prompt_tokens]),
            "use_cache": True,
        }
        if self._masked:
            arguments["attention_mask"] = self._own(self._mask[:, : self._prompt_tokens])
        return arguments

    def last(self, logits: Tensor) -> Tensor:
        """(B, V) of each sequence's last token, on every process, from ``logits`` (B, P, V) of its piece.

        Logits of one row (``logits_to_keep=1``) will do where the prompt has no padding on the right.

        Raises:
            ValueError: logits of any other number of rows, before anything is exchanged.
        """
        rows, ranks = logits.shape[1], self._ranks
        mask = F.pad(self._mask[:, : self._prompt_tokens], (self._added, 0)).bool()
        place = torch.arange(mask.shape[1], device=mask.device)
        ends = torch.where(mask, place, 0).amax(1)
        if rows == 1 and self._piece_tokens > 1 and bool((ends < mask.shape[1] - 1).any()):
            raise ValueError("logits of one row (logits_to_keep=1) are not enough: the prompt has padding on the right")
        if rows not in (1, self._piece_tokens):
            raise ValueError(f"logits must be of all {self._piece_tokens} tokens of the piece, or of one, got {rows}")
        at = ends - ranks.rank * self._piece_tokens
        held = (at >= 0) & (at < self._piece_tokens)
        at = at.clamp(0, self._piece_tokens - 1) if rows > 1 else at * 0
        own = logits[torch.arange(len(at), device=logits.device), at]
        found: Tensor = ranks.sum(Immediate(), torch.where(held[:, None], own, 0.0)).wait()
        return found

    def step(self, tokens: Tensor) -> dict[str, Any]:
        """Arguments of the model for new ``tokens`` (B, n), alike on all processes: the final one's count.

        The cache of the calls so far has to be passed with them.

        Raises:
            ValueError: tokens of another batch, before anything is exchanged.
        """
        batch, known = self._input_ids.shape
        if tokens.dim() != 2 or tokens.shape[0] != batch or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be ({batch}, new tokens), got {tuple(tokens.shape)}")
        # Each process may have drawn others.
        told = self._ranks.all_gather(Immediate(), tokens.to(self._input_ids.dtype).contiguous()).wait()[-batch:]
        self._input_ids = torch.cat([self._input_ids, told], 1)
        self._mask = torch.cat([self._mask, torch.ones_like(told)], 1)
        answer = self._mask[:, self._prompt_tokens :]
        counted = answer if self._ranks.is_final else torch.zeros_like(answer)
        return {
            "input_ids": told,
            "position_ids": self._positions()[:, known:],
            "attention_mask": torch.cat([self._own(self._mask[:, : self._prompt_tokens]), counted], 1),
            "use_cache": True,
        }

    def gathered(self, cache: Any) -> DynamicCache:
        """The cache that one process would have, on every process: N + t tokens, the pieces in order.

        What this class added to make pieces of one length is left out. Takes the memory of the whole cache on every
        process. Plain ``generate`` goes on from it, by a model that is not compiled for a split prompt.

        Args:
            cache: this process's ``DynamicCache``, after the piece and all steps.

        Raises:
            ValueError: a layer that does not hold them all, before anything is exchanged.
        """
        held = self._piece_tokens + self.new_tokens
        for index, layer in enumerate(cache.layers):
            tokens = 0 if layer.keys is None else layer.keys.shape[2]
            if tokens != held or getattr(layer, "is_sliding", False):
                raise ValueError(
                    f"cache: layer {index} ({type(layer).__name__}) holds {tokens} tokens, and piece and new tokens "
                    f"are {held}: it has to be a DynamicCache that keeps them all"
                )
        whole = DynamicCache()
        for index, layer in enumerate(cache.layers):
            whole.update(self._whole(layer.keys), self._whole(layer.values), index)
        return whole

    def _positions(self) -> Tensor:
        """(B, N + t): each sequence's own, from 0 at its first token."""
        return (self._mask.cumsum(1) - 1).clamp(min=0)

    def _own(self, x: Tensor) -> Tensor:
        """(B, P) of this process from (B, N)."""
        return F.pad(x, (self._added, 0)).chunk(self._ranks.size, 1)[self._ranks.rank]

    def _whole(self, x: Tensor) -> Tensor:
        """(B, h, N + t, D) from every process's (B, h, P + t, D)."""
        own = x[:, :, : self._piece_tokens].permute(2, 0, 1, 3).contiguous()
        pieces = self._ranks.all_gather(Immediate(), own).wait()
        return torch.cat([pieces[self._added :].permute(1, 2, 0, 3), x[:, :, self._piece_tokens :]], 2)


def _longest_window(model: Any) -> int:
    """Of the layers' own windows and chunks, the longest; 0 where none has one."""
    config = model.config.get_text_config()
    return max(getattr(config, name, None) or 0 for name in ("sliding_window", "attention_chunk_size"))
