"""What the cases share: the record of the machine, interleaved timing, result files and tables."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import tmx_compile
from tmx_compile.version import package_fingerprint

RESULTS = Path(__file__).parent / "results"

# Instruction sets that decide which attention kernels exist.
_FLAG_PREFIXES = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Measured:
    """What a case hands back: the settings it ran with, and its records (plain data, one dictionary each)."""

    settings: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One benchmark: ``measure(quick)`` runs it, ``columns`` are the record fields that its table shows."""

    name: str
    file: str
    measure: Callable[[bool], Measured]
    columns: Sequence[str]


@dataclass(frozen=True)
class Timing:
    """Wall time of one variant over all rounds, in milliseconds."""

    median: float
    min: float
    max: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        return cls(*(1e3 * f(seconds) for f in (statistics.median, min, max)), len(seconds))

    def fields(self, prefix: str = "") -> dict[str, float]:
        """As record fields: ``ms``, ``ms_min``, ``ms_max``, ``rounds``."""
        values = {"ms": self.median, "ms_min": self.min, "ms_max": self.max, "rounds": self.rounds}
        return {prefix + name: value for name, value in values.items()}


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    variants: Mapping[str, Callable[[], Any]], *, budget_s: float, least: int, most: int, warmup: int = 1
) -> dict[str, Timing]:
    """Time the variants in turn, A B C A B C, so that a disturbance or a change of clock rate meets them all.

    Rounds go on until ``budget_s`` is spent, at least ``least`` and at most ``most`` of them, after ``warmup`` untimed
    ones.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(warmup):
        for run in variants.values():
            run()
    gc.collect()
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget_s:
            break
        for name, run in variants.items():
            samples[name].append(seconds(run))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def speedup(baseline: Timing, variant: Timing) -> float:
    """The ratio of medians: above 1 where ``variant`` is the faster."""
    return baseline.median / variant.median


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


def hardware() -> dict[str, Any]:
    """The processor, its cores as this process may use them, its memory, and how busy it is."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    flags = lines.get("flags", lines.get("Features", "")).split()
    return {
        "cpu": lines.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(flag for flag in set(flags) if flag.startswith(_FLAG_PREFIXES)),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """What the numbers depend on; the digest is that of this package's sources."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "tmx_compile": tmx_compile.__version__,
        "tmx_compile_sources": package_fingerprint()[:16],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_case(case: Case, quick: bool) -> dict[str, Any]:
    """Run a case; returns the content of its result file."""
    before = hardware()
    measured = case.measure(quick)
    return {
        "case": case.name,
        "command": f"python -m benchmarks.run {case.name}" + (" --quick" if quick else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "quick": quick,
        "hardware": before,
        "versions": versions(),
        "settings": measured.settings,
        "records": [_rounded(record) for record in measured.records],
    }


def _rounded(value: Any) -> Any:
    """Six significant digits say all that a timing knows, and keep the files readable."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result file: one record a line, so that a change reads well in a diff."""
    parts = []
    for name, value in result.items():
        if isinstance(value, dict):
            items = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            text = "{\n" + ",\n".join(items) + "\n }"
        elif name == "records":
            text = "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def show(case: Case, result: Mapping[str, Any], console: Console) -> None:
    """Print the table of a result."""
    table = Table(title=f"{case.name}: {result['hardware']['cpu']}, {result['hardware']['threads']} threads")
    for name in case.columns:
        table.add_column(name, justify="right")
    for record in result["records"]:
        table.add_row(*(_cell(record[name]) for name in case.columns))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def note(text: str) -> None:
    """Say on stderr where a long case stands."""
    Console(stderr=True).print(f"[dim]{time.strftime('%H:%M:%S')} {text}")
