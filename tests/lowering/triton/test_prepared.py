"""A launch that is repeated: what reaches the kernel the first time, and past Triton's look-up afterwards."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import prepared
from tmx_compile.lowering.triton.launch import prepare
from tmx_compile.lowering.triton.prepared import Prepared, kind
from tmx_compile.mask.geometry import Geometry


class Compiled(prepared.CompiledKernel):
    """Stands for what Triton compiled for one kind of call: takes all arguments of the kernel, in their order."""

    def __init__(self, names):
        self.names, self.calls = names, []

    def __getitem__(self, grid):
        def run(*args):
            assert len(args) == len(self.names)
            self.calls.append((grid, dict(zip(self.names, args, strict=True))))

        return run


class Kernel:
    """Stands for a kernel with two pointers, two numbers and two constants."""

    arg_names = ("first_ptr", "second_ptr", "count", "scale", "WIDE", "BLOCK")

    def __init__(self):
        self.compiled, self.calls = Compiled(self.arg_names), []

    def __getitem__(self, grid):
        def run(*args, num_warps, **constants):
            assert set(constants) == {"WIDE", "BLOCK"}
            self.calls.append((grid, args, num_warps))
            return self.compiled

        return run


def test_the_first_launch_goes_through_triton_and_the_others_past_it(monkeypatch):
    monkeypatch.setattr(prepared, "TRIED_VERSION", True)
    kernel = Kernel()
    launch = Prepared(kernel, 7, (3, 0.5), BLOCK=64, num_warps=4, WIDE=False)
    x, y = torch.randn(8), torch.randn(8)
    launch(x, y)
    assert kernel.calls == [((7,), (x, y, 3, 0.5), 4)]
    assert kernel.compiled.calls == []
    launch(y, x)
    launch(x, "a descriptor")
    assert len(kernel.calls) == 1
    numbers = {"count": 3, "scale": 0.5, "WIDE": False, "BLOCK": 64}
    assert kernel.compiled.calls == [
        ((7, 1, 1), {"first_ptr": y.data_ptr(), "second_ptr": x.data_ptr(), **numbers}),
        ((7, 1, 1), {"first_ptr": x.data_ptr(), "second_ptr": "a descriptor", **numbers}),
    ]


def test_an_untried_version_is_always_called_in_full(monkeypatch):
    monkeypatch.setattr(prepared, "TRIED_VERSION", False)
    kernel = Kernel()
    launch = Prepared(kernel, 7, (3, 0.5), BLOCK=64, num_warps=4, WIDE=False)
    for _ in range(3):
        launch(torch.randn(8), torch.randn(8))
    assert len(kernel.calls) == 3
    assert kernel.compiled.calls == []


def test_what_differs_for_the_kernel_is_another_kind():
    x = torch.randn(2, 4, 32, 16)
    moved = torch.randn(2 * 4 * 32 * 16 + 1)[1:].view(2, 4, 32, 16)
    others = [moved, x[:1], x.transpose(1, 2), x.half(), x.to("meta")]
    assert kind(x) == kind(torch.randn(2, 4, 32, 16))
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
