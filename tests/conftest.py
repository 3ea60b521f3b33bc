"""Shared settings: no test leaves compiled state behind, and models never look for a hub."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(torch.seed())
    yield
    torch._dynamo.reset()
