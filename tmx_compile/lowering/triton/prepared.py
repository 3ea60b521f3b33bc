"""A launch that is prepared once and repeated. Importing this module needs Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from tmx_compile.lowering.triton import driver

TRIED_VERSION = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether this version of Triton is one that was tried with what changes between versions: Gluon, and what parameters
a compiled kernel has."""

MOST_KINDS = 4096
"""Kinds of calls that are remembered. One prompt makes one call a layer, with its own length."""


class Kind(NamedTuple):
    """All of a tensor that a launch depends on, but its address: ``aligned`` to 16 bytes or not is another kernel."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool


def kind(x: Tensor) -> Kind:
    """That of a tensor."""
    return Kind(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


def as_key(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What differs where a kind does, in a form that is found and compared sooner."""
    return tuple([
        None if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16 == 0) for x in tensors
    ])  # fmt: skip


_Value = TypeVar("_Value")


def remember(known: dict[Any, _Value], key: Any, value: _Value) -> _Value:
    """Put a value where it will be found by its key; where there are too many, the others are forgotten."""
    if len(known) >= MOST_KINDS:
        known.clear()
    known[key] = value
    return value


Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]
"""Empty memory of a shape, strides and a dtype; a ``torch.Size`` is no shape here."""

# What Inductor's own code calls: ``empty_strided`` without its way through the dispatcher, on the current device.
_ON_GPU: Allocate | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def allocator(device: torch.device) -> Allocate:
    """What allocates on a device, which has to be the current one."""
    if _ON_GPU is not None and device.type == "cuda":
        return _ON_GPU
    return functools.partial(_allocate, device)


def _allocate(device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def number_of(device: torch.device) -> int:
    """As ``Tensor.get_device`` has it: -1 for the CPU."""
    return -1 if device.index is None else device.index


class Prepared:
    """One kernel, its grid, and every argument that is no tensor.

    Triton finds the compiled kernel by looking at every argument, which takes the host longer than a small kernel
    runs. Of what it looks at, only the addresses differ between the calls of a ``Prepared``: its tensors have to be
    of the same :class:`Kind` in each, on the current device.

    Args:
        kernel: Triton's or Gluon's.
        device: of the tensors.
        programs: of the one-dimensional grid.
        numbers: the arguments between the tensors and the constants.
        describe: what makes a descriptor of each of the first tensors, for a kernel that takes descriptors.
        options: the constants by name, and how to compile.
    """

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        programs: int,
        numbers: tuple[Any, ...],
        describe: tuple[Callable[[Tensor], Any], ...] = (),
        **options: Any,
    ) -> None:
        self._kernel, self._programs, self._numbers, self._options = kernel, programs, numbers, options
        self._describe, self._device = describe, number_of(device)
        self._known = TRIED_VERSION
        self.again: driver.Launch | None = None
        """The launch past Triton; None before the first, and where there is none."""

    def __call__(self, stand_in: Tensor, *tensors: Tensor | None) -> None:
        """Launch; ``stand_in`` takes the place of tensors that are not there, and that the kernel does not read."""
        if self.again is not None:
            addresses = [0 if x is None else x.data_ptr() for x in tensors]
            if self.again(addresses, driver.stream_of(self._device)):
                return
        self.by_triton(stand_in, *tensors)

    def by_triton(self, stand_in: Tensor, *tensors: Tensor | None) -> None:
        """The first launch, and every one that the driver does not do."""
        there = [stand_in if x is None else x for x in tensors]
        described = [make(x) for make, x in zip(self._describe, there, strict=False)]
        pointers = [*described, *there[len(described) :]]
        compiled = self._kernel[(self._programs,)](*pointers, *self._numbers, **self._options)
        # The interpreter compiles nothing.
        if self.again is None and self._known and isinstance(compiled, CompiledKernel):
            constants = [self._options[name] for name in self._kernel.arg_names if name in self._options]
            arguments = [*pointers, *self._numbers, *constants]
            try:
                self.again = driver.Launch(compiled, self._programs, arguments, len(pointers))
            except driver.Unknown:
                self._known = False
