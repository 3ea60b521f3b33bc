"""A launch by the CUDA driver: what the driver is given, by a driver that writes it down."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver

SCRATCH = [8, 8]


class Library:
    """Stands for libcuda: knows a kernel with parameters of these sizes in bytes."""

    def __init__(self, sizes):
        self.sizes, self.launches, self.maps, self.moved, self.fails = sizes, [], [], [], 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        if index >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index]
        return 0

    def cuTensorMapEncodeTiled(self, place, element, rank, address, sizes, jumps, box, ones, *rest):
        self.maps.append((place, element, address, list(sizes), list(jumps)[: rank - 1], list(box), list(ones), rest))
        return 0

    def cuTensorMapReplaceAddress(self, place, address):
        self.moved.append((place, address))

    def cuLaunchKernel(self, *arguments):
        *typed, parameters, extra = arguments
        assert extra is None
        shape = [x.value for x in typed]
        assert [type(x) for x in typed] == [ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p]
        values = [ctypes.string_at(at, size) for at, size in zip(parameters, self.sizes, strict=True)]
        self.launches.append((shape, values))
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


def test_a_described_tensor_is_a_map_that_moves(monkeypatch):
    sizes = [128, 4, 4, 8, 8, 8, *SCRATCH]
    library = using(monkeypatch, sizes)
    base = torch.zeros(6, 40, dtype=torch.bfloat16)
    descriptor = SimpleNamespace(base=base, shape=[6, 32], strides=[40, 1], padding="zero")
    meta = [{"swizzle": 3, "block_size": [2, 16], "fp4_padded": False}]
    launch = driver.Launch(compiled(["tensordesc<bf16>", "*bf16"], tensordesc_meta=meta), 1, [descriptor, base], 2)
    (place, *made), *more = library.maps
    assert more == []
    assert place % 64 == 0
    # bfloat16; sizes, bytes between rows, box and steps, the innermost first; 128-byte swizzle and promotion.
    assert made == [9, base.data_ptr(), [32, 6], [80], [16, 2], [1, 1], (0, 3, 2, 0)]
    assert launch([640, 1280], 7)
    assert library.moved == [(place, 640)]
    _, values = library.launches[0]
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


def test_a_machine_without_the_driver_is_unknown(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(driver.Unknown, match="libcuda"):
        driver.library.__wrapped__()
