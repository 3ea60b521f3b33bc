"""Constant masks are compared by value before every call; rows that the run places are placed among the keys."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import under_mask
from tmx_compile import Report, TriangleMixConfig, TriangleMixError, tmx_backend
from tmx_compile.proof import constants
from tmx_compile.proof.constants import KnownTensor, recognise

# A window wider than any prompt here: the result is that of dense attention.
CONFIG = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4000, min_seq_len=32)
N = 70
LOW = torch.finfo(torch.float32).min


def square(diagonal=0):
    return torch.ones(N, N, dtype=torch.bool).tril(diagonal)


def added(low, high):
    return torch.where(square(), low, high)


class Buffered(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=self.mask)


def compiled(mask, **options):
    model = nn.Sequential(Buffered(mask))
    return model, torch.compile(model, backend=tmx_backend(CONFIG, strict=True, lowering="operator", **options))


def other(mask):
    return mask.flip(0)


def moved(mask):
    mask.set_(other(mask).untyped_storage(), 0, mask.shape)


WRITES = {
    "copy_": lambda mask: mask.copy_(other(mask)),
    "data": lambda mask: mask.data.copy_(other(mask)),
    "data =": lambda mask: setattr(mask, "data", other(mask)),
    "NumPy": lambda mask: mask.numpy().__setitem__(slice(None), other(mask).numpy()),
    "set_": moved,
    "one cell": lambda mask: mask.data[40, 7:8].copy_(mask[7, 40:41]),
    "the last cell": lambda mask: mask.data[-1, -1:].copy_(mask[0, -1:]),
}


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("write", WRITES)
def test_a_written_constant_is_noticed_however_it_was_written(write, kind, eager):
    mask = square() if kind == "bool" else added(0.0, LOW)
    model, run = compiled(mask)
    x = torch.randn(1, 2, N, 16)
    with torch.no_grad():
        assert (run(x) - under_mask(x, x, square())).abs().max() < 2e-5
        WRITES[write](model[0].mask)
        with pytest.raises(TriangleMixError, match="has changed since the model was compiled"):
            run(x)
        model[0].mask.data = square() if kind == "bool" else added(0.0, LOW)
        assert (run(x) - under_mask(x, x, square())).abs().max() < 2e-5


@pytest.mark.parametrize("write", WRITES)
def test_a_written_constant_runs_as_written_with_one_warning(write, eager):
    model = nn.Sequential(Buffered(square()))
    run = torch.compile(model, backend=tmx_backend(CONFIG, lowering="operator"))
    x = torch.randn(1, 2, N, 16)
    with torch.no_grad():
        run(x)
        WRITES[write](model[0].mask)
        with pytest.warns(UserWarning, match="has changed since the model was compiled.*uncompiled and dense"):
            assert torch.equal(run(x), model(x))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(run(x), model(x))
        model[0].mask.data = square()
        assert (run(x) - under_mask(x, x, square())).abs().max() < 2e-5


def test_a_buffer_made_in_inference_mode(eager):
    x = torch.randn(1, 2, N, 16)
    with torch.inference_mode():
        model, run = compiled(square())
        for _ in range(2):
            assert (run(x) - under_mask(x, x, square())).abs().max() < 2e-5
        model[0].mask[9, 30] = True
        with pytest.raises(TriangleMixError, match="has changed"):
            run(x)


TENSORS = {
    "ones": torch.ones(7, 5),
    "true": torch.ones(3, 90, dtype=torch.bool),
    "a number": torch.tensor(3),
    "causal": square(),
    "shifted": square(5),
    "far below": square(-9),
    "later keys": ~square(2),
    "additive": added(0.0, LOW),
    "infinite": added(0.0, float("-inf")),
    "half": added(0.0, float("-inf")).half(),
    "four dimensions": square()[None, None],
    "wide": torch.ones(30, N, dtype=torch.bool).tril(17),
    "high": torch.ones(N, 30, dtype=torch.bool).tril(-11),
    "transposed": square().mT,
    "positions": torch.arange(50),
    "differences": torch.arange(40)[None] - 3 * torch.arange(30, dtype=torch.int32)[:, None].long(),
    "three": torch.arange(6)[:, None, None] * 100 + torch.arange(7)[:, None] * 10 + torch.arange(9),
    "bytes": torch.full((4, 4), 1, dtype=torch.uint8),
}


@pytest.mark.parametrize("cells", [1 << 22, 16, 1])
@pytest.mark.parametrize("name", TENSORS)
def test_every_cell_counts(name, cells, monkeypatch):
    monkeypatch.setattr(constants, "CELLS", cells)
    monkeypatch.setattr(constants, "ROWS", max(2, cells // 4) if cells < 100 else 256)
    tensor = TENSORS[name].clone()
    term = recognise(tensor)
    assert term is not None
    known = KnownTensor(name, 0, term)
    assert known.holds(tensor)
    assert known.holds(tensor.clone())
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.mT.reshape(-1)
    for place in {0, len(flat) - 1, len(flat) // 2, *torch.randint(len(flat), (5,)).tolist()}:
        changed = flat.clone()
        changed[place] = ~changed[place] if tensor.dtype == torch.bool else changed[place].clamp(-5) + 1
        changed = changed.view(tensor.shape) if tensor.is_contiguous() else changed.view(tensor.mT.shape).mT
        assert not known.holds(changed), place


def test_what_follows_no_rule_is_not_recognised():
    for tensor in (
        torch.randn(5, 5),
        torch.randint(9, (40,)).flip(0) ** 2 + torch.arange(40) ** 2,
        torch.tensor([[True, False, True]] * 3),
        torch.full((4, 4), float("nan")),
        torch.zeros(0),
        torch.zeros(2, 2, dtype=torch.complex64),
        torch.stack([square(), square(1)]),
    ):
        assert recognise(tensor) is None


def test_no_temporary_of_the_size_of_the_mask(monkeypatch):
    monkeypatch.setattr(constants, "ROWS", 8)
    monkeypatch.setattr(constants, "CELLS", 8 * 512)
    mask = torch.where(torch.ones(512, 512, dtype=torch.bool).tril(), 0.0, LOW)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None and out.untyped_storage().data_ptr() != own:
                largest = max(largest, out.numel())
            return out

    own = mask.untyped_storage().data_ptr()
    with Watch():
        term = recognise(mask)
        assert KnownTensor("mask", 0, term).holds(mask)
    assert 0 < largest <= 8 * 512


class Placed(nn.Module):
    """Rows that start at a position of the run's choice."""

    def __init__(self, by_positions):
        super().__init__()
        self.by_positions = by_positions

    def forward(self, x, keys, start):
        rows = start if self.by_positions else torch.arange(x.shape[2]) + start
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=torch.arange(keys.shape[2]) <= rows[:, None])


class Chain(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, *inputs):
        return self.layers[0](*inputs)


@pytest.mark.parametrize("lowering", ["operator", "blocked", "reference"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("by_positions", [False, True], ids=["start", "positions"])
def test_rows_start_among_the_keys_or_the_call_says_so(by_positions, dynamic, lowering, eager):
    report = Report()
    backend = tmx_backend(CONFIG, lowering=lowering, report=report, assume_causal=by_positions)
    model = torch.compile(Chain(Placed(by_positions)), backend=backend)
    room = 20
    for start in (0, 3, room, room + 1, 5000, -1):
        x, keys = torch.randn(1, 2, N, 16), torch.randn(1, 2, N + room, 16)
        rows = torch.arange(N) + start
        where = rows if by_positions else torch.tensor(start)
        if dynamic:
            for tensor in (x, keys):
                torch._dynamo.mark_dynamic(tensor, 2)
            if by_positions:
                torch._dynamo.mark_dynamic(where, 0)
        with torch.no_grad():
            if 0 <= start <= room:
                want = under_mask(x, keys, torch.arange(N + room)[None] <= rows[:, None])
                assert (model(x, keys, where) - want).abs().max() < 2e-5
            else:
                with pytest.raises(ValueError, match=f"start at key {start}, and {N} rows|not consecutive"):
                    model(x, keys, where)
    assert {site.decision for site in report} == {"triangle"}


class Unpacked(nn.Module):
    """As 8-bit layers do: a weight of known sizes that is given other storage, behind the product that read it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
        self.register_buffer("packed", torch.randn(16, 16))

    def forward(self, x):
        y = x @ self.weight
        self.weight.data = self.packed
        return F.scaled_dot_product_attention(y, y, y, is_causal=True)


def test_a_weight_that_is_given_other_storage_leaves_attention_alone(eager):
    model = nn.Sequential(Unpacked())
    run = torch.compile(model, backend=tmx_backend(CONFIG, strict=True, lowering="operator"))
    x = torch.randn(1, 2, N, 16)
    with torch.no_grad():
        for weight in (model[0].weight.clone(), model[0].packed):
            y = x @ weight
            torch.testing.assert_close(run(x).double(), under_mask(y, y, square()).double(), rtol=1e-4, atol=1e-4)
