"""Real text that needs no download: the manual that every Python carries for ``help()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EVALUATION = ("specialnames", "compound", "types", "formatstrings", "string-methods", "debugger")
"""The longest chapters that share no text."""


def token_stream(tokenizer: Any, chapters: tuple[str, ...]) -> Tensor:
    """The token ids of chapters, one after the other: (N,)."""
    from pydoc_data.topics import topics

    return torch.cat([tokenizer(topics[name], return_tensors="pt").input_ids[0] for name in chapters])
