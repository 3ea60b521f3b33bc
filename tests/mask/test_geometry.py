"""The counts of a mask and its formula, against the definition cell by cell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.oracle import attended
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import ALL_ROWS, Geometry

counts = st.one_of(st.integers(0, 14), st.sampled_from([1000, ALL_ROWS]))
geometries = st.builds(Geometry, counts, counts, counts, st.one_of(st.none(), counts))


@st.composite
def problems(draw):
    kv_len = draw(st.integers(1, 12))
    start, end = sorted((draw(st.integers(0, kv_len)), draw(st.integers(0, kv_len))))
    return draw(st.integers(1, kv_len)), kv_len, start, end


def by_formula(geometry, q_len, kv_len, start, end):
    row = torch.arange(kv_len - q_len, kv_len)[:, None]
    return formula.attended(row, torch.arange(kv_len)[None], start, end, geometry)


def by_definition(geometry, q_len, kv_len, start, end):
    position = torch.arange(kv_len)[None]
    return attended(q_len, kv_len, (position >= start) & (position < end), *geometry.counts, geometry.reach)[0]


@given(problems(), geometries)
@settings(max_examples=150, deadline=None)
def test_the_formula_is_the_definition(problem, geometry):
    q_len, kv_len, start, end = problem
    want = by_definition(geometry, *problem)
    assert torch.equal(by_formula(geometry, *problem), want)
    for row in range(q_len):
        for key in range(kv_len):
            said = formula.attended(kv_len - q_len + row, key, start, end, geometry)
            assert bool(said) == bool(want[row, key]), "plain numbers are told the same as tensors"


@given(problems(), geometries)
@settings(max_examples=100, deadline=None)
def test_a_bounded_geometry_is_the_same_mask(problem, geometry):
    q_len, kv_len, *_ = problem
    want = by_formula(geometry, *problem)
    assert torch.equal(by_formula(geometry.within_reach(), *problem), want)
    bounded = geometry.within_reach().bounded(kv_len)
    assert max(bounded.sink, bounded.window) <= kv_len
    assert torch.equal(by_formula(bounded, *problem), want)
    whole = (q_len, kv_len, 0, kv_len)
    assert geometry.bounded(kv_len, q_len).last <= q_len
    assert torch.equal(by_formula(geometry.bounded(kv_len, q_len), *whole), by_formula(geometry, *whole))


def test_lengths_that_are_no_ints_bound_nothing():
    geometry = Geometry(50, 60, 70)
    assert geometry.bounded(None) == geometry.bounded(torch.zeros(()), "a node") == geometry


@given(problems(), geometries)
@settings(max_examples=50, deadline=None)
def test_dense_within_the_reach(problem, geometry):
    dense = geometry.as_dense()
    assert dense.is_dense
    assert dense.reach == geometry.reach
    assert torch.equal(by_formula(dense, *problem), by_definition(dense, *problem))


@pytest.mark.parametrize(
    ("reach", "want", "within"), [(None, (1, 2, 3, 0.5), 9), (4, (1, 2, 3, 0.5, 4), 4), (40, (1, 2, 3, 0.5, 40), 9)]
)
def test_the_arguments_of_the_operator(reach, want, within):
    geometry = Geometry(1, 2, 3, reach)
    assert geometry.arguments(0.5) == want
    assert geometry.reach_within(9) == within
