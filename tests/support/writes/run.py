"""Draws many cases and records what became of them.

python -m tests.support.writes.run --cases 5000 --seed 1 --jobs 16 --out writes.json
python -m tests.support.writes.run --only 1:17 --verbose
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import tmx_compile
from tests.support.writes.judge import FAILURES, Outcome, judge

WAYS = ("eager", "export", "inductor")


def main() -> int:
    """Run the command; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first number of every case's seed")
    parser.add_argument("--inductor", type=float, default=0.0, help="share of cases that go through Inductor")
    parser.add_argument("--export", type=float, default=0.1, help="share of cases that are exported and rewritten")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", help="one case, by the seed that a record gives it")
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after so many minutes")
    parser.add_argument("--verbose", action="store_true", help="print the program of every failing case (or of --only)")
    parser.add_argument("--out", type=Path, help="where the record goes, as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    outcomes = []
    seeds = [args.only] if args.only else [f"{args.seed}:{number}" for number in range(args.cases)]
    until = started + 60 * args.minutes if args.minutes else math.inf
    for outcome in judged(seeds, args.jobs, partial(case, inductor=args.inductor, export=args.export), until):
        outcomes.append(outcome)
        if outcome.kind in FAILURES or args.only:
            print(f"{outcome.seed} {outcome.way} {outcome.kind}: {outcome.message} {'; '.join(outcome.program.writes)}")
            if args.verbose:
                show(outcome)
            sys.stdout.flush()
    record = recorded(outcomes, time.monotonic() - started)
    print(json.dumps({name: record[name] for name in ("seconds", "kinds", "decisions", "triangle")}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 1 if any(record["kinds"].get(kind) for kind in FAILURES) else 0


def judged(seeds: list[str], jobs: int, judge_one: Callable[[str], Outcome], until: float) -> Iterator[Outcome]:
    """The outcomes in the order of the seeds, up to a time."""
    if jobs == 1:
        for seed in seeds:
            if time.monotonic() > until:
                return
            yield judge_one(seed)
        return
    with get_context("spawn").Pool(jobs) as pool:
        for outcome in pool.imap(judge_one, seeds):
            yield outcome
            if time.monotonic() > until:
                pool.terminate()
                return


def case(seed: str, inductor: float, export: float) -> Outcome:
    """Draw and judge the case of one seed."""
    torch.set_num_threads(1)
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    logging.getLogger("tmx_compile").setLevel(logging.CRITICAL)
    return judge(seed, **way_of(seed, inductor, export))


def way_of(seed: str, inductor: float, export: float) -> dict[str, bool]:
    """How a case is run: drawn apart from the program, so that one seed means one program whatever the shares."""
    share = random.Random(f"way {seed}").random()
    return {"inductor": share < inductor, "export": share > 1 - export}


def show(outcome: Outcome) -> None:
    """Print a case for a person."""
    program = outcome.program
    print(f"# lengths {program.lengths}, dynamic {program.dynamic}, layers {program.layered}, {program.lowering}")
    print(f"# geometry {program.geometry}, min_seq_len {program.min_seq_len}, outside {program.outside!r}")
    print(f"# decisions {outcome.decisions}")
    print(program.source)


def recorded(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """The record: what was run, on what, and what came of it."""
    failed = [outcome for outcome in outcomes if outcome.kind in FAILURES]
    sites = Counter(reason or decision for o in outcomes for decision, reason in o.decisions)
    sparse = sum(any(decision == "triangle" for decision, _ in o.decisions) for o in outcomes)
    return {
        "command": " ".join(["python -m tests.support.writes.run", *sys.argv[1:]]),
        "versions": {"tmx_compile": tmx_compile.__version__, "torch": torch.__version__},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()},
        "cases": len(outcomes),
        "seconds": round(seconds, 1),
        "kinds": dict(Counter(outcome.kind for outcome in outcomes).most_common()),
        "ways": {
            way: dict(Counter(o.kind for o in outcomes if o.way == way)) for way in ("eager", "export", "inductor")
        },
        "triangle": {"cases": sparse, "share": round(sparse / max(len(outcomes), 1), 3)},
        "decisions": dict(sites.most_common()),
        "redrawn": sum(outcome.redrawn for outcome in outcomes),
        "reference": [f"{o.seed}: {o.message}" for o in outcomes if o.kind == "reference"],
        "failing_messages": dict(Counter(f"{o.kind}: {o.message.split(': off')[0]}" for o in failed).most_common(40)),
        "failing": [
            {
                "seed": o.seed,
                "way": o.way,
                "kind": o.kind,
                "message": o.message,
                "form": o.program.form,
                "mask": o.program.mask,
                "writes": o.program.writes,
                "decisions": o.decisions,
                "lengths": o.program.lengths,
                "dynamic": o.program.dynamic,
                "layers": o.program.layered,
                "lowering": o.program.lowering,
                "geometry": o.program.geometry,
                "outside": o.program.outside,
                "source": o.program.source,
            }
            for o in failed
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
