"""What every analysis shows while it runs, and says about the model that it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, show: bool) -> Iterator[Callable[[], None]]:
    """A bar on stderr of ``total`` steps (None: unknown); yields what to call after each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not show)
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def dtype_of(model: nn.Module) -> str:
    """The dtype of a model's weights: "float32" and so on."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def device_of(model: nn.Module) -> str:
    """Where a model is: a GPU's name, or the kind of device."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
