"""A prompt split over one to four processes (gloo) gives the numbers of one: the operator, models, the answer."""

import pytest

from tests.support import split, split_answer
from tests.support.processes import outcomes
from tests.support.split import LONG, WORLD

CHECKS = {**split.CHECKS, **split_answer.CHECKS}


@pytest.fixture(scope="module")
def told():
    return outcomes(CHECKS, WORLD, LONG)


@pytest.mark.parametrize("name", CHECKS)
def test_processes(told, name):
    assert told[name] == ("",) * WORLD
