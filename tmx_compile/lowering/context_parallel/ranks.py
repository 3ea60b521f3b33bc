"""The processes that hold a prompt together, and the collectives between them: functional, so nodes of a graph.

Every process starts the same collectives in the same order, that of the graph, which Inductor keeps; a wait may stand
anywhere behind its start.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tmx_compile.lowering.base import Writer, length

_FUNCTIONAL = torch.ops._c10d_functional


@dataclass(frozen=True)
class Pending:
    """What a collective will give. Whatever is written between its start and its wait runs while it is under way."""

    write: Writer
    made: Any

    def wait(self) -> Any:
        """Its result, to be asked for once."""
        # A wait has a side effect, for torch: what nobody reads is sent all the same.
        return self.write.call(_FUNCTIONAL.wait_tensor.default, self.made)


@dataclass(frozen=True)
class Ranks:
    """The processes of one prompt, in the order of their pieces.

    Attributes:
        group: the name of their process group, by which torch finds it.
        rank: this process among them, from 0.
        size: how many they are.
    """

    group: str
    rank: int
    size: int

    @classmethod
    def of(cls, mesh: Any) -> Ranks:
        """Those of a ``torch.distributed.DeviceMesh`` of one dimension."""
        return cls(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())

    @property
    def is_first(self) -> bool:
        """Whether this process holds the first piece."""
        return self.rank == 0

    @property
    def is_final(self) -> bool:
        """Whether this process holds the final piece."""
        return self.rank == self.size - 1

    def all_to_all(self, write: Writer, x: Any, received: Sequence[Any], sent: Sequence[Any]) -> Pending:
        """Send ``sent[d]`` rows of contiguous ``x`` to process d; get ``received[s]`` rows of process s, in order."""
        splits = list(received), list(sent)
        return Pending(write, write.call(_FUNCTIONAL.all_to_all_single.default, x, *splits, self.group))

    def all_gather(self, write: Writer, x: Any) -> Pending:
        """Contiguous (n, ...) of every process as (size * n, ...), in order."""
        return Pending(write, write.call(_FUNCTIONAL.all_gather_into_tensor.default, x, self.size, self.group))

    def sum(self, write: Writer, x: Any) -> Pending:
        """The sum over all processes."""
        return Pending(write, write.call(_FUNCTIONAL.all_reduce.default, x, "sum", self.group))


def shape_of(x: Any) -> list[Any]:
    """The lengths of a tensor of four dimensions: those of a proxy are proxies where they are not known."""
    return [length(x, dim) for dim in range(4)]


def count_of(shape: Sequence[Any]) -> Any:
    """The numbers in a tensor of a shape."""
    return functools.reduce(operator.mul, shape)


def apart(row: Any, shapes: Sequence[Sequence[Any]]) -> list[Any]:
    """Tensors of so many shapes that follow each other in one row (n,)."""
    at, found = 0, []
    for shape in shapes:
        count = count_of(shape)
        found.append(row[at : at + count].view(*shape))
        at = at + count
    return found
