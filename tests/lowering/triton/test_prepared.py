"""A launch that is repeated: what reaches the kernel the first time, and past Triton afterwards."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver, prepared
from tmx_compile.lowering.triton.launch import prepare
from tmx_compile.lowering.triton.prepared import Prepared, kind, scratch_memory
from tmx_compile.lowering.triton.tuning import COUNTERS
from tmx_compile.mask.geometry import Geometry


class Compiled(prepared.CompiledKernel):
    """Stands for what Triton compiled for one kind of call."""

    def __init__(self):
        pass


class Kernel:
    """Stands for a kernel with two pointers, two numbers and two constants."""

    arg_names = ("first_ptr", "second_ptr", "count", "scale", "WIDE", "BLOCK")

    def __init__(self):
        self.compiled, self.calls = Compiled(), []

    def __getitem__(self, grid):
        def run(*args, num_warps, **constants):
            assert set(constants) == {"WIDE", "BLOCK"}
            self.calls.append((grid, args, num_warps))
            return self.compiled

        return run


class Repeated:
    """Stands for the driver's launch."""

    works = True

    def __init__(self, compiled, programs, arguments, count):
        self.made, self.calls = (compiled, programs, arguments, count), []

    def __call__(self, addresses, stream):
        self.calls.append((addresses, stream))
        return self.works


@pytest.fixture
def repeated(monkeypatch):
    monkeypatch.setattr(prepared, "TRIED_VERSION", True)
    monkeypatch.setattr(driver, "Launch", Repeated)
    monkeypatch.setattr(driver, "stream_of", lambda device: 77)


def launch_of(kernel, **describe):
    return Prepared(kernel, 7, (3, 0.5), **describe, BLOCK=64, num_warps=4, WIDE=False)


def test_the_first_launch_goes_through_triton_and_the_others_past_it(repeated):
    kernel = Kernel()
    launch = launch_of(kernel)
    x, y = torch.randn(8), torch.randn(8)
    launch(x, x, y)
    assert kernel.calls == [((7,), (x, y, 3, 0.5), 4)]
    assert launch._again.made == (kernel.compiled, 7, [x, y, 3, 0.5, False, 64], 2)
    launch(x, y, x)
    launch(x, None, y)
    assert len(kernel.calls) == 1
    assert launch._again.calls == [([y.data_ptr(), x.data_ptr()], 77), ([0, y.data_ptr()], 77)]


def test_another_tensor_stands_in_where_triton_asks_for_one(repeated):
    kernel = Kernel()
    x, y = torch.randn(8), torch.randn(8)
    launch_of(kernel, describe=(lambda tensor: ("described", tensor),))(x, y, None)
    assert kernel.calls == [((7,), (("described", y), x, 3, 0.5), 4)]


def test_what_the_driver_does_not_do_triton_does(repeated, monkeypatch):
    kernel = Kernel()
    launch = launch_of(kernel)
    x = torch.randn(8)
    launch(x, x, x)
    monkeypatch.setattr(Repeated, "works", False)
    launch(x, x, x)
    assert len(launch._again.calls) == 1
    assert len(kernel.calls) == 2


def _unknown(*_):
    raise driver.Unknown


@pytest.mark.parametrize(
    ("where", "name", "other"),
    [(driver, "Launch", _unknown), (prepared, "TRIED_VERSION", False)],
    ids=["a kernel that is not known", "an untried version"],
)
def test_always_launched_by_triton(where, name, other, repeated, monkeypatch):
    monkeypatch.setattr(where, name, other)
    kernel, x = Kernel(), torch.randn(8)
    launch = launch_of(kernel)
    for _ in range(3):
        launch(x, x, x)
    assert len(kernel.calls) == 3
    assert launch._again is None


def test_scratch_memory_begins_with_zeros():
    made = scratch_memory(torch.full((4,), 3.0, dtype=torch.bfloat16), COUNTERS + 5)
    assert made.shape == (COUNTERS + 5,)
    assert made.dtype == torch.float32
    assert made[:COUNTERS].view(torch.int32).abs().sum() == 0


def test_what_differs_for_the_kernel_is_another_kind():
    x = torch.randn(2, 4, 32, 16)
    moved = torch.randn(2 * 4 * 32 * 16 + 1)[1:].view(2, 4, 32, 16)
    others = [moved, x[:1], x.transpose(1, 2), x.half(), x.to("meta")]
    assert kind(x) == kind(torch.randn(2, 4, 32, 16))
    assert kind(x).stride == x.stride()
    assert kind(x).aligned
    assert all(kind(other) != kind(x) for other in others)


def test_calls_of_one_kind_are_prepared_once():
    x = kind(torch.randn(1, 2, 32, 16))
    geometry = Geometry(4, 8, 6)
    first = prepare(x, x, x, None, None, geometry, 0.25, False, None)
    assert prepare(x, x, x, None, None, Geometry(4, 8, 6), 0.25, False, None) is first
    for other in (
        prepare(x, x, x, None, None, Geometry(4, 8, 7), 0.25, False, None),
        prepare(x, x, x, None, None, geometry, 0.5, False, None),
        prepare(x, x, x, None, None, geometry, 0.25, True, None),
        prepare(x, x, kind(torch.randn(1, 2, 32, 8)), None, None, geometry, 0.25, False, None),
    ):
        assert other is not first
