"""``make test`` runs two suites: one closing line that hides nothing, their failures listed, an end when asked."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
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
        (["3 passed, 2 subtests passed in 2.00s"], " 3 passed, 2 subtests passed in 2.00s "),
    ],
)
def test_the_sum_of_closing_lines(tool, closings, want):
    line = tool.total(closings)
    assert line.strip("=") == want
    assert line.startswith("===")


@pytest.mark.parametrize(
    ("printed", "status", "want"),
    [
        ("..F\n=== 1 failed, 2 passed in 61.20s (0:01:01) ===", 1, (1, "1 failed, 2 passed in 61.20s")),
        ("12 tokens in 3.5s of it\n1 passed in 0.10s", 0, (0, "1 passed in 0.10s")),
        ("killed", 3, (3, "")),
        ("no closing line", 0, (1, "")),
    ],
)
def test_a_closing_line_is_read(tool, printed, status, want, capfd):
    program = f"import sys; print({printed!r}); sys.exit({status})"
    part = tool.run([sys.executable, "-c", program])
    assert (part.status, part.closing) == want
    assert printed in capfd.readouterr().out


def both(tool, monkeypatch, *parts):
    """Let the suites end so, one after the other; the commands that ran are put into the list."""
    results, ran = iter(parts), []
    monkeypatch.setattr(tool, "run", lambda command: ran.append(command) or next(results))
    monkeypatch.setattr(tool, "lacks_python", lambda: None)
    monkeypatch.setattr(tool.setup_vllm, "main", lambda arguments: 0)
    return ran


def test_both_suites_run_and_the_first_failure_counts(tool, monkeypatch, capsys):
    failed = ("FAILED tests_vllm/test_a.py::test_b - assert 1 == 2",)
    ran = both(
        tool, monkeypatch, tool.Part(0, "5 passed in 1.00s"), tool.Part(1, "1 failed, 2 passed in 2.00s", failed)
    )
    assert tool.main([]) == 1
    assert ran[0][-2:] == ["-n", "logical"]
    assert ran[1][-1] == "tests_vllm"
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[:3] == [
        "tests: 5 passed in 1.00s, exit status 0",
        "tests_vllm: 1 failed, 2 passed in 2.00s, exit status 1",
        f"  {failed[0]}",
    ]
    assert lines[-1].strip("= ") == "1 failed, 7 passed in 3.00s"


def test_with_arguments_the_first_suite_runs_alone(tool, monkeypatch, capfd):
    monkeypatch.setattr(tool, "run_vllm", lambda: pytest.fail("it ran"))
    assert tool.main(["--version"]) == 0
    assert "pytest" in "".join(capfd.readouterr())


def test_an_environment_that_cannot_be_made_fails(tool, monkeypatch, capsys):
    both(tool, monkeypatch, tool.Part(0, "5 passed in 1.00s"))
    monkeypatch.setattr(tool.setup_vllm, "main", lambda arguments: 1)
    assert tool.main([]) == 1
    said = capsys.readouterr().out
    assert "ERROR tests_vllm: .vllm could not be set up" in said
    assert said.splitlines()[-1].strip("= ") == "5 passed, 1 error in 1.00s"


def test_without_a_fitting_python_it_is_said(tool, monkeypatch, capsys):
    both(tool, monkeypatch, tool.Part(0, "5 passed in 1.00s"))
    monkeypatch.setattr(tool, "lacks_python", lambda: "Python 3.11 is missing")
    assert tool.main([]) == 0
    # Where it happens, and again at the end.
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("tests_vllm: not run, Python 3.11 is missing") == 2
    assert lines[-2] == "tests_vllm: not run, Python 3.11 is missing"


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_have_no_vllm(tool, monkeypatch, system):
    monkeypatch.setattr(tool.sys, "platform", system)
    assert tool.lacks_python() == f"vLLM's CPU build is for Linux, this is {system}"


def test_after_an_interrupt_nothing_else_begins(tool, monkeypatch, capsys):
    ran = both(tool, monkeypatch, tool.Part(130, "5 passed in 1.00s"))
    assert tool.main([]) == 130
    assert len(ran) == 1
    assert capsys.readouterr().out.splitlines()[-1].strip("= ") == "5 passed in 1.00s"


SUITE = """
import time
import pytest

@pytest.fixture
def server():
    yield
    print("the server ended", flush=True)

def test_that_fails():
    assert 0

def test_that_takes_long(server):
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in the background"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["terminal", "request"])
def test_an_interrupted_suite_ends_its_own_way(tool, tmp_path, number, ignored):
    """pytest, in a process group as in a terminal: it takes its fixtures down and closes with its line."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    program = f"""
        import signal, sys
        signal.signal(signal.SIGINT, signal.SIG_IGN if {ignored} else signal.default_int_handler)
        sys.path.insert(0, {str(ROOT / "tools")!r})
        import run_tests
        folder = {str(tmp_path)!r}
        command = [sys.executable, "-m", "pytest", "-s", "-rf", "-p", "no:cacheprovider", "--rootdir", folder, folder]
        part = run_tests.run(command)
        print("ENDED", part.status, part.closing)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if line.strip().endswith("begun"):
            # A terminal tells the whole group, a request to end goes to one process.
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait() == 0
    assert "the server ended" in said
    assert re.fullmatch(rf"ENDED {128 + number} 1 failed in [\d.]+s", said[-1])
