"""The ``triton`` lowering's operator and its launch, in Triton's interpreter where there is no GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.oracle import oracle, tolerance
from tests.support.problems import CASES
from tmx_compile.lowering import table
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.lowering.table import TRITON, Role, Wish
from tmx_compile.lowering.triton import lowering, tuning
from tmx_compile.lowering.triton.launch import attend, forget
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import ALL_ROWS
from tmx_compile.operator.kernel import valid_range
from tmx_compile.report import Accepted, Reason, Rejected

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def extent_of(key_mask, last=0):
    start, end = valid_range(key_mask)
    end = torch.full_like(end, key_mask.shape[1]) if last == ALL_ROWS else end
    return torch.stack([start, end, (end - start) != key_mask.sum(1)], 1).to(torch.int32)


def run(case, **kwargs):
    """out and lse of the kernel, and the oracle's."""
    *qkv, key_mask = case.tensors(device=DEVICE)
    extent = None if key_mask is None else extent_of(key_mask, case.last)
    got = attend(*qkv, key_mask, extent, case.mask, case.scale, **kwargs)
    want = oracle(*(x.cpu() for x in qkv), None if key_mask is None else key_mask.cpu(), *case.arguments)
    return [None if x is None else x.cpu().double() for x in got], want


@pytest.mark.parametrize("name", ["prime length", "multi-query", "holes", "no valid key", "padding and a reach"])
def test_log_sum_exp(name):
    (out, lse), (want, want_lse) = run(CASES[name], with_lse=True)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(lse, want_lse.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_the_result_goes_into_memory_that_is_given(dtype):
    """A part of something larger, whose other numbers stay."""
    case = replace(CASES["prime length"], dtype=dtype)
    *qkv, _ = case.tensors(device=DEVICE)
    batch, heads, rows, _ = qkv[0].shape
    memory = torch.full((batch, rows + 2, heads, qkv[2].shape[3]), 7.0, dtype=dtype, device=DEVICE)
    out = memory[:, 1:-1].transpose(1, 2)
    (got, _), (want, _) = run(case, out=out)
    torch.testing.assert_close(got, out.cpu().double(), atol=0, rtol=0)
    torch.testing.assert_close(got, want, atol=max(1e-4, tolerance(dtype)), rtol=0)
    assert (memory[:, [0, -1]] == 7).all()


def test_other_memory_is_refused():
    query = torch.zeros(1, 2, 5, 16, device=DEVICE)
    for out in (torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 5, 16, dtype=f64), torch.zeros(1, 2, 16, 5).mT):
        with pytest.raises(ValueError, match=r"out must be \(1, 2, 5, 16\), torch.float32"):
            attend(query, query, query, None, None, Geometry(1, 2, 3), 1.0, out=out.to(DEVICE))


SHAPES = {
    "small": tuning.SMALL,
    "large": tuning.LARGE,
    "large heads": tuning.LARGE_HEADS,
    "float32": tuning.FLOAT32,
    "float32, large heads": tuning.FLOAT32_LARGE_HEADS,
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["window of many blocks", "padding on both sides", "a window of the layer's own"])
def test_every_shape_of_the_table(name, shapes):
    case = replace(CASES[name], dtype=f32 if shapes in (tuning.FLOAT32, tuning.FLOAT32_LARGE_HEADS) else f16)
    (out, _), (want, _) = run(case, shapes=shapes)
    torch.testing.assert_close(out, want, atol=max(1e-4, tolerance(case.dtype)), rtol=0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 1), (6, 2), (7, 1), (10, 2), (64, 1)], ids=str)
def test_groups_of_any_size(heads, kv_heads):
    (out, _), (want, _) = run(Case(260, 260, 5, 40, 30, heads=heads, kv_heads=kv_heads))
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch):
    """The last rows' parts, with ranges that hold no key of a row among them."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    forget()
    for name in ("prime length", "everything beyond the end", "padding on both sides", "a reach inside the last rows"):
        (out, _), (want, _) = run(CASES[name])
        torch.testing.assert_close(out, want, atol=1e-4, rtol=0)
    forget()


def test_the_memory_of_partial_results_is_bounded():
    for tiles in (1, 8, 16, 100, 10_000):
        for rows in (64, 128):
            splits = tuning.splits(tiles, 131072, rows, 132)
            assert splits >= 1
            assert splits == 1 or tiles * splits * rows <= 132 * 128
    assert tuning.splits(1, 300, 128, 132) == 1
    # No more tiles than there are counters, however large the GPU.
    assert tuning.splits(tuning.COUNTERS, 1 << 30, 16, 10**6) > 1
    assert tuning.splits(tuning.COUNTERS + 1, 1 << 30, 16, 10**6) == 1
    assert tuning.sink_splits(tuning.COUNTERS, 1 << 30, 10**6) > 1
    assert tuning.sink_splits(tuning.COUNTERS + 1, 1 << 30, 10**6) == 1


def test_padded_keys_may_hold_anything():
    """A key that nobody may attend never reaches a result of the general kernel, whatever stands there."""
    case = Case(150, 150, 4, 20, 8, batch=2, valid=((30, 150), (0, 90)), holes=True)
    q, k, v, key_mask = case.tensors(device=DEVICE)
    want = attend(q, k, v, key_mask, extent_of(key_mask), case.mask, 0.25)[0]
    poison = ~key_mask[:, None, :, None]
    k, v = k.masked_fill(poison, float("nan")), v.masked_fill(poison, float("inf"))
    got = attend(q, k, v, key_mask, extent_of(key_mask), case.mask, 0.25)[0]
    assert torch.equal(got, want)


def test_a_key_mask_of_any_strides():
    case = CASES["holes"]
    q, k, v, key_mask = case.tensors(device=DEVICE)
    want = attend(q, k, v, key_mask, extent_of(key_mask), case.mask, 0.25)[0]
    strided = key_mask.t().contiguous().t()
    assert strided.stride(1) != 1
    assert torch.equal(attend(q, k, v, strided, extent_of(key_mask), case.mask, 0.25)[0], want)


def test_opcheck():
    for name in ("multi-query", "padding on both sides", "a window of the layer's own"):
        case = replace(CASES[name], q_len=min(CASES[name].q_len, 150), kv_len=min(CASES[name].kv_len, 150))
        *qkv, key_mask = case.tensors(requires_grad=True, device=DEVICE)
        extent = None if key_mask is None else extent_of(key_mask)
        arguments = (*qkv, key_mask, extent, *case.arguments)
        torch.library.opcheck(torch.ops.tmx.triangle_attention_triton.default, arguments)


@pytest.mark.parametrize("name", ["prime length", "left padding", "holes", "a reach inside the last rows"])
def test_gradients(name):
    case = CASES[name]
    *qkv, key_mask = case.tensors(requires_grad=True, device=DEVICE)
    backend = LoweringBackend(TRITON, inductor=False)
    out = torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False)(*qkv, key_mask)
    weight = torch.randn_like(out)
    leaves = [x.detach().cpu().requires_grad_() for x in qkv]
    want, _ = oracle(*leaves, None if key_mask is None else key_mask.cpu(), *case.arguments)
    expected = torch.autograd.grad(want, leaves, weight.cpu().double())
    for mine, theirs in zip(torch.autograd.grad(out, qkv, weight), expected, strict=True):
        torch.testing.assert_close(mine.cpu().double(), theirs.double(), atol=1e-3, rtol=1e-3)


def call(dtype=bf16, dim=64, v_dim=None, n=300, scale=0.1, key_mask=None, device="meta", **changes):
    q = torch.empty(1, 2, n, dim, dtype=dtype, device=device)
    v = torch.empty(1, 2, n, v_dim or dim, dtype=dtype, device=device)
    settings = dict(geometry=Geometry(4, 8, 8), scale=scale, needs_grad=False) | changes
    return AttentionCall(q, q, v, key_mask, **settings)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(dtype=f64), "float64 is not bfloat16"),
        (dict(dim=300), "head dims 300 and 300 are not from 1 to 256"),
        (dict(v_dim=257), "head dims 64 and 257"),
        (dict(n=0), "an empty tensor"),
        (dict(scale=0.0), "scale=0.0 is not positive"),
        (dict(scale=-1.0), "scale=-1.0 is not positive"),
        (dict(key_mask=torch.zeros(1, 300, dtype=torch.int64)), "packed documents"),
        (dict(), "written for NVIDIA GPUs, got meta"),
    ],
)
def test_refusals(changes, why):
    answer = TRITON.supports(call(**changes))
    assert answer.reason is Reason.NO_LOWERING
    assert answer.detail.startswith("triton: ")
    assert why in answer.detail


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(lowering.importlib.util, "find_spec", lambda name: None)
    assert TRITON.supports(call()).detail == "triton: Triton is not installed"


def test_an_old_gpu_is_refused(monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda device: (7, 5))
    monkeypatch.setattr(lowering.torch, "cuda", cuda)
    assert "8.0 (Ampere)" in lowering.missing(torch.device("cuda"))


def test_auto_takes_it_on_cuda_alone(monkeypatch):
    on_cuda = SimpleNamespace(device=torch.device("cuda"), dtype=bf16)
    assert table.candidates("cuda", Role.PROMPT, replace(call(), query=on_cuda), Wish())[0] is TRITON
    assert TRITON not in table.candidates("cpu", Role.PROMPT, call(device="cpu"), Wish())


def test_dense_layers_with_padding_take_it_on_cuda(monkeypatch):
    """No kernel of SDPA's takes causal with padding. Never in a graph that is handed back, or under another name."""
    mask = torch.ones(1, 300, dtype=torch.bool)
    padded = call(key_mask=mask, geometry=Geometry(0, 0, ALL_ROWS))
    monkeypatch.setattr(type(TRITON), "supports", lambda self, call: Accepted())

    def maskless(place, named, call):
        chosen = table.choose(place, Role.MASKLESS, call, Wish(named))
        return None if isinstance(chosen, Rejected) else chosen

    assert maskless("cpu", "auto", padded) is None
    fake = SimpleNamespace(device=torch.device("cuda"), shape=padded.query.shape, dtype=bf16)
    padded = replace(padded, query=fake)
    assert maskless("cuda", "auto", padded) is TRITON
    assert maskless("cuda", "triton", padded) is TRITON
    assert maskless("cuda", "flex", padded) is None
    assert maskless("portable", "auto", padded) is None
    assert maskless("cuda", "auto", replace(padded, needs_grad=True)) is None
    assert maskless("cuda", "auto", replace(padded, key_mask=None)) is table.DENSE


def test_dense_through_the_kernel():
    (out, _), (want, _) = run(Case(300, 300, 0, 0, ALL_ROWS, batch=2, valid=((40, 300), (0, 200)), holes=True))
    torch.testing.assert_close(out, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("heads", "multiprocessors"), [(32, 132), (9, 108), (16, 7)])
def test_from_which_rows_on_another_kernel_runs(heads, multiprocessors):
    """An engine compiles one prompt of each; the numbers are where the table's answer changes, and nowhere else."""

    def chosen(rows):
        stacked = heads * rows, multiprocessors
        return tuning.enough_for_hopper(*stacked), tuning.choose(2, 128, 4096, *stacked)

    steps = tuning.row_steps(heads, multiprocessors)
    assert [rows for rows in range(2, 2 * steps[-1]) if chosen(rows) != chosen(rows - 1)] == list(steps)


def test_shapes_of_the_hopper_kernel():
    """A smaller first block where it wastes less, small blocks for narrow windows, and large ones for last rows."""
    cases = (8, 512), (0, 512), (64, 1024), (4, 32), (17, 32), (300, 512)
    chosen = [tuning.choose_hopper(*counts, 32) for counts in cases]
    assert [(x.keys, x.first) for x in chosen] == [(128, 64), (128, 32), (128, 128), (64, 16), (64, 32), (64, 64)]
    dense = tuning.choose_hopper(0, 0, 32, mostly_last=True)
    assert (dense.keys, dense.first) == (128, 128)
    # A first block holds the sinks where blocks are large; shared memory holds as many keys.
    for sink in range(129):
        for window in range(0, 2000, 7):
            x = tuning.choose_hopper(sink, window, 32)
            assert x.keys * x.stages == 256
            assert x.keys == 64 or sink <= x.first
            # What is left beside whole blocks fits, and nothing smaller would do.
            slots = -(-sink // 16) * 16 + window + 32
            assert x.first == x.keys or max(slots % x.keys, 1) <= x.first


def test_splits_of_the_last_rows():
    assert [tuning.splits(16, n, 128, 132, 16384) for n in (300, 4096, 32768, 65536, 131072)] == [1, 2, 2, 4, 8]
    assert [tuning.splits(16, n, 128, 132) for n in (300, 1024, 4096, 131072)] == [1, 4, 8, 8]
