"""What a model answers, and what is left in memory afterwards."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor


def answered(model: Any, ids: Tensor, mask: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens of a prompt with its greedy answer (B, N + T), and the logits of each answered token (B, T, V)."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, 1)


def living_tensors() -> list[Tensor]:
    """The tensors that are alive, those among them that others in this process have left behind."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
