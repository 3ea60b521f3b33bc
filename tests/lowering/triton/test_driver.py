"""A launch by the CUDA driver: what the driver is given, by a driver that writes it down."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver

SCRATCH = [8, 8]


class Library:
    """Stands for libcuda: knows a kernel with parameters of these sizes in bytes."""

    def __init__(self, sizes):
        self.sizes, self.launches, self.maps, self.moved, self.modes, self.fails = sizes, [], [], [], [], 0
        # How a map holds its address: where, what is added to it, and whether the driver moves it at all.
        self.address_at, self.added, self.refuses = 8, 0, 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0

    def cuTensorMapEncodeTiled(self, place, element, rank, address, sizes, jumps, box, ones, *rest):
        self.maps.append((place, element, address, list(sizes), list(jumps)[: rank - 1], list(box), list(ones), rest))
        ctypes.memset(place, 7, 128)
        ctypes.c_uint64.from_address(place + self.address_at).value = address + self.added
        return 0

    def cuTensorMapReplaceAddress(self, place, address):
        self.moved.append((place, address))
        ctypes.c_uint64.from_address(place + self.address_at).value = address + self.added
        return self.refuses

    def cuLaunchKernelEx(self, configuration, function, parameters, extra):
        assert extra is None
        assert [type(x) for x in (configuration, function)] == [ctypes.c_void_p] * 2
        *shape, stream, attributes, count = struct.unpack("7I4xQQI", ctypes.string_at(configuration.value, 52))
        assert (attributes, count) == (0, 0)
        values = [ctypes.string_at(at, size) for at, size in zip(parameters, self.sizes, strict=True)]
        self.launches.append(([function.value, *shape, stream], values))
        return self.fails

    def cuThreadExchangeStreamCaptureMode(self, mode):
        self.modes.append(mode._obj.value)
        mode._obj.value = 0

    def cuMemAlloc_v2(self, address, size):
        address._obj.value = 4096
        return self.fails


def compiled(types, **other):
    metadata = {
        "num_warps": 4,
        "num_ctas": 1,
        "shared": 4096,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
    }
    signature = {str(index): name for index, name in enumerate(types)}
    return SimpleNamespace(
        metadata=SimpleNamespace(**metadata | other), src=SimpleNamespace(signature=signature), function=99
    )


def using(monkeypatch, sizes):
    library = Library(sizes)
    monkeypatch.setattr(driver, "library", lambda: library)
    return library


TYPES = ["*bf16", "*fp32", "i32", "i64", "constexpr", "fp32", "constexpr"]


def test_parameters_are_laid_out_as_triton_does_and_only_addresses_change(monkeypatch):
    library = using(monkeypatch, [8, 8, 4, 8, 4, *SCRATCH])
    launch = driver.Launch(compiled(TYPES), 5, [None, None, -3, 1 << 40, 1, 0.25, True], 2)
    high = (1 << 47) + 16
    assert launch([high, 0], 7)
    assert launch([32, high], 8)
    rest = [ctypes.c_int32(-3), ctypes.c_int64(1 << 40), ctypes.c_float(0.25), ctypes.c_uint64(0), ctypes.c_uint64(0)]
    shape = [99, 5, 1, 1, 128, 1, 1, 4096]
    assert library.launches == [
        ([*shape, 7], [bytes(x) for x in (ctypes.c_uint64(high), ctypes.c_uint64(0), *rest)]),
        ([*shape, 8], [bytes(x) for x in (ctypes.c_uint64(32), ctypes.c_uint64(high), *rest)]),
    ]
    library.fails = 201
    assert not launch([high, 0], 7)


@pytest.mark.parametrize(
    ("trait", "value", "by_driver"),
    [("added", 0, False), ("address_at", 96, False), ("added", 1, True), ("refuses", 1, True)],
)
def test_a_described_tensor_is_a_map_that_moves(trait, value, by_driver, monkeypatch):
    """Without the driver where the driver showed that it changes the address alone."""
    sizes = [128, 4, 4, 8, 8, 8, *SCRATCH]
    library = using(monkeypatch, sizes)
    setattr(library, trait, value)
    base = torch.zeros(6, 40, dtype=torch.bfloat16)
    descriptor = SimpleNamespace(base=base, shape=[6, 32], strides=[40, 1], padding="zero")
    meta = [{"swizzle": 3, "block_size": [2, 16], "fp4_padded": False}]
    launch = driver.Launch(compiled(["tensordesc<bf16>", "*bf16"], tensordesc_meta=meta), 1, [descriptor, base], 2)
    (place, *made), *more = library.maps
    assert more == []
    assert place % 64 == 0
    # bfloat16; sizes, bytes between rows, box and steps, the innermost first; 128-byte swizzle and promotion.
    assert made == [9, base.data_ptr(), [32, 6], [80], [16, 2], [1, 1], (0, 3, 2, 0)]
    before, library.moved = ctypes.string_at(place, 128), []
    assert before[library.address_at :][:8] == bytes(ctypes.c_uint64(base.data_ptr() + library.added))
    assert launch([640, 1280], 7)
    assert library.moved == ([(place, 640)] if by_driver else [])
    _, values = library.launches[0]
    at, moved = library.address_at, bytes(ctypes.c_uint64(640 + library.added))
    assert values[0] == before[:at] + moved + before[at + 8 :]
    numbers = [ctypes.c_int32(6), ctypes.c_int32(32), ctypes.c_int64(40), ctypes.c_int64(1), ctypes.c_uint64(1280)]
    assert values[1:6] == [bytes(x) for x in numbers]


def values():
    return [None, None, -3, 1 << 40, 1, 0.25, True]


@pytest.mark.parametrize(
    "other",
    [
        {"num_ctas": 2},
        {"launch_pdl": True},
        {"launch_cooperative_grid": True},
        {"global_scratch_size": 16},
        {"profile_scratch_size": 16},
    ],
    ids=str,
)
def test_a_launch_of_another_kind_is_unknown(other, monkeypatch):
    using(monkeypatch, [8, 8, 4, 8, 4, *SCRATCH])
    driver.Launch(compiled(TYPES), 5, values(), 2)
    with pytest.raises(driver.Unknown):
        driver.Launch(compiled(TYPES, **other), 5, values(), 2)


@pytest.mark.parametrize("sizes", [[8, 8, 4, 8, 4], [8, 8, 8, 4, 4, *SCRATCH], [8, 8, 4, 8, 4, 4, *SCRATCH]], ids=str)
def test_other_parameters_than_the_machine_code_has_are_unknown(sizes, monkeypatch):
    using(monkeypatch, sizes)
    with pytest.raises(driver.Unknown, match="parameters of"):
        driver.Launch(compiled(TYPES), 5, values(), 2)


def test_other_types_and_a_missing_field_are_unknown(monkeypatch):
    using(monkeypatch, [8, 8, 4, 8, 4, *SCRATCH])
    with pytest.raises(driver.Unknown, match="fp64"):
        driver.Launch(compiled([*TYPES[:5], "fp64", "constexpr"]), 5, values(), 2)
    with pytest.raises(driver.Unknown, match="tensor of type"):
        driver.Launch(compiled(["tensordesc<bf16>", *TYPES[1:]]), 5, values(), 2)
    without = compiled(TYPES)
    del without.metadata.launch_pdl
    with pytest.raises(driver.Unknown, match="launch_pdl"):
        driver.Launch(without, 5, values(), 2)


def test_memory_of_the_driver_while_another_thread_captures(monkeypatch):
    library = using(monkeypatch, [])
    assert driver.allocate(64) == 4096
    # Relaxed, and as it was.
    assert library.modes == [2, 0]
    library.fails = 2
    with pytest.raises(driver.Unknown, match="no 64 bytes: error 2"):
        driver.allocate(64)
    assert library.modes == [2, 0, 2, 0]


def test_a_machine_without_the_driver_is_unknown(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(driver.Unknown, match="libcuda"):
        driver.library.__wrapped__()
