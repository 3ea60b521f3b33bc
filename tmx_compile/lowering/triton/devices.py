"""What a launch has to know of a GPU, asked once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; a few on a CPU, where the kernels are interpreted."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
