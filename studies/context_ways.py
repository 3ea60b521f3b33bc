"""Ways to write and run the collectives of a split prompt, beside which the one that is shipped was chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tmx_compile.lowering.context_parallel import ContextParallel, heads

_EARLY = "reorder_communication_preserving_peak_memory"
_PASSES = dict(
    reorder_for_compute_comm_overlap=True,
    reorder_for_compute_comm_overlap_passes=[_EARLY, "sink_waits_iterative", _EARLY],
)


@dataclass(frozen=True)
class Way:
    """One of them.

    Attributes:
        groups: in which a dense layer's heads travel, at most.
        late: Inductor keeps the order of the graph; else it waits for each collective at once.
        passes: torch's own passes order them.
        high: NCCL's stream has a high priority.
        blocks: that a kernel of NCCL's takes at most; 0: as many as it likes.
    """

    groups: int = heads.MOST_GROUPS
    late: bool = True
    passes: bool = False
    high: bool = False
    blocks: int = 0

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """What is compiled inside is so."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(heads, "MOST_GROUPS", self.groups))
            if not self.late:
                stack.enter_context(mock.patch.object(ContextParallel, "inductor_options", return_value={}))
            if self.passes:
                stack.enter_context(torch._inductor.config.patch(_PASSES))
            yield

    def options(self, kind: str) -> Any:
        """Of the process group; None for those that are usual."""
        if kind == "cpu" or not (self.high or self.blocks):
            return None
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=self.high)
        if self.blocks:
            options.config.max_ctas = self.blocks
        return options


WAYS = {
    "context": Way(),
    "context, in turn": Way(groups=1, late=False),
    "context, high priority, 4 blocks": Way(high=True, blocks=4),
    "context, 4 blocks": Way(blocks=4),
    "context, high priority": Way(high=True),
    "context, 2 groups, high priority, 4 blocks": Way(groups=2, high=True, blocks=4),
    "context, 1 group": Way(groups=1),
    "context, torch's order": Way(late=False, passes=True),
}
