"""Real text that needs no download: the manual that every Python carries for ``help()``, in two halves.

What a calibration reads must not be what quality is measured on, so each chapter belongs to one of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EVALUATION = ("specialnames", "compound", "types", "formatstrings", "string-methods", "debugger")
"""The longest chapters that share no text."""

# Chapters that repeat parts of those kept for evaluation.
_REPEATED = (
    *("async", "attribute-access", "callable-types", "class", "context-managers", "customization", "else", "for"),
    *("function", "if", "numeric-types", "sequence-types", "try", "while", "with"),
)


def _calibration() -> tuple[str, ...]:
    from pydoc_data.topics import topics

    return tuple(sorted(name for name in topics if name not in EVALUATION and name not in _REPEATED))


CALIBRATION = _calibration()
"""All others."""


def token_stream(tokenizer: Any, chapters: tuple[str, ...]) -> Tensor:
    """The token ids of chapters, one after the other: (N,)."""
    from pydoc_data.topics import topics

    return torch.cat([tokenizer(topics[name], return_tensors="pt").input_ids[0] for name in chapters])
