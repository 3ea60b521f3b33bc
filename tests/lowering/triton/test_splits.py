"""The memory of a launch's splits: who gets which counters, by a driver that writes down what it is asked."""

import ctypes

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver, splits
from tmx_compile.lowering.triton.prepared import allocator
from tmx_compile.lowering.triton.splits import split_memory
from tmx_compile.lowering.triton.tuning import COUNTERS

FIRST = 1 << 20


class Machine:
    """GPUs whose current stream is ``stream``; stands for the driver, too."""

    def __init__(self):
        self.stream, self.capturing, self.fails, self.cleared, self.allocated = 0, False, 0, [], []

    def cuMemsetD32Async(self, address, value, count, stream):
        self.cleared.append((address, value, count, stream))
        return self.fails

    def cuThreadExchangeStreamCaptureMode(self, mode):
        pass

    def cuMemAlloc_v2(self, address, size):
        self.allocated.append(size)
        address._obj.value = FIRST * len(self.allocated)
        return 0


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(driver, "library", lambda: machine)
    monkeypatch.setattr(driver, "stream_of", lambda device: machine.stream)
    monkeypatch.setattr(splits, "is_capturing", lambda: machine.capturing)
    monkeypatch.setattr(splits, "tensor_at", lambda address, device: torch.full((COUNTERS,), address))
    monkeypatch.setattr(splits, "KEPT", {})
    monkeypatch.setattr(splits, "PLACES", {})
    return machine


def on(machine, stream, device=0):
    """What stands in the counters of a launch: an address that is kept, or zeros of its own."""
    machine.stream = stream
    counters, parts = split_memory(allocate, device, 6)
    assert (parts.shape, parts.dtype, counters.shape) == ((6,), torch.float32, (COUNTERS,))
    return int(counters.unique())


def allocate(shape, strides, dtype):
    return torch.full(shape, 7, dtype=dtype)


def test_the_interpreter_has_zeros_and_memory():
    counters, parts = split_memory(allocator(torch.device("cpu")), -1, 5)
    assert not counters.any()
    assert counters.dtype == torch.int32
    parts.fill_(1)
    assert not counters.any()


def test_a_stream_keeps_counters_that_are_zeroed_once_on_it(machine):
    found = [on(machine, stream) for stream in (0, 7, 0, 9, 7, 0)]
    last = FIRST + 4 * COUNTERS * (splits.STREAMS - 1)
    at = {stream: last - index * 4 * COUNTERS for index, stream in enumerate((0, 7, 9))}
    assert found == [at[stream] for stream in (0, 7, 0, 9, 7, 0)]
    assert machine.cleared == [(address, 0, COUNTERS, stream) for stream, address in at.items()]
    assert machine.allocated == [4 * COUNTERS * splits.STREAMS]


def test_a_stream_of_another_gpu_has_others(machine):
    assert on(machine, 0, device=0) < 2 * FIRST <= on(machine, 0, device=1)


def test_what_is_captured_zeroes_counters_of_its_own(machine):
    kept = on(machine, 7)
    machine.capturing = True
    assert on(machine, 7) == on(machine, 8) == 0
    machine.capturing = False
    assert on(machine, 7) == kept
    assert len(machine.cleared) == 1


def test_a_handle_that_names_a_stream_of_every_thread_keeps_none(machine):
    assert on(machine, 2) == 0
    assert machine.allocated == []


def test_more_streams_than_there_is_memory_for(machine, monkeypatch):
    monkeypatch.setattr(splits, "STREAMS", 3)
    found = [on(machine, stream) for stream in (10, 11, 12, 13, 10)]
    assert len({*found}) == 4
    assert found[3] == 0
    assert found[4] == found[0]


def test_counters_that_could_not_be_zeroed_are_not_used(machine):
    machine.fails = 201
    assert on(machine, 7) == 0
    machine.fails = 0
    assert on(machine, 7) == FIRST + 4 * COUNTERS * (splits.STREAMS - 1)


def test_a_machine_without_the_driver_zeroes_each_time(machine, monkeypatch):
    def missing():
        raise driver.Unknown

    monkeypatch.setattr(driver, "library", missing)
    assert on(machine, 7) == 0


def test_memory_in_the_form_that_pytorch_reads():
    held = splits.Memory(4096).__cuda_array_interface__
    assert held["data"] == (4096, False)
    assert torch.empty(held["shape"], dtype=torch.int32).nbytes == 4 * COUNTERS
    assert held["typestr"] == f"<i{ctypes.sizeof(ctypes.c_int32)}"
