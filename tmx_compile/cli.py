"""The command ``tmx``."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple


class _Command(NamedTuple):
    """Where a command is, and what ``--help`` says of it.

    ``module`` has ``<prefix>arguments(parser)``, and ``<prefix>run(options, parser)``, under these names.
    """

    module: str
    arguments: str
    run: str
    help: str
    description: str


_COMMANDS = {
    "explain": _Command(
        "explain",
        "arguments",
        "run",
        "which layers of a model would go sparse, and why others would not; needs no weights",
        "Trace a prompt through a Transformers model without its weights, and tell which layers would go sparse, why "
        "others would not, and how much of the attention is left.",
    ),
    "export": _Command(
        "export",
        "arguments",
        "run",
        "write a model with sparse layers for Ascend NPUs (.air); needs torch_npu and CANN, but no NPU",
        "Write a Transformers model with TriangleMix inside for offline use on Ascend NPUs: prompts of one sequence "
        "in, the logits of the last token out. Needs torch_npu and CANN, but no NPU.",
    ),
    "bench": _Command(
        "bench",
        "arguments",
        "run",
        "time one attention layer: dense against each lowering, and the floor",
        "Time one attention layer: dense by its best backend against each lowering, and the floor.",
    ),
    "calibrate": _Command(
        "calibrate",
        "arguments",
        "run",
        "measure which layers of a model can go sparse, and save them as a profile",
        "Measure which layers of a Transformers model need the Middle section of their attention least, on "
        "plain text, and save a profile for TriangleMixConfig.from_profile.",
    ),
    "evaluate": _Command(
        "quality",
        "evaluate_arguments",
        "run_evaluate",
        "measure what sparse layers cost a model, against dense attention",
        "Measure what sparse layers cost a Transformers model on plain text: next-token divergence and "
        "perplexity against dense attention, by layers, how many, and geometry.",
    ),
    "advise": _Command(
        "quality",
        "advise_arguments",
        "run_advise",
        "the fastest of the evaluated choices within a budget of quality",
        "Choose among the evaluated sparse layers and geometries: within a budget of quality, those that "
        "save most attention time at a prompt length. Prints the choice as code; exits with 1 where nothing fits.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``tmx`` with the given arguments, those of the process by default; exits with 2 on bad ones."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="tmx", description="Tools of tmx_compile.")
    commands = parser.add_subparsers(dest="command", required=True)
    chosen: Any = None
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        # Only the module of the command that is run: the others need not be imported to list them.
        if given[:1] == [name]:
            module = importlib.import_module(f"tmx_compile.commands.{command.module}")
            getattr(module, command.arguments)(sub)
            chosen = (getattr(module, command.run), sub)
    options = parser.parse_args(given, argparse.Namespace(command_line=shlex.join(["tmx", *given])))
    run, sub = chosen
    run(options, sub)
