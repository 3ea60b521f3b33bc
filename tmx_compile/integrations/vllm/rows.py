"""Which rows of a step stream, and which attend to all keys. Integers and arrays alone: no tensors, no vLLM.

A step of the engine holds some rows of several requests: chunks of prompts, decode steps, drafts to verify. Where a
prompt has N tokens, a row at position p streams exactly when ``p < N - last`` and N is over the limit; so whatever the
scheduler does (chunks of any size, recomputation after preemption, verification of drafts), the rows get the mask of
the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tmx_compile.mask.geometry import Geometry


@dataclass(frozen=True)
class Streaming:
    """Rows of one request that stream.

    Attributes:
        request: its place in the step, which is its row of the block table.
        row: the first of its rows among the step's.
        rows: how many.
        position: of the first row in its sequence; as many tokens lie in the cache before it.
        last: how many rows at the end attend to all keys; more than 0 only where these are a whole prompt.
    """

    request: int
    row: int
    rows: int
    position: int
    last: int = 0


@dataclass(frozen=True)
class Dense:
    """Rows of one request that attend to every key up to their own."""

    request: int
    row: int
    rows: int


@dataclass
class Step:
    """What is known of a whole step of the scheduler before its metadata are built.

    Attributes:
        rows: of all requests.
        longest: tokens of the longest prompt.
        streams: whether some row streams.
        prompts: (requests,) array, tokens of each request's prompt, in the step's order; asked only where rows stream.
    """

    rows: int
    longest: int
    streams: bool
    prompts: Any = None


@dataclass(frozen=True)
class Split:
    """The rows of a step, each in exactly one part."""

    streaming: tuple[Streaming, ...]
    dense: tuple[Dense, ...]


def first_dense_row(prompt: int, limit: int, last: int) -> int:
    """The position from which on the rows of a request attend to all keys; 0 for a prompt that is not over the limit.

    Args:
        prompt: tokens of the prompt.
        limit: up to how many tokens a prompt stays dense.
        last: last rows of the geometry.
    """
    return max(prompt - last, 0) if prompt > limit else 0


def look(rows: int, prompts: Any, computed: Any, limit: int, last: int) -> Step:
    """A step before its metadata: whether the next row of some request streams. Most steps have none.

    Args:
        rows: of the step.
        prompts: (requests,) array of integers, tokens of each request's prompt.
        computed: (requests,) how many tokens each has in the cache before the step.
        limit: up to how many tokens a prompt stays dense.
        last: last rows of the geometry.
    """
    # NumPy's own maximum takes twice as long for so few.
    longest = int(prompts[prompts.argmax()]) if len(prompts) else 0
    # Where all prompts are short, this was all: they would notice most what a step costs the host.
    return Step(rows, longest, longest > limit and bool(((prompts > limit) & (computed < prompts - last)).any()))


def split(
    starts: Sequence[int],
    lengths: Sequence[int],
    prompts: Sequence[int],
    geometry: Geometry,
    limit: int,
    *,
    whole_prompts: bool = False,
) -> Split | None:
    """Tell streaming rows from dense ones; None: all rows are dense.

    Args:
        starts: (requests + 1) where each request's rows begin in the step, and the number of rows. Requests may be
            fewer than ``prompts``.
        lengths: tokens that each request has in the cache after the step.
        prompts: tokens of each request's prompt.
        geometry: its last rows count here.
        limit: up to how many tokens a prompt stays dense.
        whole_prompts: whether a prompt that is whole in this step is one part, its last rows among them.
    """
    streaming: list[Streaming] = []
    dense: list[Dense] = []
    for request, (row, end, length) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        rows = end - row
        if rows <= 0:
            continue
        prompt = prompts[request]
        position = length - rows
        before = min(max(first_dense_row(prompt, limit, geometry.last) - position, 0), rows)
        # From its first token on: last rows behind a chunk need pages that the gathered keys leave out.
        if before and whole_prompts and position == 0 and rows == prompt:
            streaming.append(Streaming(request, row, rows, position, rows - before))
            continue
        if before:
            streaming.append(Streaming(request, row, before, position))
        if before < rows:
            dense.append(Dense(request, row + before, rows - before))
    return Split(tuple(streaming), tuple(dense)) if streaming else None


def spans_before(position: int, geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """The cached tokens that streaming rows from ``position`` on attend to, as [begin, end), ascending, disjoint.

    They are the sinks and the window of the first row; those of the rows behind it lie in the step itself.
    """
    low = max(position - geometry.window, 0)
    if low <= geometry.sink:
        return ((0, position),) if position else ()
    return ((0, geometry.sink), (low, position)) if geometry.sink else ((low, position),)
