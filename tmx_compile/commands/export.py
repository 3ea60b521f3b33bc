"""The command ``tmx export``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from tmx_compile.commands.explain import console_for_tables, show
from tmx_compile.commands.models import configuration, depth_of, first_line, load_model
from tmx_compile.commands.outcome import Outcome, rows
from tmx_compile.commands.selection import selected, selection_arguments
from tmx_compile.commands.values import count
from tmx_compile.compilers import torchair as npu
from tmx_compile.errors import TriangleMixError
from tmx_compile.export import export

DTYPES = ("bfloat16", "float16")


class LastLogits(nn.Module):
    """What is exported: token numbers (1, N) int64 in, the logits (1, 1, vocabulary) of the last position out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits; no cache is written."""
        logits: Tensor = self.model(input_ids, use_cache=False, logits_to_keep=1).logits
        return logits


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or name of a causal language model of Transformers")
    none = argparse.SUPPRESS
    add("--to", required=True, type=Path, default=none, metavar="FOLDER", help="where to write, created if missing")
    add("--tokens", required=True, type=count, default=none, metavar="N", help="length of the prompt")
    add("--dynamic", action="store_true", help="one graph for every length of a prompt, not for N alone")
    selection_arguments(parser, required=True)
    add("--name", default="export", help="name of the file, without .air")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights")
    add("--strict", action="store_true", help="fail where a selected layer has to stay dense")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Load, write, show the layers; exits with 2 on bad arguments and where torch_npu is missing."""
    try:
        # Before anything takes minutes.
        npu.load()
        config = configuration(options.model)
        depth = depth_of(config)
        triangle = selected(options, depth)
        ids = torch.zeros(1, options.tokens, dtype=torch.long)
        report = export(
            LastLogits(load_model(options.model, options.dtype)).eval(),
            ids,
            config=triangle,
            export_path=options.to,
            export_name=options.name,
            dynamic=options.dynamic,
            strict=options.strict,
        )
    except ImportError as error:
        parser.error(first_line(error))
    except (ValueError, OSError, TriangleMixError) as error:
        parser.error(str(error))
    except torch._dynamo.exc.TorchDynamoException as error:
        parser.error(f"model {options.model!r} cannot be exported: {first_line(error)}")
    outcome = Outcome(
        model=options.model,
        kind=type(config).__name__,
        tokens=options.tokens,
        device="an NPU",
        config=triangle,
        rows=rows(report, triangle, depth),
        notes=report.notes,
    )
    console: Console = console_for_tables()
    show(outcome, console)
    written = options.to / f"{options.name}.air"
    console.print(f"wrote {os.fspath(written)}", markup=False, highlight=False)
