"""What ``make test-all`` prints at its end: one closing line for two suites, which hides nothing."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    before = set(sys.modules)
    yield importlib.import_module("run_tests")
    # Other tests import tools of the same names from copies of the repository.
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("closings", "want"),
    [
        (["3 passed in 2.00s", "4 passed, 1 warning in 1.50s"], " 7 passed, 1 warning in 3.50s "),
        (
            ["1 failed, 3 passed, 2 skipped in 2.00s", "2 failed, 1 error in 1.00s"],
            " 3 failed, 3 passed, 2 skipped, 1 error in 3.00s ",
        ),
        (["3 passed, 2 errors in 2.00s", ""], " 3 passed, 3 errors in 2.00s "),
    ],
)
def test_the_sum_of_closing_lines(tool, closings, want):
    line = tool.total(closings)
    assert line.strip("=") == want
    assert line.startswith("===")


@pytest.mark.parametrize(
    ("printed", "status", "closing"),
    [
        ("..F\n=== 1 failed, 2 passed in 61.20s (0:01:01) ===", 1, "1 failed, 2 passed in 61.20s"),
        ("12 tokens in 3.5s of it\n1 passed in 0.10s", 0, "1 passed in 0.10s"),
        ("killed", 3, ""),
    ],
)
def test_a_closing_line_is_read(tool, printed, status, closing, capfd):
    program = f"import sys; print({printed!r}); sys.exit({status})"
    assert tool.run([sys.executable, "-c", program]) == (status, closing)
    assert printed in capfd.readouterr().out


def test_both_suites_run_and_the_first_failure_counts(tool, monkeypatch, capsys):
    results = iter([(0, "5 passed in 1.00s"), (1, "1 failed, 2 passed in 2.00s")])
    ran = []
    monkeypatch.setattr(tool, "run", lambda command: ran.append(command) or next(results))
    monkeypatch.setattr(tool, "lacks_python", lambda: None)
    monkeypatch.setattr(tool.setup_vllm, "main", lambda arguments: 0)
    assert tool.main([]) == 1
    assert ran[0][-2:] == ["-n", "logical"]
    assert ran[1][-1] == "tests_vllm"
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].strip("= ") == "1 failed, 7 passed in 3.00s"
    assert lines[:2] == [
        "tests: 5 passed in 1.00s, exit status 0",
        "tests_vllm: 1 failed, 2 passed in 2.00s, exit status 1",
    ]


def test_an_environment_that_cannot_be_made_fails(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "run", lambda command: (0, "5 passed in 1.00s"))
    monkeypatch.setattr(tool, "lacks_python", lambda: None)
    monkeypatch.setattr(tool.setup_vllm, "main", lambda arguments: 1)
    assert tool.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1].strip("= ") == "5 passed, 1 error in 1.00s"


def test_without_a_fitting_python_it_is_said(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "run", lambda command: (0, "5 passed in 1.00s"))
    monkeypatch.setattr(tool, "lacks_python", lambda: "Python 3.11 is missing")
    assert tool.main([]) == 0
    assert "tests_vllm: not run, Python 3.11 is missing" in capsys.readouterr().out
