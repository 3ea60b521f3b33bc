"""The command ``tmx bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from tmx_compile.bench import layer, record
from tmx_compile.bench.timing import Rounds
from tmx_compile.commands.values import count, counts, geometries, number
from tmx_compile.mask.geometry import Geometry


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""

    def add(name: str, kind: Callable[[str], object], default: object, text: str, **more: object) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, **more)  # type: ignore[arg-type]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("device", str, device, "cpu or cuda")
    add("lengths", counts, (4096, 32768), "tokens, by commas", metavar="N,N,...")
    add("geometry", geometries, (Geometry(8, 512, 128),), "sinks/window/last rows, several by commas", metavar="S/W/L")
    add("heads", count, 32, "query heads")
    add("kv-heads", count, 8, "key heads")
    add("dim", count, 128, "head dim")
    add("dtype", _names, ("bfloat16",), f"{', '.join(layer.DTYPES)}; several by commas")
    add("lowering", _names, (), "lowerings by commas; none: those worth timing on the device", metavar="NAME,...")
    add("rounds", count, 11, "the most rounds of timing")
    add("budget", number, 8.0, "seconds to spend on the rounds of a length; five rounds at least")
    parser.add_argument("--static", action="store_true", help="a compile for each length, not one for all")
    add("out", Path, None, "file for the results, JSON", metavar="FILE")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Measure, show and write; exits with 2 on bad arguments."""
    try:
        plan = layer.Plan(
            device=options.device,
            lengths=options.lengths,
            geometries=options.geometry,
            dtypes=options.dtype,
            heads=options.heads,
            kv_heads=options.kv_heads,
            head_dim=options.dim,
            lowerings=options.lowering,
            dynamic=not options.static,
            rounds=Rounds(options.budget, min(5, options.rounds), options.rounds),
        )
        if options.out is not None and not options.out.parent.is_dir():
            raise ValueError(f"out must be a file in an existing folder, got {str(options.out)!r}")
    except ValueError as error:
        parser.error(str(error))
    terminal, notes = Console(), Console(stderr=True)
    before = record.hardware()
    measured = layer.measure(plan, note=lambda text: notes.print(f"[dim]{text}"))
    content = record.result("operator", options.command_line, False, before, measured)
    console = terminal if terminal.is_terminal else Console(width=180)
    console.print(record.table(content, layer.COLUMNS))
    for name, reason in content["settings"]["left_out"].items():
        notes.print(f"left out: {name}: {reason}", markup=False)
    if options.out is not None:
        record.write(content, options.out)
        console.print(f"wrote {options.out}", markup=False)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
