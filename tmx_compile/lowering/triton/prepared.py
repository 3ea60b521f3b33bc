"""A launch that is prepared once and repeated. Importing this module needs Triton."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

TRIED_VERSION = triton.__version__.startswith(("3.6.", "3.7."))
"""Whether this version of Triton is one that was tried with what changes between versions: Gluon, and how a compiled
kernel is called."""


class Kind(NamedTuple):
    """All of a tensor that a launch depends on, but its address: ``aligned`` to 16 bytes or not is another kernel."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aligned: bool


def kind(x: Tensor) -> Kind:
    """That of a tensor, in a form that can be a key."""
    return Kind(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)


class Prepared:
    """One kernel, its grid, and every argument that is no pointer.

    Triton finds the compiled kernel by looking at every argument, which takes the host longer than a small kernel
    runs. Of what it looks at, only the pointers differ between the calls of a ``Prepared``, and those have to be of
    the same :class:`Kind` in each, on the current device.
    """

    def __init__(self, kernel: Any, programs: int, numbers: tuple[Any, ...], **options: Any) -> None:
        self._kernel, self._programs, self._numbers, self._options = kernel, programs, numbers, options
        self._compiled: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *pointers: Any) -> None:
        """Launch with the leading arguments: tensors, or descriptors of tensors."""
        if self._compiled is not None:
            # As numbers: Triton would ask the driver about each tensor again.
            addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in pointers]
            self._compiled(*addresses, *self._rest)
            return
        compiled = self._kernel[(self._programs,)](*pointers, *self._numbers, **self._options)
        # The interpreter compiles nothing.
        if TRIED_VERSION and isinstance(compiled, CompiledKernel):
            # A compiled kernel takes its constants too, in their place.
            constants = [self._options[name] for name in self._kernel.arg_names if name in self._options]
            self._rest = (*self._numbers, *constants)
            assert len(pointers) + len(self._rest) == len(self._kernel.arg_names)
            self._compiled = compiled[(self._programs, 1, 1)]
