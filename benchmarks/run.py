"""``python -m benchmarks.run [case ...] [--quick] [--out FOLDER]``: run cases and store their results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import common, cpu_operator, first_n, pass_cost, prefill_memory

CASES = {case.name: case for case in (cpu_operator.CASE, pass_cost.CASE, prefill_memory.CASE, first_n.CASE)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Run benchmarks of tmx_compile.")
    parser.add_argument("case", nargs="*", help=f"{', '.join(CASES)}; all of them by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that a case works, measures nothing")
    parser.add_argument("--out", type=Path, help="folder for the result files (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.case if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; known: {', '.join(CASES)}")
    # Tiny sizes must never replace stored measurements.
    out = options.out or (None if options.quick else common.RESULTS)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=180)
    for name in options.case or CASES:
        case = CASES[name]
        result = common.run_case(case, options.quick)
        common.show(case, result, console)
        if out is not None:
            common.write(result, out / case.file)
            console.print(f"wrote {out / case.file}")


if __name__ == "__main__":
    main()
