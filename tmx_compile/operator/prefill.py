"""Where a prompt ends, told to compiled graphs that see it in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from tmx_compile.config import as_count


@dataclass(frozen=True)
class Chunk:
    """What the caller says about the calls of one prompt.

    Attributes:
        totals: where each sequence's prompt ends, one number for all or one each; None: not known.
        final: whether the call is the prompt's last, where the total is not known.
    """

    totals: tuple[int, ...] | None
    final: bool = False


_CURRENT: ContextVar[Chunk | None] = ContextVar("tmx_compile_prefill", default=None)


def current_chunk() -> Chunk | None:
    """What is said in this thread (or asynchronous task); None: nothing, each call is a prompt of its own."""
    return _CURRENT.get()


@contextmanager
def prefill(total_tokens: int | Sequence[int] | None = None, *, final: bool | None = None) -> Iterator[None]:
    """Calls in this block are chunks of one prompt, for models compiled with ``tmx_backend(chunked_prefill=True)``.

    Enter it outside of the compiled model, in the thread that calls it. A row at position p, counted over all that the
    cache holds, attends as in one pass over the whole prompt: p is a last row where ``p >= total_tokens -
    num_last_tokens``, and the layers are sparse where ``total_tokens`` is more than ``min_seq_len``.

    Args:
        total_tokens: length of the whole prompt with what the cache held before and with left padding; a sequence of
            them gives the end of each prompt of a batch (right padding).
        final: where the total is not known: False for every chunk but the last, in which no row is a last row (and
            layers are sparse whatever the length turns out to be); True for the last, whose final rows are.

    Raises:
        ValueError: neither or both arguments, or ones of another kind.

    >>> import torch
    >>> from tmx_compile import prefill
    >>> ids = torch.zeros(1, 300, dtype=torch.int64)
    >>> with prefill(total_tokens=300):
    ...     for chunk in ids.split(128, dim=1):
    ...         pass  # model(chunk, past_key_values=cache), compiled with tmx_backend(config, chunked_prefill=True)
    >>> with prefill(total_tokens=300, final=True):
    ...     pass
    Traceback (most recent call last):
    ...
    ValueError: give total_tokens or final, got total_tokens=300 and final=True
    """
    if (total_tokens is None) == (final is None):
        raise ValueError(f"give total_tokens or final, got total_tokens={total_tokens!r} and final={final!r}")
    if total_tokens is None:
        if not isinstance(final, bool):
            raise ValueError(f"final must be True or False, got {final!r}")
        chunk = Chunk(None, final)
    else:
        several = isinstance(total_tokens, Sequence)
        numbers = list(total_tokens) if isinstance(total_tokens, Sequence) else [total_tokens]
        totals = tuple(as_count("total_tokens", number, 1) for number in numbers)
        if several and not totals:
            raise ValueError("total_tokens must hold a number for each sequence, got none")
        chunk = Chunk(totals)
    token = _CURRENT.set(chunk)
    try:
        yield
    finally:
        _CURRENT.reset(token)
