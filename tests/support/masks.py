"""Masks of the algebra at random, and their oracle: one pair of a row and a key at a time."""

from __future__ import annotations

from hypothesis import strategies as st

from tmx_compile.mask.algebra import (
    And,
    Causal,
    Grid,
    LastRows,
    Mask,
    Not,
    Or,
    Padding,
    Sink,
    Window,
)


def oracle(mask: Mask, grid: Grid, row: int, key: int) -> bool:
    position = row + grid.kv_len - grid.q_len
    if isinstance(mask, Causal):
        return not key > position
    if isinstance(mask, Sink):
        return key in range(grid.start, grid.start + mask.n)
    if isinstance(mask, Window):
        return key not in range(position - mask.n)
    if isinstance(mask, LastRows):
        return position not in range(grid.end - mask.n)
    if isinstance(mask, Padding):
        valid = range(grid.start, grid.end)
        return key in valid and position in valid
    if isinstance(mask, And):
        return oracle(mask.left, grid, row, key) and oracle(mask.right, grid, row, key)
    if isinstance(mask, Or):
        return oracle(mask.left, grid, row, key) or oracle(mask.right, grid, row, key)
    assert isinstance(mask, Not)
    return not oracle(mask.inner, grid, row, key)


def brute(mask: Mask, grid: Grid) -> list[list[bool]]:
    return [[oracle(mask, grid, row, key) for key in range(grid.kv_len)] for row in range(grid.q_len)]


@st.composite
def grids(draw: st.DrawFn, max_len: int = 20) -> Grid:
    kv_len = draw(st.integers(1, max_len))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len)))
    start = draw(st.one_of(st.just(0), st.integers(0, kv_len)))
    end = draw(st.one_of(st.just(kv_len), st.integers(start, kv_len)))
    return Grid(q_len, kv_len, start, end)


def masks(max_leaves: int = 6) -> st.SearchStrategy[Mask]:
    counted = st.builds(lambda kind, n: kind(n), st.sampled_from([Sink, Window, LastRows]), st.integers(0, 22))
    # Single rules are bounded on one side only: bands make masks with many gaps likely.
    bands = st.builds(
        lambda kind, n, size: kind(n + size) & ~kind(n),
        st.sampled_from([Sink, Window, LastRows]),
        st.integers(0, 12),
        st.integers(1, 6),
    )
    return st.recursive(
        st.one_of(counted, bands, st.just(Causal()), st.just(Padding())),
        lambda inner: st.one_of(st.builds(Or, inner, inner), st.builds(And, inner, inner), st.builds(Not, inner)),
        max_leaves=max_leaves,
    )


geometries = st.fixed_dictionaries({name: st.integers(0, 22) for name in ("sink", "window", "last")})
