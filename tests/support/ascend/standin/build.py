"""Build stand-ins for the CANN libraries that torch_npu links against.

torch_npu and torchair load with eight libraries of CANN, which come with Ascend's driver and not from a package index.
Every symbol that they need and that neither torch nor the system defines gets a definition in one library; the eight
are empty and load that one. ``cann.cpp`` has the few functions that answer something. Every other one ends the process
with its name: a path that would talk to an engine must not seem to have worked.

Needs ``nm``, ``c++filt`` (binutils) and a C++ compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

LIBRARIES = (
    "libascendcl.so",
    "libge_runner.so",
    "libgraph.so",
    "libhccl.so",
    "libfmk_parser.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libascend_protobuf.so",
)
SYSTEM = (
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
)
SOURCE = Path(__file__).with_name("cann.cpp")

REFUSAL = """
#include <stdio.h>
#include <stdlib.h>
static void refuse(const char *name) {
  fprintf(stderr, "stand-in CANN: %s was called; there is no engine behind it (tests/support/ascend/standin)\\n", name);
  fflush(stderr);
  abort();
}
"""


class BuildError(Exception):
    """What the machine lacks, in words for the user."""


def build(wheel: Path, torch_folder: Path, folder: Path) -> Path:
    """The folder with the eight libraries, built there unless a build of the same inputs exists.

    Args:
        wheel: the folder that holds ``torch_npu``.
        torch_folder: the folder of the installed ``torch``.
        folder: where to put builds; they are told apart by a digest.

    Raises:
        BuildError: a tool is missing or failed.
    """
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    tools = {"g++, clang++ or c++": compiler, "nm": shutil.which("nm"), "c++filt": shutil.which("c++filt")}
    lacks = [name for name, path in tools.items() if path is None]
    if lacks:
        raise BuildError(f"the stand-in CANN libraries need {', '.join(lacks)} (Debian, Ubuntu: apt install g++)")
    assert compiler is not None
    mine = [path for path in sorted((wheel / "torch_npu").rglob("*.so")) if "atb" not in path.name]
    theirs = sorted((torch_folder / "lib").glob("*.so*"))
    digest = hashlib.sha256(SOURCE.read_bytes() + Path(__file__).read_bytes())
    for path in (*mine, *theirs):
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    target = folder / f"standin-{digest.hexdigest()[:16]}"
    if not target.exists():
        work = folder / f"{target.name}.{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _build(compiler, mine, theirs, work)
        try:
            work.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(work, ignore_errors=True)
    return target


def _build(compiler: str, mine: Iterable[Path], theirs: Iterable[Path], work: Path) -> None:
    mine = list(mine)
    answers = work / "answers.o"
    _run(compiler, "-std=c++17", "-O1", "-fPIC", "-c", SOURCE, "-o", answers)
    needed = _symbols("--undefined-only", mine)
    libraries = [Path(_run(compiler, f"-print-file-name={name}").strip()) for name in SYSTEM]
    given = _symbols("--defined-only", [*mine, *theirs, *(path for path in libraries if path.is_absolute())])
    answered = _symbols("--defined-only", [answers], dynamic=False)
    refused = sorted(name for name in needed - given - answered if not name.startswith(("Py", "_Py")))
    names = _run("c++filt", input="\n".join(refused)).splitlines()
    lines = [REFUSAL]
    for i, (symbol, name) in enumerate(zip(refused, names, strict=True)):
        text = name.replace("\\", "\\\\").replace('"', '\\"')
        lines.append(f'extern "C" void s{i}() __asm__("{symbol}");\nvoid s{i}() {{ refuse("{text}"); }}')
    source = work / "refusals.cpp"
    source.write_text("\n".join(lines) + "\n")
    common = work / "libcann_standin.so"
    _run(compiler, "-std=c++17", "-O1", "-fPIC", "-shared", source, answers, f"-Wl,-soname,{common.name}", "-o", common)
    empty = work / "empty.cpp"
    empty.write_text("")
    for name in LIBRARIES:
        link = ("-Wl,--no-as-needed", f"-L{work}", "-lcann_standin", "-Wl,-rpath,$ORIGIN", f"-Wl,-soname,{name}")
        _run(compiler, "-shared", "-fPIC", empty, *link, "-o", work / name)


def _symbols(which: str, files: Iterable[Path], dynamic: bool = True) -> set[str]:
    """Names in the symbol tables, without weak undefined ones and without those of a versioned (system) library."""
    out = _run("nm", *(["-D"] if dynamic else []), "--format=posix", which, *files)
    found = set()
    for line in out.splitlines():
        words = line.split()
        if len(words) < 2 or line.endswith(":") or (words[1] in ("w", "v") and which == "--undefined-only"):
            continue
        if which == "--undefined-only" and "@" in words[0]:
            continue
        found.add(words[0].split("@")[0])
    return found


def _run(*command: object, input: str | None = None) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, input=input, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(words)[:400]} failed:\n{done.stderr[-2000:]}")
    return done.stdout
