"""A launch that is prepared once and repeated. Importing this module needs Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from tmx_compile.lowering.triton import driver
from tmx_compile.lowering.triton.tuning import COUNTERS

TRIED_VERSION = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether this version of Triton is one that was tried with what changes between versions: Gluon, and what parameters
a compiled kernel has."""


class Kind(NamedTuple):
    """All of a tensor that a launch depends on, but its address: ``aligned`` to 16 bytes or not is another kernel."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool


def kind(x: Tensor) -> Kind:
    """That of a tensor, in a form that can be a key."""
    # As ``Kind(...)`` makes it, less a call: every launch asks for three.
    return tuple.__new__(Kind, (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0))


# What Inductor's own code calls: the memory of ``empty_strided`` without its way through the dispatcher.
_EMPTY_ON_GPU = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def empty(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """As ``like.new_empty_strided``, for a ``like`` on the current device; a ``torch.Size`` is no tuple here."""
    if _EMPTY_ON_GPU is not None and like.is_cuda:
        made: Tensor = _EMPTY_ON_GPU(shape, strides, like.dtype if dtype is None else dtype)
        return made
    return like.new_empty_strided(shape, strides, dtype=dtype)


def scratch_memory(like: Tensor, count: int) -> Tensor:
    """(count,) float32 on a tensor's device for the splits of one launch: their counters, which are 0, and parts."""
    made = empty(like, (count,), (1,), torch.float32)
    driver.clear(made, COUNTERS)
    return made


class Prepared:
    """One kernel, its grid, and every argument that is no tensor.

    Triton finds the compiled kernel by looking at every argument, which takes the host longer than a small kernel
    runs. Of what it looks at, only the addresses differ between the calls of a ``Prepared``: its tensors have to be
    of the same :class:`Kind` in each, on the current device.

    Args:
        kernel: Triton's or Gluon's.
        programs: of the one-dimensional grid.
        numbers: the arguments between the tensors and the constants.
        describe: what makes a descriptor of each of the first tensors, for a kernel that takes descriptors.
        options: the constants by name, and how to compile.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple[Any, ...],
        describe: tuple[Callable[[Tensor], Any], ...] = (),
        **options: Any,
    ) -> None:
        self._kernel, self._programs, self._numbers, self._options = kernel, programs, numbers, options
        self._describe = describe
        self._again: driver.Launch | None = None
        self._known = TRIED_VERSION

    def __call__(self, stand_in: Tensor, *tensors: Tensor | None) -> None:
        """Launch; ``stand_in`` takes the place of tensors that are not there, and that the kernel does not read."""
        if self._again is not None:
            addresses = [0 if x is None else x.data_ptr() for x in tensors]
            if self._again(addresses, driver.stream_of(stand_in.device)):
                return
        there = [stand_in if x is None else x for x in tensors]
        described = [make(x) for make, x in zip(self._describe, there, strict=False)]
        pointers = [*described, *there[len(described) :]]
        compiled = self._kernel[(self._programs,)](*pointers, *self._numbers, **self._options)
        # The interpreter compiles nothing.
        if self._again is None and self._known and isinstance(compiled, CompiledKernel):
            constants = [self._options[name] for name in self._kernel.arg_names if name in self._options]
            arguments = [*pointers, *self._numbers, *constants]
            try:
                self._again = driver.Launch(compiled, self._programs, arguments, len(pointers))
            except driver.Unknown:
                self._known = False
