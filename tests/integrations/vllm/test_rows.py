"""Streaming and dense rows of a step, against the mask of the whole prompt, for every way a scheduler may cut it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmx_compile.integrations.vllm.rows import Dense, Split, Streaming, first_dense_row, spans_before, split
from tmx_compile.mask.geometry import Geometry

COUNTS = st.integers(0, 40)


@st.composite
def steps(draw):
    """(prompt, tokens before the step, rows of the step) of some requests; rows may go beyond the prompt, or be 0."""
    requests = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 70), st.integers(0, 50)), max_size=5))
    return [(prompt, before, rows) for prompt, before, rows in requests]


def tables(requests):
    starts, lengths, prompts = [0], [], []
    for prompt, before, rows in requests:
        starts.append(starts[-1] + rows)
        lengths.append(before + rows)
        prompts.append(prompt)
    return starts, lengths, prompts


@given(steps(), COUNTS, COUNTS, st.booleans())
def test_every_row_is_where_the_mask_of_its_prompt_says(requests, last, limit, whole):
    geometry = Geometry(2, 3, last)
    found = split(*tables(requests), geometry, limit, whole_prompts=whole)
    kind = {}
    for part in () if found is None else found.streaming:
        assert part.last == 0 or (whole and part.position == 0)
        for i in range(part.rows):
            assert part.row + i not in kind
            kind[part.row + i] = part.request, part.position + i, i < part.rows - part.last
    for part in () if found is None else found.dense:
        for i in range(part.rows):
            assert part.row + i not in kind
            kind[part.row + i] = part.request, None, False
    row = 0
    for request, (prompt, before, rows) in enumerate(requests):
        for position in range(before, before + rows):
            streams = prompt > limit and position < prompt - last
            if found is None:
                assert not streams
            else:
                owner, at, streamed = kind.pop(row)
                assert (owner, streamed) == (request, streams)
                assert at in (None, position)
            row += 1
    assert kind == {}


@given(st.integers(1, 90), st.integers(1, 90), COUNTS, COUNTS, COUNTS)
def test_spans_hold_what_the_rows_of_a_chunk_see(position, rows, sink, window, last):
    geometry = Geometry(sink, window, last)
    want = {
        key for row in range(position, position + rows) for key in range(position) if key < sink or row - key <= window
    }
    spans = spans_before(position, geometry)
    keys = [key for begin, end in spans for key in range(begin, end)]
    assert keys == sorted(want)


def test_a_step_by_hand():
    geometry = Geometry(2, 4, 10)
    # A chunk in the middle, the last chunk of another prompt, a short prompt, a decode step.
    starts, lengths, prompts = [0, 50, 90, 110, 111], [150, 100, 20, 131], [300, 100, 20, 130]
    found = split(starts, lengths, prompts, geometry, limit=20)
    assert found == Split(
        (Streaming(0, 0, 50, 100), Streaming(1, 50, 30, 60)), (Dense(1, 80, 10), Dense(2, 90, 20), Dense(3, 110, 1))
    )
    assert split(starts, lengths, prompts, geometry, limit=300) is None


def test_a_whole_prompt_is_one_part_where_a_kernel_does_both():
    geometry = Geometry(2, 4, 10)
    assert split([0, 100], [100], [100], geometry, 20, whole_prompts=True) == Split((Streaming(0, 0, 100, 0, 10),), ())
    # As many rows as the prompt has, but behind its first token: the rest of it, and an answer.
    found = split([0, 100], [101], [100], geometry, 20, whole_prompts=True)
    assert found == Split((Streaming(0, 0, 89, 1),), (Dense(0, 89, 11),))
    # A chunk is not a whole prompt, though it starts at 0.
    assert split([0, 50], [50], [100], geometry, 20, whole_prompts=True) == Split((Streaming(0, 0, 50, 0),), ())


@pytest.mark.parametrize(("prompt", "row"), [(19, 0), (20, 0), (21, 11), (300, 290)])
def test_first_dense_row(prompt, row):
    assert first_dense_row(prompt, 20, 10) == row


def test_a_prompt_shorter_than_its_last_rows_is_dense():
    assert first_dense_row(30, 20, 64) == 0
