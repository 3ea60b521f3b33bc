"""Build the package as it would be published, and check what came out.

    python tools/check_package.py [--quick]

Builds the sdist, and the wheel from the sdist, in a temporary copy of the checkout, and checks contents and metadata.
``--quick`` stops there and needs nothing but setuptools. Else the build goes through `build`, `twine check --strict`
reads the metadata, and the wheel is installed into an empty environment, where `tmx --help` and the complete example
of README.md have to run; that takes minutes and pip's index.
"""

from __future__ import annotations

import argparse
import email
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    *(".git", ".venv", ".npu", ".vllm", "__pycache__", "build", "dist", "site", "*.egg-info", ".*_cache"),
    *(".hypothesis", "results"),
)
# What setuptools calls for PEP 517, without a tool around it.
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
BUILD_WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


class PackageError(Exception):
    """Something that must not be published; the message says what."""


def main(arguments: list[str] | None = None) -> int:
    """Build and check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="build and check contents and metadata, no more")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        try:
            check(work, quick=options.quick)
        except PackageError as error:
            print(f"package: {error}", file=sys.stderr)
            return 1
    return 0


def check(work: Path, *, quick: bool) -> None:
    """All checks, in an empty folder."""
    source, built = work / "source", work / "dist"
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    built.mkdir()
    if quick:
        build_quick(source, built, work)
    else:
        say("building the sdist, and the wheel from it, with the newest build and twine")
        tools = new_environment(work / "tools")
        run(tools, "-m", "pip", "install", "--quiet", "build", "twine")
        run(tools, "-m", "build", "--outdir", str(built), str(source))
    (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    say(f"built {sdist.name} and {wheel.name}")
    check_contents(source, sdist, wheel)
    say("contents and metadata are as they should be")
    if quick:
        return
    run(tools, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    say("twine has nothing to say against the metadata")
    empty = new_environment(work / "empty")
    say("installing the wheel with its extra 'hf' into an empty environment (minutes)")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    run(empty, "-m", "pip", "install", "--quiet", *constraints, f"tmx-compile[hf] @ {wheel.as_uri()}")
    # From a folder of its own, so that nothing of the checkout is in reach.
    home = work / "home"
    home.mkdir()
    run(empty.with_name("tmx"), "--help", cwd=home)
    say("tmx --help runs")
    (home / "example.py").write_text(readme_example(), encoding="utf-8")
    shown = run(empty, "example.py", cwd=home)
    if "triangle" not in shown:
        raise PackageError(f"the example of README.md reports no triangle layer:\n{shown}")
    say("the complete example of README.md runs")


def build_quick(source: Path, built: Path, work: Path) -> None:
    """The sdist by this Python's setuptools, and the wheel from what is in the sdist."""
    run(Path(sys.executable), "-c", BUILD_SDIST, str(built), cwd=source)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        # The filter came with the security releases of 3.10 and 3.11.
        archive.extractall(work / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = (work / "unpacked").iterdir()
    run(Path(sys.executable), "-c", BUILD_WHEEL, str(built), cwd=unpacked)


def check_contents(source: Path, sdist: Path, wheel: Path) -> None:
    """``PackageError`` unless the wheel holds the package, whole and alone, and the metadata says what it should."""
    package = source / "tmx_compile"
    want = {str(path.relative_to(source)) for path in package.rglob("*") if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
        entries = archive.read(f"{about}/entry_points.txt").decode()
    have = {name for name in names if not name.startswith(f"{about}/")}
    if have != want:
        missing, extra = sorted(want - have), sorted(have - want)
        raise PackageError(f"the wheel lacks {missing or 'nothing'}, and should not have {extra or 'nothing else'}")
    if "tmx_compile/py.typed" not in have:
        raise PackageError("the wheel has no py.typed: its types would be ignored")
    for line in (
        "tmx = tmx_compile.cli:main",
        "tmx = tmx_compile.backend:tmx",
        "trianglemix = tmx_compile.integrations.vllm:register",
    ):
        if line not in entries:
            raise PackageError(f"the wheel's entry points lack {line!r}, got {entries!r}")
    if not any(name.startswith(f"{about}/") and name.endswith("/LICENSE") for name in names):
        raise PackageError("the wheel lacks LICENSE")
    version = re.search(r'^__version__ = "(.+)"', (package / "version.py").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = {"Name": "tmx-compile", "License-Expression": "Apache-2.0", "Description-Content-Type": "text/markdown"}
    if version is not None:
        wanted["Version"] = version[1]
    for name, value in wanted.items():
        if metadata[name] != value:
            raise PackageError(f"the metadata's {name} must be {value!r}, got {metadata[name]!r}")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    lacking = sorted((want | {"pyproject.toml", "README.md", "LICENSE"}) - inside)
    if lacking:
        raise PackageError(f"the sdist lacks {lacking}")


def readme_example() -> str:
    """The example of README.md that is complete as it stands."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- run -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PackageError("README.md has no example that is marked to be run")
    return found[1]


def new_environment(folder: Path) -> Path:
    """A virtual environment with nothing but pip; its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


def run(program: Path, *arguments: str, cwd: Path | None = None) -> str:
    """What a program writes; its output goes into the error where it fails."""
    done = subprocess.run(
        [str(program), *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise PackageError(f"{program.name} {' '.join(arguments)} failed:\n{done.stdout}")
    return done.stdout


def say(text: str) -> None:
    """Print one line of progress now, also into a pipe."""
    print(f"package: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
