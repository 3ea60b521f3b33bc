"""Before a graph runs, its processes compare what they are about to do: a difference is an error, and no deadlock."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tmx_compile.errors import TriangleMixError
from tmx_compile.lowering.base import Immediate
from tmx_compile.lowering.context_parallel.ranks import Ranks

_FACTS = ("the graph's attention or its configuration", "the shapes or dtypes of the inputs")


def agreed(compiled: Callable[..., Any], mesh: Any, name: str, facts: str) -> Callable[..., Any]:
    """The compiled graph of one process, run only where all processes of the mesh call the same one alike.

    One collective of a few numbers before all others. A process that never comes is the process group's timeout.

    Args:
        compiled: the graph, called with its inputs.
        mesh: the processes, one dimension.
        name: of the graph, for messages.
        facts: what has to be alike in all processes, beside the inputs: configuration, decisions.

    Raises:
        TriangleMixError: from the call, on every process: what differs, and between which; or the others did not come.
            An error of the graph itself gets a note that names this process and the graph.
    """
    ranks = Ranks.of(mesh)
    where = f"context_parallel: process {ranks.rank} of {ranks.size}"

    def run(*args: Any) -> Any:
        own = torch.tensor([_number(facts), _number(_inputs(args))], dtype=torch.int64, device=mesh.device_type)
        try:
            told = ranks.all_gather(Immediate(), own).wait().view(ranks.size, -1).tolist()
        except RuntimeError as error:
            raise TriangleMixError(f"{where} got no answer of the others before {name}: {error}") from error
        for column, what in enumerate(_FACTS):
            values = [each[column] for each in told]
            others = [number for number, value in enumerate(values) if value != values[0]]
            if others:
                raise TriangleMixError(
                    f"{where}: {what} differ between process 0 and {', '.join(map(str, others))}; "
                    f"this one has {facts if column == 0 else _inputs(args)}"
                )
        try:
            return compiled(*args)
        except Exception as error:
            if hasattr(error, "add_note"):
                error.add_note(f"{where}, in {name}")
            raise

    return run


def _inputs(args: Sequence[Any]) -> str:
    """The inputs but the parameters, in words."""
    tensors = [x for x in args if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter)]
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in tensors)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)
