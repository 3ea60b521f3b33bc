"""A forward launch: the same pointers, in the same order, by Triton and past it."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")

from tmx_compile.lowering.triton import driver
from tmx_compile.lowering.triton.forward import Forward
from tmx_compile.lowering.triton.prepared import kind

Q, K, V = (torch.randn(2, n, heads, 16).transpose(1, 2) for n, heads in ((5, 4), (9, 2), (9, 2)))
MASK, EXTENT, WHOLE, SINKS = torch.ones(2, 9), torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(4)


class Launch:
    """Stands for a prepared launch; ``works`` says whether there is one past Triton, and whether the driver does it."""

    def __init__(self, works):
        self.works, self.given, self.addresses = works, None, None
        self.again = None if works is None else self.by_driver

    def by_driver(self, addresses, stream):
        assert stream == 6
        self.addresses = list(addresses)
        return self.works

    def by_triton(self, stand_in, *tensors):
        assert any(stand_in is x for x in tensors)
        self.given = tensors


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(driver, "stream_of", lambda device: 7 + device)


def run(works, takes_pieces, parts=12, with_lse=True, copies_out=False, **tensors):
    launch = Launch(works)
    forward = Forward(launch, kind(Q), kind(V), with_lse, parts, takes_pieces=takes_pieces, copies_out=copies_out)
    return SimpleNamespace(results=forward(Q, K, V, **tensors), launch=launch)


CALLS = {
    "plain": {},
    "padded": {"key_mask": MASK, "extent": EXTENT},
    "completed": {"done": (torch.zeros(2, 4, 5, 16), WHOLE)},
    "sinks": {"sink_logits": SINKS},
    "into memory": {"out": torch.zeros(2, 4, 5, 16)},
}


@pytest.mark.parametrize(
    ("name", "takes_pieces", "copies_out"),
    [
        *[(name, False, False) for name in CALLS],
        *[(name, True, copies_out) for name in ("plain", "padded", "into memory") for copies_out in (False, True)],
    ],
)
@pytest.mark.parametrize(("parts", "with_lse"), [(12, True), (0, False)])
def test_pointers_stand_in_one_order(name, takes_pieces, copies_out, parts, with_lse):
    # The driver refuses: so both are given the same tensors.
    made = run(False, takes_pieces, parts, with_lse, copies_out, **CALLS[name])
    given = made.launch.given
    assert made.launch.addresses == [0 if x is None else x.data_ptr() for x in given]
    out, lse = made.results
    front = (Q, K, V, K, V, out if copies_out else Q) if takes_pieces else (Q, K, V)
    mask, extent = CALLS[name].get("key_mask"), CALLS[name].get("extent")
    want = [*front, out, lse, mask, extent]
    if not takes_pieces:
        want += [*given[7:9], WHOLE if name == "completed" else None, CALLS[name].get("sink_logits")]
    assert all(x is y for x, y in zip(given, want, strict=False))
    held, counters = given[len(front) + 4 : len(front) + 6]
    assert (held is None) == (counters is None) == (parts == 0)
    if parts:
        assert (held.shape, held.dtype) == ((12,), torch.float32)
        assert counters.dtype == torch.int32


def test_results():
    out, lse = run(None, False).results
    assert (out.shape, out.stride(), out.dtype) == ((2, 4, 5, 16), (320, 16, 64, 1), torch.float32)
    assert (lse.shape, lse.stride(), lse.dtype) == ((2, 4, 5), (20, 5, 1), torch.float32)
    memory = torch.zeros(2, 4, 5, 16)
    assert run(None, False, out=memory).results[0] is memory
    assert run(None, False, with_lse=False).results[1] is None


def test_what_the_driver_launched_triton_does_not():
    assert run(True, False).launch.given is None
    assert run(None, False).launch.given is not None
