"""The command ``tmx bench``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from tmx_compile.bench import layer, record
from tmx_compile.bench.timing import Rounds


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""

    def add(name: str, kind: Callable[[str], object], default: object, text: str, **more: object) -> None:
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, **more)  # type: ignore[arg-type]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("device", str, device, "cpu or cuda")
    add("lengths", _integers(",", "4096,32768"), (4096, 32768), "tokens, by commas", metavar="N,N,...")
    add("geometry", _geometries, ((8, 512, 128),), "sinks/window/last rows, several by commas", metavar="S/W/L")
    add("heads", _integer, 32, "query heads")
    add("kv-heads", _integer, 8, "key heads")
    add("dim", _integer, 128, "head dim")
    add("dtype", _names, ("bfloat16",), f"{', '.join(layer.DTYPES)}; several by commas")
    add("lowering", _names, (), "lowerings by commas; none: those worth timing on the device", metavar="NAME,...")
    add("rounds", _integer, 11, "the most rounds of timing")
    add("budget", _seconds, 8.0, "seconds to spend on the rounds of a length; five rounds at least")
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


def _integer(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return value


def _integers(separator: str, example: str) -> Callable[[str], tuple[int, ...]]:
    def read(text: str) -> tuple[int, ...]:
        parts = text.split(separator)
        if not all(part.strip().isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"must be whole numbers as in {example}, got {text!r}")
        return tuple(int(part) for part in parts)

    return read


def _geometries(text: str) -> tuple[tuple[int, ...], ...]:
    read = _integers("/", "8/512/128")
    found = tuple(read(part) for part in text.split(","))
    if any(len(geometry) != 3 for geometry in found):
        raise argparse.ArgumentTypeError(f"must be sinks/window/last rows as in 8/512/128, got {text!r}")
    return found


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
