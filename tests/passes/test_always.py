"""Guards shown for every length: never one that fails somewhere, and those that tracing asks are shown."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tmx_compile.graph.guards import Bounds, bounds_of, holds_always, no_guard_added

n, b = sympy.symbols("n b", integer=True, positive=True)
blocks = FloorDiv(n, 32)
RANGES = {n: Bounds(101, None), b: Bounds(2, 8)}

SHOWN = [
    sympy.Eq(Mod(32 * blocks + 64, blocks + 2), 0),
    sympy.Eq(Mod(b * (32 * blocks + 32), b), 0),
    sympy.Ne(Mod(b, b * (blocks + 1)), 0),
    n <= 32 * blocks + 32,
    n < 32 * blocks + 33,
    sympy.Ne(512 * blocks + 512, 16 * n),
    sympy.Ne(512 * blocks + 512, 16 * Max(1, n - 8)),
    sympy.Ge(Min(n, 64), 64),
    sympy.And(n >= 101, b <= 8),
    sympy.Or(n >= 500, b * n >= 202),
    sympy.Ne(n, 100),
]
NOT_SHOWN = [
    n >= 102,
    b <= 7,
    sympy.Eq(Mod(n, 2), 0),
    n <= 32 * blocks + 30,
    sympy.Ne(512 * blocks + 512, 16 * n + 16),
    sympy.Eq(Mod(32 * blocks + 65, blocks + 2), 0),
    sympy.Eq(n, 150),
    sympy.Ne(n, 150),
    sympy.Ge(sympy.Symbol("unknown", integer=True), 0),
]


@pytest.mark.parametrize("guard", SHOWN, ids=str)
def test_what_tracing_asks_is_shown(guard):
    assert holds_always(guard, RANGES)


@pytest.mark.parametrize("guard", NOT_SHOWN, ids=str)
def test_what_fails_somewhere_is_not_shown(guard):
    assert not holds_always(guard, RANGES)


numbers = st.integers(-3, 3)
atoms = st.sampled_from([n, b, FloorDiv(n, 4), FloorDiv(n, 3), Max(b, n - 2), Min(n, 5)])
sums = st.builds(lambda a, x, c, y, d: a * x + c * x * y + d, numbers, atoms, numbers, atoms, st.integers(-30, 30))
relations = st.one_of(
    *(st.builds(relation, sums, sums) for relation in (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt, sympy.Ne, sympy.Eq)),
    st.builds(lambda x, y, equal: (sympy.Eq if equal else sympy.Ne)(Mod(x, y + 40), 0), sums, atoms, st.booleans()),
)


@settings(deadline=None, max_examples=300)
# From 1 on: the symbols are positive, which sympy makes use of.
@given(relations, st.integers(1, 6), st.integers(0, 9), st.booleans())
def test_a_shown_guard_holds_at_every_point(relation, low, width, bounded):
    ranges = {n: Bounds(low, low + width if bounded else None), b: Bounds(1, 3)}
    if not holds_always(relation, ranges):
        return
    for length in range(low, low + width + 1 if bounded else low + 40):
        for batch in (1, 2, 3):
            assert relation.subs({n: length, b: batch}) == sympy.true, (relation, length, batch)


def test_a_remainder_of_a_negative_number_is_not_shown():
    """Torch asserts against it once the operands are numbers: 5 for the smaller of 5 and a length from 5 on."""
    assert not holds_always(sympy.Ne(Mod(-1, Min(n, 5) + 40), 0), {n: Bounds(5, None)})
    assert not holds_always(sympy.Eq(Mod(-1, Min(n, 5) + 40), 0), {n: Bounds(5, 9)})


def test_bounds_are_those_of_the_ranges():
    ranges = {n: ValueRanges(2, int_oo), b: ValueRanges(1, 8), sympy.Symbol("c"): ValueRanges(-int_oo, 4)}
    assert bounds_of(ranges) == {n: Bounds(2, None), b: Bounds(1, 8)}


def test_one_length_of_a_moderate_range_is_tried_at_each_value():
    """Algebra does not show that a square of 0 to 3 leaves 0 or 1 by 4; the four values do."""
    assert holds_always(sympy.Ne(Mod(n * n, 4), 2), {n: Bounds(0, 3)})
    assert not holds_always(sympy.Ne(Mod(n * n, 4), 1), {n: Bounds(0, 3)})
    assert not holds_always(sympy.Ne(Mod(n * n, 4), 2), {n: Bounds(0, None)})


def environment():
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = mode.from_tensor(torch.randn(150, 3), symbolic_context=None, static_shapes=False)
    return env, mode, x


def test_the_environment_is_left_as_it_was():
    env, mode, x = environment()
    before = str(env.guards), dict(env.replacements), dict(env.var_to_range), dict(env.axioms), set(env.divisible)
    for _ in range(2):
        # The second time too: an answer from memory would not be seen.
        env.frozen = True
        with no_guard_added(mode) as asked, mode:
            assert bool(x.shape[0] * 2 > x.shape[0])
            assert bool(x.shape[0] > 149)
        assert "149" in asked.guard
        assert env.frozen
        env.frozen = False
        assert before == (
            str(env.guards), dict(env.replacements), dict(env.var_to_range), dict(env.axioms), set(env.divisible)
        )  # fmt: skip
    with no_guard_added(mode) as asked, mode:
        assert bool(x.shape[0] * 2 > x.shape[0])
    assert asked.guard == ""


def test_a_length_that_becomes_a_number_is_told():
    _, mode, x = environment()
    with no_guard_added(mode) as asked:
        assert int(x.shape[0]) == 150
    assert asked.guard != ""
    assert isinstance(x.shape[0], torch.SymInt)


def test_static_lengths_need_nothing():
    with no_guard_added(None) as asked, no_guard_added(FakeTensorMode()) as also:
        pass
    assert (asked.guard, also.guard) == ("", "")
