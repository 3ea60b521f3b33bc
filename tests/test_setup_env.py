"""tools/setup_env.py says what a machine lacks, before it changes anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the files that the set-up reads, in a folder of its own."""
    copy = tmp_path / "repository"
    (copy / "tools").mkdir(parents=True)
    for name in ("tools/setup_env.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """The only folder on the PATH of the set-up under test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def add_program(folder: Path, name: str, prints: str = "") -> Path:
    program = folder / name
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{prints}\nEND\n".replace("cat", shutil.which("cat") or "cat"))
    program.chmod(0o755)
    return program


def add_python(
    folder: Path, name: str, version: tuple[int, int], lacks: tuple[str, ...] = (), header: bool = True
) -> Path:
    return add_program(folder, name, json.dumps({"version": version, "lacks": lacks, "header": header}))


def run(repository: Path, path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools/setup_env.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment.update(PATH=str(path), **variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def files(repository: Path) -> list[str]:
    return sorted(str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file())


def test_a_wrong_python_version_is_named_and_nothing_is_created(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "g++")
    old = add_python(bin_folder, "old-python", (3, 9))
    before = files(repository)
    result = run(repository, bin_folder, "--python", str(old))
    assert result.returncode == 1
    assert "Python 3.10, 3.11, 3.12 or 3.13" in result.stderr
    assert f"{old} is 3.9" in result.stderr
    assert "nothing was changed" in result.stderr
    assert files(repository) == before


def test_a_python_newer_than_torch_knows_is_refused(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "g++")
    new = add_python(bin_folder, "new-python", (3, 14))
    result = run(repository, bin_folder, "--check", "--python", str(new))
    assert result.returncode == 1
    assert f"{new} is 3.14" in result.stderr


def test_another_python_on_the_path_is_taken(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "g++")
    old = add_python(bin_folder, "old-python", (3, 9))
    good = add_python(bin_folder, "python3.12", (3, 12))
    result = run(repository, bin_folder, "--check", "--python", str(old))
    assert result.returncode == 0, result.stderr
    assert f"using {good}" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [({}, "a C++ compiler (looked for g++, clang++, c++)"), ({"CXX": "no-such-cc -O2"}, "CXX=no-such-cc")],
    ids=["none on PATH", "CXX names none"],
)
def test_a_missing_compiler_is_named_and_nothing_is_created(
    repository: Path, bin_folder: Path, variables: dict[str, str], message: str
) -> None:
    python = add_python(bin_folder, "a-python", (3, 11))
    before = files(repository)
    result = run(repository, bin_folder, "--python", str(python), **variables)
    assert result.returncode == 1
    assert message in result.stderr
    assert "apt install g++" in result.stderr
    assert files(repository) == before


def test_every_lack_is_listed_at_once(repository: Path, bin_folder: Path) -> None:
    bare = add_python(bin_folder, "bare-python", (3, 12), lacks=("venv", "ensurepip"), header=False)
    result = run(repository, bin_folder, "--check", "--python", str(bare))
    assert result.returncode == 1
    assert "python3.12-venv" in result.stderr
    assert "python3.12-dev" in result.stderr
    assert "C++ compiler" in result.stderr


def test_the_machine_of_this_test_run_passes_the_version_check(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "clang++")
    result = run(repository, bin_folder, "--check", "--python", sys.executable)
    assert "Python 3.10, 3.11" not in result.stderr


def test_a_finished_set_up_returns_at_once_until_its_inputs_change(repository: Path, bin_folder: Path) -> None:
    sys.path.insert(0, str(repository / "tools"))
    try:
        import setup_env
    finally:
        sys.path.pop(0)
        sys.modules.pop("setup_env", None)
    python = setup_env.venv_python()
    python.parent.mkdir(parents=True)
    python.touch()
    setup_env.stamp_of("dev").write_text(setup_env.fingerprint("dev"))
    # Neither a compiler nor a Python is on the PATH: only a set-up that does nothing can succeed.
    assert run(repository, bin_folder, "--extra", "dev", "--python", "none").returncode == 0
    assert run(repository, bin_folder, "--extra", "demo", "--python", "none").returncode == 1
    with (repository / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert run(repository, bin_folder, "--extra", "dev", "--python", "none").returncode == 1
