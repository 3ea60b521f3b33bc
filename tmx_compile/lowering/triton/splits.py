"""The memory through which the splits of a launch meet: counters of those that arrived, and the parts they leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tmx_compile.lowering.triton import driver
from tmx_compile.lowering.triton.prepared import Allocate
from tmx_compile.lowering.triton.tuning import COUNTERS

_BYTES = 4 * COUNTERS
STREAMS = 192
"""Of one GPU that keep counters: more than PyTorch makes. Launches on others zero their own."""

# The driver's handle of a thread's own stream: the same in every thread, so that it names several streams.
_OF_A_THREAD = 2

is_capturing: Callable[[], bool] = getattr(torch._C, "_cuda_isCurrentStreamCapturing", bool)
"""Whether the current stream of the current GPU is: asked on a GPU alone."""

KEPT: dict[tuple[int, int], Tensor] = {}
PLACES: dict[int, list[int]] = {}
_lock = threading.Lock()


def split_memory(allocate: Allocate, device: int, count: int) -> tuple[Tensor, Tensor]:
    """For one launch on the current stream: (COUNTERS,) int32, zeros, and (count,) float32 of anything.

    Kernels leave zeros in the counters, and launches on one stream follow each other: so a stream keeps its counters,
    which nobody zeroes again. A CUDA graph may be replayed on any stream, and beside others: what is captured has
    counters of its own, which every replay zeroes.

    Args:
        allocate: of the current device, which is that of the launch.
        device: its number, -1 for the CPU.
        count: of elements for the parts.
    """
    if device >= 0 and not is_capturing():
        stream = driver.stream_of(device)
        counters = KEPT.get((device, stream))
        if counters is None:
            counters = _keep(device, stream)
        if counters is not None:
            return counters, allocate((count,), (1,), torch.float32)
    made = allocate((COUNTERS + count,), (1,), torch.float32)
    driver.clear(made, COUNTERS)
    return made[:COUNTERS].view(torch.int32), made[COUNTERS:]


class Memory:
    """Counters at an address, in a form that PyTorch makes a tensor of."""

    def __init__(self, address: int) -> None:
        whole = {"shape": (COUNTERS,), "typestr": "<i4", "data": (address, False), "version": 2}
        self.__cuda_array_interface__: dict[str, Any] = whole


def tensor_at(address: int, device: int) -> Tensor:
    """Counters in memory of a GPU's that is there for good."""
    return torch.as_tensor(Memory(address), device=f"cuda:{device}")


def _keep(device: int, stream: int) -> Tensor | None:
    """Counters for a stream of the current device, for as long as the process runs; None where it can have none.

    Their memory is the driver's: what PyTorch allocates may belong to the pool of a CUDA graph that is being prepared,
    or to one that is unmapped while an engine sleeps.
    """
    with _lock:
        if (device, stream) in KEPT or stream == _OF_A_THREAD:
            return KEPT.get((device, stream))
        try:
            if device not in PLACES:
                first = driver.allocate(STREAMS * _BYTES)
                PLACES[device] = [first + number * _BYTES for number in range(STREAMS)]
            places = PLACES[device]
            # On the stream that will use them: in order without waiting for anything.
            if not places or driver.library().cuMemsetD32Async(places[-1], 0, COUNTERS, stream):
                return None
        except driver.Unknown:
            return None
        made = KEPT[device, stream] = tensor_at(places.pop(), device)
        return made
