"""What the cases share: how they are described, run, split over several calls, and stored."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from tmx_compile.bench import record
from tmx_compile.bench.record import Measured, hardware

__all__ = ["Measured"]

RESULTS = Path(__file__).parent / "results"

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Parts:
    """A case whose parts can be measured in calls of their own; their records meet in one file.

    Attributes:
        names: the parts, in the order of the file, for a quick run or a real one.
        settings: the same for every part.
        measure: the records of one part.
        finish: fills in what needs the records of several parts.
    """

    names: Callable[[bool], Sequence[str]]
    settings: Callable[[bool], dict[str, Any]]
    measure: Callable[[str, bool], Records]
    finish: Callable[[Records], None]


@dataclass(frozen=True)
class Case:
    """One benchmark: ``measure(quick)`` runs it, ``columns`` are the record fields that its table shows.

    ``file`` names its result file, which may depend on the machine. A case that comes in ``parts`` has these in place
    of ``measure``. One that ``needs_cuda`` runs nowhere else, but for its quick form where that is ``quick_anywhere``.
    One that takes hours runs only ``on_request``, by its name.
    """

    name: str
    file: str | Callable[[], str]
    measure: Callable[[bool], Measured] | None
    columns: Sequence[str]
    parts: Parts | None = None
    needs_cuda: bool = field(default=False)
    quick_anywhere: bool = True
    on_request: bool = field(default=False)

    @property
    def file_name(self) -> str:
        """The result file on this machine."""
        return self.file if isinstance(self.file, str) else self.file()


@contextlib.contextmanager
def cold_compiles() -> Iterator[None]:
    """Every compile inside is from nothing: no compile cache is read, and what is written is thrown away."""
    with (
        tempfile.TemporaryDirectory(prefix="tmx-bench-") as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
        torch.compiler.config.patch(force_disable_caches=True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
        yield


def run_case(case: Case, quick: bool, module: str) -> dict[str, Any]:
    """Run a case that has no parts, by ``python -m module``; returns the content of its result file."""
    assert case.measure is not None
    before = hardware()
    command = f"python -m {module} {case.name}" + (" --quick" if quick else "")
    return record.result(case.name, command, quick, before, case.measure(quick))


# What must agree before records are put into one file.
_SAME = (("hardware", ("cpu", "gpu")), ("versions", ("python", "torch", "transformers", "tmx_compile")))


def run_parts(
    case: Case, names: Sequence[str], quick: bool, command: str, path: Path | None, minutes: float
) -> dict[str, Any]:
    """Run parts of a case, and store what is known after each; returns the content of the file.

    Records of other parts that the file already holds stay in it. ``runs`` says which command measured which part.

    Args:
        case: the case.
        names: the parts to measure.
        quick: tiny sizes.
        command: how this was called.
        path: the result file, or None for none.
        minutes: no part begins after so long.

    Raises:
        ValueError: the file holds records of another machine or of other versions, or of a quick run.
    """
    assert case.parts is not None
    before, started = hardware(), time.monotonic()
    content = record.result(case.name, command, quick, before, Measured(case.parts.settings(quick), []))
    runs: dict[str, Any] = {}
    records: Records = []
    if path is not None and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        for group, keys in _SAME:
            for key in keys:
                if stored[group].get(key) != content[group].get(key):
                    raise ValueError(
                        f"{path.name} holds {group} {key} {stored[group].get(key)!r}, this is "
                        f"{content[group].get(key)!r}: move that file away first"
                    )
        if stored["quick"] != quick:
            raise ValueError(f"{path.name} holds a run with quick={stored['quick']}: move that file away first")
        runs, records = stored["runs"], stored["records"]
    content |= {"runs": runs, "records": records}
    order = list(case.parts.names(quick))
    for name in names:
        if time.monotonic() - started > 60 * minutes:
            note(f"{case.name}: no time left for {name}")
            continue
        note(f"{case.name}: {name}")
        begin = time.monotonic()
        measured = [{"part": name, **item} for item in case.parts.measure(name, quick)]
        records = [item for item in records if item["part"] != name] + measured
        records.sort(key=lambda item: order.index(item["part"]) if item["part"] in order else len(order))
        runs[name] = {
            "command": command,
            "date": content["date"],
            "tmx_compile_sources": content["versions"]["tmx_compile_sources"],
            "load_average": before["load_average"],
            "s": round(time.monotonic() - begin, 1),
        }
        case.parts.finish(records)
        content |= {"runs": runs, "records": [record.rounded(item) for item in records]}
        if path is not None:
            record.write(content, path)
    return content


def note(text: str) -> None:
    """Say on stderr where a long case stands."""
    Console(stderr=True).print(f"[dim]{time.strftime('%H:%M:%S')} {text}")


def device() -> torch.device:
    """Where the cases run: on a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Let go of what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def command(module: str, given: Sequence[str]) -> str:
    """How a module was called, but for ``--out``: the folder says where, not what."""
    kept = [word for i, word in enumerate(given) if not word.startswith("--out") and given[i - 1 : i] != ["--out"]]
    return shlex.join(["python", "-m", module, *kept])


def main(module: str, description: str, cases: Sequence[Case], arguments: Sequence[str] | None = None) -> None:
    """The command ``python -m module``: run some of ``cases`` and store their results.

    Args:
        module: the module that was called.
        description: what its help says.
        cases: all that it can run.
        arguments: the command's; None: those of this process.

    Raises:
        SystemExit: an argument that fits no case or part, or a case that this machine cannot run.
    """
    known = {case.name: case for case in cases}
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("case", nargs="*", help=f"{', '.join(known)}; by default all that this machine can run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that a case works, measures nothing")
    parser.add_argument("--out", type=Path, help="folder for the result files (default: benchmarks/results)")
    parser.add_argument("--only", help="parts of a case that comes in parts: a pattern such as 'llama/*', or a model")
    parser.add_argument("--missing", action="store_true", help="only the parts that the result file lacks")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further part after so long")
    options = parser.parse_args(given)
    unknown = [name for name in options.case if name not in known]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(known)}")
    usable = [name for name, case in known.items() if _can_run(case, options.quick)]
    refused = [name for name in options.case if name not in usable]
    if refused:
        parser.error(f"case {', '.join(refused)} needs a CUDA device, and torch finds none")
    usual = [name for name in usable if not known[name].on_request]
    chosen = [known[name] for name in options.case or usual]
    if not any(case.parts for case in chosen) and (options.only or options.missing):
        parser.error("--only and --missing are for a case that comes in parts")
    # Tiny sizes must never replace stored measurements.
    out = options.out or (None if options.quick else RESULTS)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    for case in chosen:
        path = None if out is None else out / case.file_name
        if case.parts is None:
            result = run_case(case, options.quick, module)
            if path is not None:
                record.write(result, path)
        else:
            names = _chosen_parts(case, options, path, parser)
            called = command(module, given)
            try:
                result = run_parts(case, names, options.quick, called, path, options.minutes)
            except ValueError as error:
                parser.error(str(error))
        console.print(record.table(result, case.columns))
        if path is not None:
            console.print(f"wrote {path}")


def _can_run(case: Case, quick: bool) -> bool:
    return torch.cuda.is_available() or not case.needs_cuda or (quick and case.quick_anywhere)


def _chosen_parts(
    case: Case, options: argparse.Namespace, path: Path | None, parser: argparse.ArgumentParser
) -> list[str]:
    assert case.parts is not None
    every = list(case.parts.names(options.quick))
    pattern = options.only or "*"
    names = [name for name in every if fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}/")]
    if not names:
        parser.error(f"--only {pattern!r} fits no part; known: {', '.join(every)}")
    if options.missing and path is not None and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))["runs"]
        names = [name for name in names if name not in stored]
    return names
