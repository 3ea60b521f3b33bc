"""Settings of the tests with a real engine: it runs in this process, on both cores, with a small cache."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests_vllm.support import Engine, Oracle, make_model

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("models") / "llama")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def oracle(model: str) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="session")
def engine(model: str) -> Iterator[Engine]:
    """With TriangleMix and prefix caching. No file between those that use it makes another, and closes that."""
    made = Engine(model)
    yield made
    made.close()
