"""The result files as the pages read them: plain data whose gaps are errors, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

from tools.pages.markdown import Fields

MOVED = {
    "benchmarks.run calibration": "studies.run calibration",
    "benchmarks.run first_n": "studies.run first_n",
    "benchmarks.run kv_cache": "studies.run kv_cache",
    "benchmarks.run million": "studies.run million",
    "benchmarks.run pass_cost": "studies.run pass_cost",
    "benchmarks.run prefill_memory": "studies.run prefill_memory",
    "benchmarks.run quality": "studies.run quality",
    "benchmarks.run recall": "studies.run recall",
    "benchmarks.run stacked": "studies.run stacked_layer",
    "benchmarks.run training": "studies.run training",
    "benchmarks.recall_model": "studies.recall_model",
}
"""Commands that stored results were measured by, and what the same code is called now."""

_MOST_COMMANDS = 2


def today(command: str) -> str:
    """A command as it is written now, whatever it was called when it ran."""
    for old, new in MOVED.items():
        whole = f"python -m {old}"
        if command == whole or command.startswith(f"{whole} "):
            return f"python -m {new}{command.removeprefix(whole)}"
    return command


def training(path: Path) -> Fields:
    """The record that the training left."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: python -m studies.recall_model writes it")
    return Fields(json.loads(path.read_text(encoding="utf-8")), path.name)


def load(path: Path) -> Fields:
    """A result file.

    Raises:
        ValueError: it is missing, lacks what every result has, or holds a ``--quick`` run.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing; measure it with python -m benchmarks.run or studies.run")
    content = json.loads(path.read_text(encoding="utf-8"))
    result = Fields(content, path.name)
    if result["quick"]:
        raise ValueError(f"{path.name} holds a --quick run, which measures nothing")
    for name in ("hardware", "versions", "settings"):
        result[name] = Fields(result[name], f"{path.name}: {name}")
    result["records"] = [Fields(item, f"{path.name}: record {i}") for i, item in enumerate(result["records"])]
    return result


def origin(result: Fields, file: str) -> str:
    """The machine, the versions, the date, the commands, and the file."""
    sources = [result["versions"]["tmx_compile_sources"]]
    sources += [run["tmx_compile_sources"] for run in result.get("runs", {}).values()]
    machine, versions = machine_and_versions(result, threads=True)
    return (
        f"{machine}. {versions} (sources {', '.join(dict.fromkeys(sources))}). {result['date']}, {commands(result)}, "
        f"`benchmarks/results/{file}`."
    )


def machine_and_versions(result: Fields, threads: bool = False) -> tuple[str, str]:
    """The hardware, with the threads in use if asked for, and the software."""
    machine, version = result["hardware"], result["versions"]
    telling = [flag for flag in machine["flags"] if flag in ("avx2", "avx512f", "avx512_bf16", "avx512_fp16")]
    telling += [flag for flag in machine["flags"] if flag.startswith("amx")] or ["no AMX"]
    # What a GPU took, the instructions of its host do not tell.
    flags = "" if "gpu" in machine else f", {', '.join(telling)}"
    gpu = f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, CUDA {version['cuda']}; " if "gpu" in machine else ""
    used = f", {machine['threads']} threads" if threads else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cores']} cores{used}, {machine['memory_gib']} GiB{flags}",
        f"Python {version['python']}, torch {version['torch']}, transformers {version['transformers']}, "
        f"tmx_compile {version['tmx_compile']}",
    )


def commands(result: Fields) -> str:
    """The commands that measured the file, as they are called today; of many, what they have in common."""
    # A file in parts: the last command is only one of those that made it.
    found = [run["command"] for run in result.get("runs", {}).values()] or [result["command"]]
    different = list(dict.fromkeys(map(today, found)))
    if len(different) <= _MOST_COMMANDS:
        return ", ".join(f"`{command}`" for command in different)
    whole = " ".join(different[0].split()[:4])
    return f"`{whole}` in {len(different)} calls (`--only`; the file names the call of each part)"
