"""The bootstrap interval: its mean, its coverage, and that it is the same each time."""

import math
import random
import statistics

import pytest

from tmx_compile.analysis.judge.intervals import interval


def test_it_covers_the_true_mean_about_as_often_as_it_says():
    draw = random.Random(1)
    trials = 200
    inside = 0
    for _ in range(trials):
        found = interval([draw.gauss(3.0, 2.0) for _ in range(40)], draws=400)
        inside += found.lower <= 3.0 <= found.upper
    # 95% less what 40 values cost the percentile method; chance leaves it outside of this once in 10,000 times.
    assert 0.86 <= inside / trials <= 0.99


def test_its_mean_is_exact_and_it_narrows_with_the_root_of_the_number():
    draw = random.Random(2)
    few, many = ([draw.gauss(0.0, 1.0) for _ in range(n)] for n in (50, 5000))
    for values in (few, many):
        found = interval(values)
        assert found.mean == statistics.fmean(values)
        expected = 2 * 1.96 * statistics.pstdev(values) / math.sqrt(len(values))
        assert found.upper - found.lower == pytest.approx(expected, rel=0.12)
        assert interval(values) == found


def test_ratios_of_perplexities():
    values = [0.1, 0.3, -0.2, 0.05]
    plain, ratio = interval(values), interval(values, exponent=True)
    assert ratio.as_list() == [math.expm1(x) for x in plain.as_list()]
    assert plain.lower < plain.mean < plain.upper
    assert interval([0.25]).as_list() == [0.25] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(values=[]), "values must be finite numbers and at least one"),
        (dict(values=[1.0, math.nan]), "values must be finite numbers"),
        (dict(values=[1.0], draws=0), "draws must be a positive integer, got 0"),
        (dict(values=[1.0], draws=39), "draws must be at least 40, got 39"),
    ],
)
def test_what_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        interval(**given)
