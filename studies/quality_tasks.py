"""What quality is measured on: real text that goes on, a number hidden in it, and a list to be repeated.

Every item is a prompt of N tokens with the T tokens that follow. One run of all N + T tokens with T more last rows is
exactly the prefill of the prompt by a sparse layer and T decoding steps with dense attention (teacher forcing): a row
from N on attends to everything, and so do the prompt's own last rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FOLLOWING = 256
"""Tokens of real text after a prompt."""
DIGITS, LISTED, CUE = 5, 48, 8
_WORDS = ("harbour", "violin", "granite", "meadow", "lantern", "pepper", "glacier", "walnut", "copper", "saddle")


@dataclass(frozen=True)
class Item:
    """(1, N + T) token ids, of which the last T are to be predicted; ``depth`` is where in the prompt the answer is."""

    task: str
    ids: Tensor
    following: int
    depth: float | None = None

    @property
    def prompt(self) -> int:
        """N, tokens."""
        return self.ids.shape[1] - self.following

    @property
    def targets(self) -> Tensor:
        """(T,) the tokens that follow the prompt."""
        return self.ids[0, -self.following :]


def digest(items: Sequence[Item]) -> str:
    """Of all token ids, for the record."""
    found = hashlib.sha256()
    for item in items:
        found.update(str(item.ids.tolist()).encode())
    return found.hexdigest()[:16]


def continuations(stream: Tensor, prompt: int, most: int, following: int = FOLLOWING) -> list[Item]:
    """Consecutive pieces of a text that do not overlap."""
    size = prompt + following
    count = min(most, stream.shape[0] // size)
    if count == 0:
        raise ValueError(f"the text has {stream.shape[0]} tokens, a prompt and what follows need {size}")
    pieces = (stream[i * size : (i + 1) * size] for i in range(count))
    return [Item("text", piece[None].clone(), following) for piece in pieces]


def needles(tokenizer: Any, stream: Tensor, prompt: int, count: int) -> list[Item]:
    """A number stated once in real text, at depths spread evenly, and asked for at the end of the prompt."""
    generator = torch.Generator().manual_seed(prompt)
    items = []
    for i in range(count):
        depth = (i + 0.5) / count
        word = _WORDS[i % len(_WORDS)]
        number = "".join(map(str, torch.randint(0, 10, (DIGITS,), generator=generator).tolist()))
        needle = _ids(tokenizer, f"\nThe secret number of the {word} is {number}.\n")
        question = _ids(tokenizer, f"\nWhat is the secret number of the {word}? The secret number of the {word} is")
        answer = _ids(tokenizer, f" {number}")
        text = _filler(stream, prompt - needle.shape[0] - question.shape[0], i, count)
        place = int(depth * text.shape[0])
        ids = torch.cat([text[:place], needle, text[place:], question, answer])
        items.append(Item("needle", ids[None], answer.shape[0], depth))
    return items


def copies(stream: Tensor, prompt: int, count: int, vocabulary: int) -> list[Item]:
    """A list of random tokens in real text, whose beginning is repeated at the end of the prompt."""
    generator = torch.Generator().manual_seed(prompt + 1)
    items = []
    for i in range(count):
        depth = (i + 0.5) / count
        # The last ids of a vocabulary may never occur, the first have special meanings.
        listed = torch.randint(vocabulary // 50, vocabulary // 2, (LISTED,), generator=generator)
        text = _filler(stream, prompt - LISTED - CUE, i, count)
        place = int(depth * text.shape[0])
        ids = torch.cat([text[:place], listed, text[place:], listed])
        items.append(Item("copy", ids[None], LISTED - CUE, depth))
    return items


def _ids(tokenizer: Any, text: str) -> Tensor:
    found: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return found


def _filler(stream: Tensor, size: int, number: int, count: int) -> Tensor:
    """A stretch of the text; those of different items overlap as little as the text allows."""
    last = stream.shape[0] - size
    if size < 1 or last < 0:
        raise ValueError(f"the prompt leaves {size} tokens for a text that has {stream.shape[0]}")
    start = last * number // max(1, count - 1)
    return stream[start : start + size]
