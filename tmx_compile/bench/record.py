"""What every measurement is stored with: the machine, the versions, the settings; and how it is written and shown."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tmx_compile.version import __version__, package_fingerprint

# Instruction sets that decide which attention kernels exist.
_FLAG_PREFIXES = ("avx", "amx", "fma", "f16c", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Measured:
    """What a measurement hands back: the settings it ran with, and its records (plain data, one dictionary each)."""

    settings: dict[str, Any]
    records: list[dict[str, Any]]


def hardware() -> dict[str, Any]:
    """The processor, its cores as this process may use them, memory, how busy it is; the GPU where there is one."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            lines.setdefault(name.strip(), value.strip())
    flags = lines.get("flags", lines.get("Features", "")).split()
    found: dict[str, Any] = {
        "cpu": lines.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": sorted(flag for flag in set(flags) if flag.startswith(_FLAG_PREFIXES)),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = gpu.name
        found["gpu_memory_gib"] = round(gpu.total_memory / 2**30, 1)
        found["gpu_multiprocessors"] = gpu.multi_processor_count
        found["gpu_capability"] = f"{gpu.major}.{gpu.minor}"
    return found


def versions() -> dict[str, str]:
    """What the numbers depend on; the digest is that of this package's sources."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "tmx_compile": __version__,
        "tmx_compile_sources": package_fingerprint()[:16],
    }
    if torch.cuda.is_available():
        found |= {name: _version(name) for name in ("triton", "flash-attn-4")}
        found["cuda"] = str(torch.version.cuda)
        # None where torch has no cuDNN.
        found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def result(case: str, command: str, quick: bool, before: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    """The content of a result file. ``before`` is :func:`hardware` as it was before the measurement."""
    return {
        "case": case,
        "command": command,
        "date": today(),
        "quick": quick,
        "hardware": dict(before),
        "versions": versions(),
        "settings": rounded(measured.settings),
        "records": [rounded(record) for record in measured.records],
    }


def rounded(value: Any) -> Any:
    """Six significant digits say all that a timing knows, and keep the files readable."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a result file: one record a line, so that a change reads well in a diff."""
    parts = []
    for name, value in content.items():
        if isinstance(value, dict):
            items = (f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
            text = "{\n" + ",\n".join(items) + "\n }"
        elif name == "records":
            text = "[\n" + ",\n".join(f"  {json.dumps(record)}" for record in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def table(content: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """The records of a result as a table; a field that a record lacks, or has as None, is a dash."""
    machine = content["hardware"]
    where = machine.get("gpu") if content["settings"].get("device") == "cuda" else None
    found = Table(title=f"{content['case']}: {where or machine['cpu']}, {machine['threads']} threads")
    for name in columns:
        found.add_column(name, justify="right")
    for record in content["records"]:
        found.add_row(*(_cell(record.get(name)) for name in columns))
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "/".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
