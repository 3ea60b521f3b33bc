"""A launch that is repeated: what reaches the kernel the first time, and past Triton afterwards."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver, launch, prepared
from tmx_compile.lowering.triton.prepared import Prepared, as_key, kind, remember
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
    monkeypatch.setattr(driver, "stream_of", lambda device: 70 + device)


def launch_of(kernel, **describe):
    return Prepared(kernel, torch.device("cuda:5"), 7, (3, 0.5), **describe, BLOCK=64, num_warps=4, WIDE=False)


def test_the_first_launch_goes_through_triton_and_the_others_past_it(repeated):
    kernel = Kernel()
    repeats = launch_of(kernel)
    x, y = torch.randn(8), torch.randn(8)
    repeats(x, x, y)
    assert kernel.calls == [((7,), (x, y, 3, 0.5), 4)]
    assert repeats.again.made == (kernel.compiled, 7, [x, y, 3, 0.5, False, 64], 2)
    repeats(x, y, x)
    repeats(x, None, y)
    assert len(kernel.calls) == 1
    assert repeats.again.calls == [([y.data_ptr(), x.data_ptr()], 75), ([0, y.data_ptr()], 75)]


def test_another_tensor_stands_in_where_triton_asks_for_one(repeated):
    kernel = Kernel()
    x, y = torch.randn(8), torch.randn(8)
    launch_of(kernel, describe=(lambda tensor: ("described", tensor),))(x, y, None)
    assert kernel.calls == [((7,), (("described", y), x, 3, 0.5), 4)]


def test_what_the_driver_does_not_do_triton_does(repeated, monkeypatch):
    kernel = Kernel()
    repeats = launch_of(kernel)
    x = torch.randn(8)
    repeats(x, x, x)
    monkeypatch.setattr(Repeated, "works", False)
    repeats(x, x, x)
    assert len(repeats.again.calls) == 1
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
    repeats = launch_of(kernel)
    for _ in range(3):
        repeats(x, x, x)
    assert len(kernel.calls) == 3
    assert repeats.again is None


def others_of(x):
    moved = torch.randn(x.numel() + 1)[1:].view(x.shape)
    return [moved, x[:1], x.transpose(1, 2), x.half(), x.to("meta")]


def test_what_differs_for_the_kernel_is_another_kind():
    x = torch.randn(2, 4, 32, 16)
    assert kind(x) == kind(torch.randn(2, 4, 32, 16))
    assert kind(x).stride == x.stride()
    assert kind(x).aligned
    assert all(kind(other) != kind(x) for other in others_of(x))


def test_what_differs_for_the_kernel_is_another_key():
    x = torch.randn(2, 4, 32, 16)
    assert as_key((x, None)) == as_key((torch.randn(2, 4, 32, 16), None)) != as_key((None, x))
    # All devices without a number are one.
    assert all(as_key((x, other)) != as_key((x, x)) for other in others_of(x)[:-1])


def test_as_many_kinds_are_remembered_as_are_allowed(monkeypatch):
    monkeypatch.setattr(prepared, "MOST_KINDS", 2)
    known = {}
    assert [remember(known, key, key * 10) for key in (1, 2, 3)] == [10, 20, 30]
    assert known == {3: 30}


@pytest.fixture
def made(monkeypatch):
    """The launches that are prepared: each returns its own number."""
    launches = []

    def prepare(*arguments, **options):
        launches.append((arguments, options))
        number = len(launches)
        return lambda *tensors: (number, None)

    monkeypatch.setattr(launch, "prepare", prepare)
    launch.forget()
    yield launches
    launch.forget()


def test_calls_of_one_kind_are_prepared_once(made):
    x = torch.randn(2, 4, 32, 16)
    geometry, values = Geometry(4, 8, 6), {"with_lse": False, "softcap": None}

    def number(query=x, key=x, value=x, mask=None, extent=None, geometry=geometry, scale=0.25, sinks=None, **options):
        return launch.attend(query, key, value, mask, extent, geometry, scale, sinks, **values | options)[0]

    mask, extent = torch.ones(2, 32, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int32)
    out, whole = torch.randn(2, 4, 32, 16), torch.zeros(2, 2, dtype=torch.int32)
    unlike = torch.randn(2, 4, 32 * 16 + 16)[..., 16:].view(2, 4, 32, 16)
    forms = unlike, others_of(x)[0], x.half()
    others = [
        {},
        *[{name: form} for name in ("query", "key", "value") for form in forms],
        {"mask": mask, "extent": extent},
        {"mask": mask[:1].expand(2, 32), "extent": extent},
        *[{"geometry": Geometry(*counts)} for counts in ((3, 8, 6), (4, 9, 6), (4, 8, 5), (4, 8, 6, 7))],
        {"scale": 0.5},
        {"with_lse": True},
        {"softcap": 30.0},
        {"sinks": torch.zeros(4)},
        {"out": out},
        {"out": unlike},
        {"done": (out, whole)},
    ]
    first = [number(**other) for other in others]
    assert first == list(range(1, 1 + len(others)))
    assert [number(**other) for other in others] == first
    assert number(torch.randn(2, 4, 32, 16)) == 1
    assert len(made) == len(others)
