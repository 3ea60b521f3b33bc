"""A study in a process of its own, and the memory that a process takes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS


def in_process(module: str, task: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    """Run ``python -m module`` with a task as JSON on its standard input; its last line of output, from JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(task),
        stdout=subprocess.PIPE,
        text=True,
        cwd=RESULTS.parent.parent,
        env={**os.environ, **environment},
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def peak_mib() -> float:
    """The peak resident size of this program.

    Linux folds the parent's peak into ``ru_maxrss`` when a child starts; the high-water mark of the memory map is the
    same number without it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def reset_peak() -> None:
    """Forget the peak so far (loading a model may need more than running it). Linux alone."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
