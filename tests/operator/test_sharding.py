"""Attention split over two processes (gloo) gives the numbers of one: operators, modules, models."""

import pytest

from tests.support.processes import outcomes
from tests.support.sharded import CHECKS


@pytest.fixture(scope="module")
def told():
    return outcomes(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(told, name):
    assert told[name] == ("", "")
