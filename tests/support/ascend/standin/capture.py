"""What torchair would hand to CANN. Runs where torch_npu is loaded (see the package's docstring)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


class NoEngineError(RuntimeError):
    """A compiled GE graph was to be run, and there is nothing that runs it."""


def exported(model: torch.nn.Module, *args: Any, folder: str | Path, dynamic: bool = False, **kwargs: Any) -> bytes:
    """The ModelDef that ``torchair.dynamo_export(*args, model=model, ...)`` writes as ``export.air``."""
    import torchair

    # The default of torchair's parameter is one object for all calls.
    config = torchair.CompilerConfig()
    torchair.dynamo_export(*args, model=model, export_path=str(folder), dynamic=dynamic, config=config, **kwargs)
    return air(folder)


def air(folder: str | Path) -> bytes:
    """The ModelDef in the one ``.air`` file of a folder."""
    (path,) = Path(folder).glob("*.air")
    return path.read_bytes()


@contextlib.contextmanager
def engine(
    execute: Callable[[bytes, Sequence[torch.Tensor]], Sequence[torch.Tensor]] | None = None,
) -> Iterator[list[bytes]]:
    """GE mode: collects the ModelDef of every graph that is loaded, and runs it with ``execute``.

    ``execute(model, inputs)`` gets the graph's Data inputs in order and returns its outputs; without it running raises
    :class:`NoEngineError`.
    """
    from torchair.core import _backend

    models: list[bytes] = []

    class Graph:
        def __init__(self, name: str = "") -> None:
            self.model: bytes | None = None
            self.compiled = False

        def load(self, ge_graph: Any, options: Any = None) -> None:
            self.model = ge_graph.SerializeToString()
            models.append(self.model)

        def compile(self) -> None:
            assert self.model is not None
            self.compiled = True

        def run(self, inputs: Any, assigned_outputs: Any = (), stream: Any = None) -> Any:
            assert self.compiled
            assert self.model is not None
            assert not any(out is not None for out in assigned_outputs), "outputs written in place are not supported"
            if execute is None:
                raise NoEngineError("the stand-in for CANN runs no graph")
            return execute(self.model, inputs)

    real = _backend.TorchNpuGraph
    _backend.TorchNpuGraph = Graph
    try:
        yield models
    finally:
        _backend.TorchNpuGraph = real
