"""A kernel that Triton compiled, launched by the CUDA driver itself. Importing this module needs Triton.

Triton's own launch reads every argument and calls its hooks, which takes the host longer than a small kernel runs.
Where the same kernel is launched again, only addresses differ: they are written into parameters that are laid out
once, and the driver gets those. How Triton lays them out is told by the driver, and so checked beforehand.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
# CUtensorMapDataType. A map has 128 bytes and lies at a multiple of 64.
_ELEMENTS = {torch.float16: 6, torch.bfloat16: 9}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_PROMOTION_128_BYTES = 2


class Unknown(Exception):
    """The kernel is none that is known how to launch from here."""


@functools.cache
def library() -> ctypes.CDLL:
    """The CUDA driver's functions, of those in its reference manual.

    Raises:
        Unknown: it is not there, or too old.
    """
    word, count, pointer = ctypes.c_void_p, ctypes.c_uint, ctypes.POINTER
    size = ctypes.c_size_t
    signatures: dict[str, list[Any] | None] = {
        # Gets typed values, which is quicker than having them checked.
        "cuLaunchKernel": None,
        "cuMemsetD32Async": [word, count, size, word],
        "cuFuncGetParamInfo": [word, size, pointer(size), pointer(size)],
        "cuTensorMapEncodeTiled": [word, ctypes.c_int, count, word, *[word] * 4, *[ctypes.c_int] * 4],
        "cuTensorMapReplaceAddress": [word, word],
    }
    try:
        loaded = ctypes.CDLL("libcuda.so.1")
        for name, arguments in signatures.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise Unknown(str(error)) from error
    return loaded


def clear(x: Tensor, count: int) -> None:
    """Zero the first ``count`` elements of a contiguous float32 tensor, on its stream."""
    if x.is_cuda:
        try:
            if not library().cuMemsetD32Async(x.data_ptr(), 0, count, stream_of(x.device)):
                return
        except Unknown:
            pass
    x[:count].zero_()


def stream_of(device: torch.device) -> int:
    """The driver's handle of the current stream."""
    handle: int = torch._C._cuda_getCurrentRawStream(device.index)
    return handle


class Launch:
    """One kernel in one grid, with other addresses at every call.

    Args:
        compiled: what Triton compiled: a ``CompiledKernel`` that ran.
        programs: of the one-dimensional grid.
        arguments: a value for every parameter of the kernel, in order; a tensor descriptor for a described tensor.
        count: how many of them are tensors; those come first.

    Raises:
        Unknown: the driver or the kernel is another than expected.
    """

    def __init__(self, compiled: Any, programs: int, arguments: Sequence[Any], count: int) -> None:
        self._library = library()
        try:
            metadata, types = compiled.metadata, list(compiled.src.signature.values())
            scratch = metadata.global_scratch_size + metadata.profile_scratch_size
            plain = metadata.num_ctas == 1 and not metadata.launch_cooperative_grid and not metadata.launch_pdl
            described = list(getattr(metadata, "tensordesc_meta", None) or [])
            threads, shared, function = 32 * metadata.num_warps, metadata.shared, compiled.function
        except AttributeError as error:
            raise Unknown(str(error)) from error
        if scratch or not plain or len(types) != len(arguments) or not isinstance(function, int):
            raise Unknown("a launch with attributes or memory of Triton's own")
        self._addresses = (ctypes.c_uint64 * count)()
        # What the parameters point to: (address, bytes) of each, and what keeps it alive.
        self._kept: list[Any] = []
        self._fields: list[tuple[int, int]] = []
        self._maps: list[tuple[int, int]] = []
        for index, (value, kind) in enumerate(zip(arguments, types, strict=True)):
            if kind == "constexpr":
                continue
            if index >= count:
                if kind not in _NUMBERS:
                    raise Unknown(f"a parameter of type {kind}")
                self._keep(_NUMBERS[kind](value))
            elif kind.startswith("*"):
                self._fields.append((ctypes.addressof(self._addresses) + 8 * index, 8))
            elif described:
                self._describe(index, value, described.pop(0))
            else:
                raise Unknown(f"a tensor of type {kind}")
        # Memory that Triton would allocate for the kernel and for a profiler: none.
        self._keep(ctypes.c_void_p())
        self._keep(ctypes.c_void_p())
        self._check(function)
        self._parameters = (ctypes.c_void_p * len(self._fields))(*[address for address, _ in self._fields])
        blocks = (ctypes.c_uint(x) for x in (programs, 1, 1, threads, 1, 1, shared))
        self._launch = functools.partial(self._library.cuLaunchKernel, ctypes.c_void_p(function), *blocks)
        self._lock = threading.Lock()

    def _keep(self, value: Any) -> None:
        self._kept.append(value)
        self._fields.append((ctypes.addressof(value), ctypes.sizeof(value)))

    def _describe(self, index: int, descriptor: Any, meta: dict[str, Any]) -> None:
        """A descriptor's map, its shape and its strides, as Triton passes them."""
        shape, strides, dtype = list(descriptor.shape), list(descriptor.strides), descriptor.base.dtype
        if dtype not in _ELEMENTS or meta["fp4_padded"] or descriptor.padding != "zero":
            raise Unknown(f"a descriptor of {dtype}, padded by {descriptor.padding}")
        rank = len(shape)
        memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        self._kept.append(memory)
        place = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        # The driver's order of dimensions is the reverse.
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))
        jumps = (ctypes.c_uint64 * rank)(*[x * dtype.itemsize for x in reversed(strides[:-1])])
        box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
        ones = (ctypes.c_uint32 * rank)(*[1] * rank)
        failed = self._library.cuTensorMapEncodeTiled(
            place, _ELEMENTS[dtype], rank, descriptor.base.data_ptr(), sizes, jumps, box, ones,
            0, meta["swizzle"], _PROMOTION_128_BYTES, 0,
        )  # fmt: skip
        if failed:
            raise Unknown(f"a descriptor that the driver refuses: error {failed}")
        self._fields.append((place, _MAP_BYTES))
        self._maps.append((index, place))
        for size in shape:
            self._keep(ctypes.c_int32(size))
        for stride in strides:
            self._keep(ctypes.c_int64(stride))

    def _check(self, function: int) -> None:
        """Compare with the sizes of the parameters that the driver found in the machine code."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        sizes: list[int] = []
        while not self._library.cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
        if sizes != [size for _, size in self._fields]:
            raise Unknown(f"parameters of {sizes} bytes")

    def __call__(self, addresses: list[int], stream: int) -> bool:
        """Launch with the addresses of the tensors, on a stream of the current device; whether the driver did."""
        with self._lock:
            self._addresses[:] = addresses  # type: ignore[assignment]
            for index, place in self._maps:
                self._library.cuTensorMapReplaceAddress(place, addresses[index])
            failed = self._launch(ctypes.c_void_p(stream), self._parameters, None)
        return not failed
