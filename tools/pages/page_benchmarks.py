"""The generated blocks of docs/benchmarks.md, and its pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.pages import pictures, section_layer, section_memory, section_throughput, section_ttft
from tools.pages.blocks import filled
from tools.pages.markdown import Fields, table
from tools.pages.pictures import Picture
from tools.pages.results import commands, load, machine_and_versions

PAGE = "benchmarks.md"


def generate(results: Path, docs: Path) -> tuple[str, list[Picture]]:
    """The page of ``docs`` with its blocks from the files in ``results``, and its pictures.

    Raises:
        ValueError: a result file is missing, lacks a field, or holds a ``--quick`` run; or the page lacks a mark.
    """
    loaded = {name: load(results / f"{name}.json") for name in BLOCKS}
    machines: dict[tuple[str, str], str] = {}
    blocks = {name: f"{text(loaded[name])}\n\n{_origin(loaded[name], name, machines)}" for name, text in BLOCKS.items()}
    blocks["machines"] = "\n".join(f"- **{name}**: {'. '.join(told)}." for told, name in machines.items())
    drawn = [picture(loaded[name], f"{name.replace('_', '-')}.svg") for name, picture in PICTURES.items()]
    return filled(docs / PAGE, blocks), drawn


def _origin(result: Fields, name: str, machines: dict[tuple[str, str], str]) -> str:
    """Where the numbers come from. ``machines`` are those told so far; the page describes them once, at its end."""
    machine = machines.setdefault(machine_and_versions(result), f"Machine {'ABCDEFGH'[len(machines)]}")
    # Only a CPU's times depend on them.
    threads = "" if "gpu" in result["hardware"] else f", threads: {result['hardware']['threads']}"
    where = f"[{name}.json](../benchmarks/results/{name}.json)"
    return f"<sub>{machine}{threads}; {result['date']}; {commands(result)}; {where}</sub>"


_STAGES = (
    *("open", "find", "prove", "judge", "settle", "choose", "decide"),
    *("substitute", "clean", "lower", "verify", "close"),
)
"""Every stage that a file of pass_cost may have, in the order of the pass; older files have others than newer ones."""


def _pass_cost(result: Fields) -> str:
    settings, records = result["settings"], result["records"]
    stages = [stage for stage in _STAGES if f"{stage}_ms" in records[0]]
    if not stages:
        raise ValueError(f"pass_cost.json: record 0 has the time of no stage; known are {', '.join(_STAGES)}")
    largest = records[-1]
    slowest = max(stages, key=lambda stage: largest[f"{stage}_ms"])
    rows = []
    for r in records:
        cells = ["", ""]
        if r["inductor_dense_s"] is not None:
            cells = [f"{r['inductor_dense_s']:.1f}", f"{r['pass_share']:.1%}"]
        rows.append([str(r["layers"]), f"{r['nodes']:,}", f"{r['pass_ms'] / 1e3:.2f}", *cells])
    head = ["layers", "nodes", "the pass, s", "Inductor, s", "pass / Inductor"]
    return (
        f"{settings['model']}; {settings['config']}. Medians of {settings['repeats']} passes; Inductor's compile is of "
        f"the dense graph, cold.\n\n{table(head, rows)}\n\nAt {largest['layers']} layers `{slowest}` takes "
        f"{largest[f'{slowest}_ms'] / largest['pass_ms']:.0%} of the pass."
    )


BLOCKS: dict[str, Callable[[Fields], str]] = {
    "operator_cuda": section_layer.section,
    "operator_cuda_peer": section_layer.peer,
    "million": section_layer.million,
    "training": section_layer.training,
    "training_step": section_layer.training_step,
    "ttft": section_ttft.section,
    "throughput_cuda": section_throughput.section,
    "operator_cpu": section_layer.section,
    "throughput": section_throughput.section,
    "prefill_memory": section_memory.prefill,
    "kv_cache": section_memory.kv_cache,
    "pass_cost": _pass_cost,
}
"""By the name of a block and of its result file."""

PICTURES: dict[str, Callable[[Any, str], Picture]] = {
    "operator_cuda": pictures.operator,
    "ttft": pictures.ttft,
    "operator_cpu": pictures.operator,
}
