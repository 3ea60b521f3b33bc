"""The processes that hold a prompt together, and the collectives between them: functional, so nodes of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tmx_compile.lowering.base import Writer


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

    def all_to_all(self, write: Writer, x: Any, received: Sequence[Any], sent: Sequence[Any]) -> Any:
        """Send ``sent[d]`` rows of contiguous ``x`` to process d; get ``received[s]`` rows of process s, in order."""
        made = write.call(
            torch.ops._c10d_functional.all_to_all_single.default, x, list(received), list(sent), self.group
        )
        # Its wait has a side effect, for torch: what nobody reads is sent all the same.
        return write.call(torch.ops._c10d_functional.wait_tensor.default, made)

    def all_gather(self, write: Writer, x: Any) -> Any:
        """Contiguous (n, ...) of every process as (size * n, ...), in order."""
        made = write.call(torch.ops._c10d_functional.all_gather_into_tensor.default, x, self.size, self.group)
        return write.call(torch.ops._c10d_functional.wait_tensor.default, made)

    def sum(self, write: Writer, x: Any) -> Any:
        """The sum over all processes."""
        made = write.call(torch.ops._c10d_functional.all_reduce.default, x, "sum", self.group)
        return write.call(torch.ops._c10d_functional.wait_tensor.default, made)
