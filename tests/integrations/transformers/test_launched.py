"""``tp_plan="auto"``, FSDP2 and DDP under ``torchrun``, compiled and switched: the numbers of one process."""

import pytest

from tests.support.launched import CHECKS, launched


@pytest.fixture(scope="module")
def told():
    return launched()


@pytest.mark.parametrize("name", CHECKS)
def test_under_torchrun(told, name):
    assert told[name] == ("", "")
