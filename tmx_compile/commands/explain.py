"""The command ``tmx explain``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tmx_compile.commands.models import configuration, depth_of, explain_shape
from tmx_compile.commands.outcome import Outcome, rows
from tmx_compile.commands.page import page
from tmx_compile.commands.selection import selected, selection_arguments
from tmx_compile.commands.values import check_folders, count
from tmx_compile.errors import TriangleMixError
from tmx_compile.lowering.table import ASCEND, LOWERINGS

DTYPES = ("float32", "bfloat16", "float16")
# Of a table that goes to no terminal.
_WIDTH = 140
_STYLES = {"triangle": "cyan", "dynamic": "magenta", "refused": "yellow", "dense": "", "none": "dim"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder with a config.json, or name, of a causal language model of Transformers")
    add("--tokens", required=True, type=count, default=argparse.SUPPRESS, metavar="N", help="length of the prompt")
    selection_arguments(parser, required=False)
    names = [name for name in LOWERINGS if name != ASCEND.name]
    add("--lowering", choices=names, default="auto", help="how sparse layers are computed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="what the lowerings answer for")
    add("--dtype", choices=DTYPES, default=argparse.SUPPRESS, help="of the weights (default: the configuration's)")
    add("--html", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="write a page with pictures of the masks")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Trace, show, and write the page; exits with 2 on bad arguments."""
    out: Path | None = getattr(options, "html", None)
    try:
        check_folders(html=out)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu, torch finds no CUDA device")
        model = configuration(options.model)
        depth = depth_of(model)
        config = selected(options, depth)
        report = explain_shape(
            model,
            config,
            tokens=options.tokens,
            device=options.device,
            dtype=getattr(options, "dtype", None),
            lowering=options.lowering,
        )
        outcome = Outcome(
            model=options.model,
            kind=type(model).__name__,
            tokens=options.tokens,
            device=options.device,
            config=config,
            rows=rows(report, config, depth),
            notes=report.notes,
        )
        if out is not None:
            out.write_text(page(outcome), encoding="utf-8")
    except (ValueError, OSError, TriangleMixError) as error:
        parser.error(str(error))
    console = console_for_tables()
    show(outcome, console)
    if out is not None:
        console.print(f"wrote {os.fspath(out)}", markup=False, highlight=False)


def console_for_tables() -> Console:
    """The terminal, or where there is none lines that are wide enough for the reasons."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def show(outcome: Outcome, console: Console) -> None:
    """The summary and a line for every layer."""
    for name, value in outcome.summary():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    table = Table()
    for name in ("layer", "decision", "lowering", "pairs", "why"):
        table.add_column(name, justify="right" if name in ("layer", "pairs") else "left", overflow="fold")
    for row in outcome.rows:
        table.add_row(
            "?" if row.layer is None else str(row.layer),
            row.words,
            row.lowering,
            row.share,
            escape(row.why),
            style=_STYLES[row.kind],
        )
    console.print(table)
    for note in outcome.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
