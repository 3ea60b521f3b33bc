"""Shared settings: no test leaves compiled state behind, and models never look for a hub."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: threads of one would only wait for those of the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():
    # The GPU kernels run on the CPU in Triton's interpreter; the variable is read when they are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(torch.seed())
    yield
    torch._dynamo.reset()


@pytest.fixture
def eager(monkeypatch):
    """The graphs that backends hand to Inductor, which run as they are: the pass is the test's matter, not Inductor."""
    import torch._inductor.compile_fx as inductor

    graphs = []

    def compile_fx(gm, inputs, *args, **kwargs):
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(inductor, "compile_fx", compile_fx)
    return graphs


@pytest.fixture
def sparse_from_min_seq_len(monkeypatch):
    """Also where ``auto`` would leave a prompt dense for its speed: on a GPU nearly all prompts of the tests."""
    for judge in ("passes.judge", "integrations.transformers.judge"):
        monkeypatch.setattr(f"tmx_compile.{judge}.least_length", lambda lowering, device, least, *rest: least)
    monkeypatch.setattr("tmx_compile.integrations.transformers.judge.least_for_width", lambda *sizes: 0)


def pytest_terminal_summary(terminalreporter):
    """What a test found out, beside that it passed: its recorded properties."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
