"""``python -m benchmarks.run [case ...] [--quick] [--out FOLDER]``: run cases and store their results."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    calibration,
    common,
    first_n,
    kv_cache,
    million,
    operator,
    pass_cost,
    prefill_memory,
    quality,
    recall,
    stages,
    throughput,
    training,
    ttft,
)
from tmx_compile.bench import record

CASES = {
    case.name: case
    for case in (
        operator.CASE,
        pass_cost.CASE,
        prefill_memory.CASE,
        first_n.CASE,
        calibration.CASE,
        quality.CASE,
        recall.CASE,
        ttft.CASE,
        million.CASE,
        stages.CASE,
        kv_cache.CASE,
        throughput.CASE,
        training.CASE,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmarks of tmx_compile.")
    parser.add_argument("case", nargs="*", help=f"{', '.join(CASES)}; by default all that this machine can run")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that a case works, measures nothing")
    parser.add_argument("--out", type=Path, help="folder for the result files (default: benchmarks/results)")
    parser.add_argument("--only", help="parts of a case that comes in parts: a pattern such as 'llama/*', or a model")
    parser.add_argument("--missing", action="store_true", help="only the parts that the result file lacks")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no further part after so long")
    options = parser.parse_args(given)
    unknown = [name for name in options.case if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    usable = [name for name, case in CASES.items() if _can_run(case, options.quick)]
    refused = [name for name in options.case if name not in usable]
    if refused:
        parser.error(f"case {', '.join(refused)} needs a CUDA device, and torch finds none")
    usual = [name for name in usable if not CASES[name].on_request]
    chosen = [CASES[name] for name in options.case or usual]
    if not any(case.parts for case in chosen) and (options.only or options.missing):
        parser.error("--only and --missing are for a case that comes in parts")
    # Tiny sizes must never replace stored measurements.
    out = options.out or (None if options.quick else common.RESULTS)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=180)
    for case in chosen:
        path = None if out is None else out / case.file_name
        if case.parts is None:
            result = common.run_case(case, options.quick)
            if path is not None:
                record.write(result, path)
        else:
            names = _chosen_parts(case, options, path, parser)
            command = common.command("benchmarks.run", given)
            try:
                result = common.run_parts(case, names, options.quick, command, path, options.minutes)
            except ValueError as error:
                parser.error(str(error))
        console.print(record.table(result, case.columns))
        if path is not None:
            console.print(f"wrote {path}")


def _can_run(case: common.Case, quick: bool) -> bool:
    return torch.cuda.is_available() or not case.needs_cuda or (quick and case.quick_anywhere)


def _chosen_parts(
    case: common.Case, options: argparse.Namespace, path: Path | None, parser: argparse.ArgumentParser
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


if __name__ == "__main__":
    main()
