"""A kernel that Triton compiled, launched by the CUDA driver itself. Importing this module needs Triton.

Triton's own launch reads every argument and calls its hooks, which takes the host longer than a small kernel runs.
Where the same kernel is launched again, only addresses differ: they are written into parameters that are laid out
once, and the driver gets those. How Triton lays them out is told by the driver, and so checked beforehand.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
# CUtensorMapDataType. A map has 128 bytes and lies at a multiple of 64.
_ELEMENTS = {torch.float16: 6, torch.bfloat16: 9}
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_PROMOTION_128_BYTES = 2
# A map's address is looked for by moving the map to these: all bits that an address of a GPU's memory has.
_PROBES = (0x5555_5555_5550, 0x2AAA_AAAA_AAA0, 0x7FFF_FFFF_FFF0)
# CUlaunchConfig: seven sizes, padding, then the stream, its attributes and how many they are.
_STREAM_AT, _ADDRESSES_AT = 32, 56
_RELAXED = 2


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
        # Gets typed values alone.
        "cuLaunchKernelEx": None,
        "cuMemsetD32Async": [word, count, size, word],
        "cuFuncGetParamInfo": [word, size, pointer(size), pointer(size)],
        "cuTensorMapEncodeTiled": [word, ctypes.c_int, count, word, *[word] * 4, *[ctypes.c_int] * 4],
        "cuTensorMapReplaceAddress": [word, word],
        "cuMemAlloc_v2": [word, size],
        "cuThreadExchangeStreamCaptureMode": [word],
    }
    try:
        loaded = ctypes.CDLL("libcuda.so.1")
        for name, arguments in signatures.items():
            getattr(loaded, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise Unknown(str(error)) from error
    return loaded


def clear(x: Tensor, count: int) -> None:
    """Zero the first ``count`` elements, of 4 bytes, of a contiguous tensor on the current stream of its device."""
    if x.is_cuda:
        try:
            if not library().cuMemsetD32Async(x.data_ptr(), 0, count, stream_of(x.get_device())):
                return
        except Unknown:
            pass
    x[:count].zero_()


def allocate(size: int) -> int:
    """The address of memory of the current device's that is never given back: of no pool of PyTorch's.

    Raises:
        Unknown: there is no driver, or it has none.
    """
    address, mode = ctypes.c_uint64(), ctypes.c_int(_RELAXED)
    driver = library()
    # While another thread captures a CUDA graph no memory may be had otherwise.
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        failed = driver.cuMemAlloc_v2(ctypes.byref(address), size)
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    if failed:
        raise Unknown(f"no {size} bytes: error {failed}")
    return address.value


stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0)
"""The driver's handle of the current stream of a GPU, by its number."""


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
        # The configuration, and behind it the addresses that pointers have.
        self._memory = ctypes.create_string_buffer(_ADDRESSES_AT + 8 * count)
        struct.pack_into("7I", self._memory, 0, programs, 1, 1, threads, 1, 1, shared)
        self._pack = functools.partial(struct.Struct(f"Q16x{count}Q").pack_into, self._memory, _STREAM_AT)
        # What the parameters point to: (address, bytes) of each, and what keeps it alive.
        self._kept: list[Any] = []
        self._fields: list[tuple[int, int]] = []
        self._moves: list[tuple[int, Callable[[int], Any]]] = []
        for index, (value, kind) in enumerate(zip(arguments, types, strict=True)):
            if kind == "constexpr":
                continue
            if index >= count:
                if kind not in _NUMBERS:
                    raise Unknown(f"a parameter of type {kind}")
                self._keep(_NUMBERS[kind](value))
            elif kind.startswith("*"):
                self._fields.append((ctypes.addressof(self._memory) + _ADDRESSES_AT + 8 * index, 8))
            elif described:
                self._describe(index, value, described.pop(0))
            else:
                raise Unknown(f"a tensor of type {kind}")
        # Memory that Triton would allocate for the kernel and for a profiler: none.
        self._keep(ctypes.c_void_p())
        self._keep(ctypes.c_void_p())
        self._check(function)
        self._parameters = (ctypes.c_void_p * len(self._fields))(*[address for address, _ in self._fields])
        # Typed values, which is quicker than having them checked.
        given = ctypes.c_void_p(ctypes.addressof(self._memory)), ctypes.c_void_p(function), self._parameters, None
        self._launch = functools.partial(self._library.cuLaunchKernelEx, *given)
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
        self._moves.append((index, self._move(place, descriptor.base.data_ptr())))
        for size in shape:
            self._keep(ctypes.c_int32(size))
        for stride in strides:
            self._keep(ctypes.c_int64(stride))

    def _move(self, place: int, address: int) -> Callable[[int], Any]:
        """What gives a map, which is for ``address``, another one.

        The driver does, in a call of its own each time. Where a map holds the address as it is, and nothing else
        depends on it, writing that is quicker: the driver itself shows whether it is so.
        """
        by_driver: Callable[[int], Any] = functools.partial(self._library.cuTensorMapReplaceAddress, place)
        words = memoryview((ctypes.c_uint64 * (_MAP_BYTES // 8)).from_address(place)).cast("B").cast("Q")
        found = list(words)
        if found.count(address) != 1:
            return by_driver
        at = found.index(address)
        plain = True
        for other in (*_PROBES, address):
            plain = plain and not by_driver(other) and list(words) == [*found[:at], other, *found[at + 1 :]]
        if not plain:
            by_driver(address)
            return by_driver
        return functools.partial(words.__setitem__, at)

    def _check(self, function: int) -> None:
        """Compare with the sizes of the parameters that the driver found in the machine code."""
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        sizes: list[int] = []
        while not self._library.cuFuncGetParamInfo(function, len(sizes), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
        if sizes != [size for _, size in self._fields]:
            raise Unknown(f"parameters of {sizes} bytes")

    def __call__(self, addresses: Sequence[int], stream: int) -> bool:
        """Launch with the addresses of the tensors, on a stream of the current device; whether the driver did."""
        with self._lock:
            self._pack(stream, *addresses)
            for index, move in self._moves:
                move(addresses[index])
            return not self._launch()
