"""The process with torch_npu, for the tests of this folder."""

from __future__ import annotations

import pytest

from tests.support.ascend.standin.process import Npu, SetupError, unsupported


@pytest.fixture(scope="session")
def _npu_process():
    reason = unsupported()
    if reason is not None:
        pytest.skip(reason)
    started = []

    def process():
        if not started or not started[-1].alive:
            try:
                started.append(Npu())
            except SetupError as error:
                pytest.fail(str(error), pytrace=False)
        return started[-1]

    yield process
    for each in started:
        each.close()


@pytest.fixture
def npu(_npu_process):
    """A process with torch_npu on stand-in CANN libraries, shared by all tests; a new one if the last has died."""
    return _npu_process()
