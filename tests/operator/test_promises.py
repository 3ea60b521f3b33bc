"""``assume_causal``: every mask that keeps the promise gives its numbers, every other one raises."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.oracle import oracle
from tmx_compile import Report, TriangleMixConfig, tmx_backend
from tmx_compile.operator import CHECK_MASK, KEEP_WINDOW, triangle_attention

SINK, WINDOW, LAST = 3, 9, 6
CONFIG = TriangleMixConfig(
    triangle_layer_indices=[0], num_sink_tokens=SINK, sliding_window_size=WINDOW, num_last_tokens=LAST, min_seq_len=16
)
N, ROOM = 50, 80


class Layer(nn.Module):
    def forward(self, x, keys, mask):
        return F.scaled_dot_product_attention(x, keys, keys, attn_mask=mask)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])

    def forward(self, *inputs):
        return self.layers[0](*inputs)


def causal(first=0, kv_len=ROOM, window=None):
    row, key = torch.arange(first, first + N)[:, None], torch.arange(kv_len)[None]
    mask = key <= row
    return mask if window is None else mask & (row - key < window)


def valid(*ends, kv_len=ROOM, start=0):
    key = torch.arange(kv_len)
    return torch.stack([(key >= start) & (key < end) for end in ends])


def expected(x, keys, first, key_mask, window=None):
    """The oracle over the keys up to the last row's own."""
    end = first + N
    reach = None if window is None else window - 1
    key_mask = None if key_mask is None else key_mask[:, :end].expand(x.shape[0], -1)
    k = keys[:, :, :end]
    return oracle(x, k, k, key_mask, SINK, WINDOW, LAST, x.shape[-1] ** -0.5, reach)[0]


FORMS = {
    "(N, N)": lambda mask: mask,
    "(1, N, N)": lambda mask: mask[None],
    "(1, 1, N, N)": lambda mask: mask[None, None],
    "(B, 1, N, N)": lambda mask: mask.expand(2, 1, -1, -1),
}
SHAPES = {
    "square": (0, N, None),
    "static cache": (0, ROOM, None),
    "later chunk": (17, ROOM, None),
    "to the last key": (ROOM - N, ROOM, None),
    "window": (0, ROOM, 20),
    "square window": (0, N, 20),
    "window in a later chunk": (17, ROOM, 20),
    "window inside the triangle's": (5, ROOM, 4),
}


def run_on(model, first, kv_len, window, form, key_mask=None, dtype=torch.bool):
    x, keys = torch.randn(2, 2, N, 16), torch.randn(2, 2, kv_len, 16)
    mask = FORMS[form](causal(first, kv_len, window))
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    if dtype is not torch.bool:
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    got = model(x, keys, mask)
    if window is not None and first:
        # Keys before every row's window are seen by nobody: sinks count from the first that is.
        shown = torch.arange(kv_len)[None] > first - window
        key_mask = shown if key_mask is None else key_mask & shown
    return got, expected(x, keys, first, key_mask, window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lowering", ["operator", "blocked"])
def test_masks_that_keep_the_promise(lowering, form, eager):
    report = Report()
    backend = tmx_backend(CONFIG, assume_causal=True, strict=True, lowering=lowering, report=report)
    model = torch.compile(Model(), backend=backend)
    with torch.no_grad():
        for name, shape in SHAPES.items():
            got, want = run_on(model, *shape, form)
            assert (got - want).abs().max() < 2e-5, name
    assert {site.decision for site in report} == {"triangle"}


PADDED = {
    "one on the right": ((N, 31), 0),
    "all on the right": ((41, 31), 0),
    "alike on the right": ((31, 31), 0),
    "left": ((N, N), 11),
    "both": ((45, 33), 7),
    "hardly any": ((1, 2), 0),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("kv_len", [N, ROOM])
def test_padded_masks_that_keep_the_promise(kv_len, dtype, eager):
    model = torch.compile(Model(), backend=tmx_backend(CONFIG, assume_causal=True, strict=True, lowering="operator"))
    with torch.no_grad():
        for name, (ends, start) in PADDED.items():
            for window in (None, 20):
                key_mask = valid(*ends, kv_len=kv_len, start=start)
                got, want = run_on(model, 0, kv_len, window, "(B, 1, N, N)", key_mask, dtype)
                for b, end in enumerate(ends):
                    assert (got - want)[b, :, start:end].abs().max() < 2e-5, (name, window)
                assert bool(got.isfinite().all())


BROKEN = {
    "a later key": lambda mask: mask.index_put((torch.tensor(3), torch.tensor(9)), torch.tensor(True)),
    "a missing key": lambda mask: mask.index_put((torch.tensor(40), torch.tensor(9)), torch.tensor(False)),
    "everything": torch.ones_like,
    "blocks": lambda mask: mask & (torch.arange(N)[:, None] // 10 == torch.arange(mask.shape[1])[None] // 10),
    "two windows": lambda mask: torch.cat([mask[:30], causal(0, mask.shape[1], 12)[30:]]),
    "every other key": lambda mask: mask & ((torch.arange(N)[:, None] - torch.arange(mask.shape[1])) % 2 == 0),
}


@pytest.mark.parametrize("kv_len", [N, ROOM])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_raises(name, kv_len):
    CHECK_MASK(causal(0, kv_len), N, kv_len)
    with pytest.raises(ValueError, match="assume_causal was promised, but a mask is not causal"):
        CHECK_MASK(BROKEN[name](causal(0, kv_len)), N, kv_len)


def test_the_check_reads_blocks(monkeypatch):
    from tmx_compile.operator import checks

    mask = causal(17, ROOM, 20)[None, None] & valid(60, 40, start=5)[:, None, None]
    whole = CHECK_MASK(mask, N, ROOM)
    assert int(whole[1]) == 17
    assert whole[2].tolist() == [19, 1]
    monkeypatch.setattr(checks, "CELLS", 2 * ROOM * 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, CHECK_MASK(mask, N, ROOM), strict=True))
    torch.library.opcheck(CHECK_MASK, (mask, N, ROOM))


@pytest.mark.parametrize("shown", [(19, 1), (49, 0), (10, 0)])
@pytest.mark.parametrize("reach", [None, 19, 30])
def test_the_window_of_the_run_is_kept_in_both_directions(reach, shown):
    far, limited = shown
    q, k, v = (torch.randn(1, 2, N, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    key_mask, geometry = torch.ones(1, N, dtype=torch.bool), dict(sink=SINK, window=WINDOW, last=LAST)
    out = triangle_attention(q, k, v, key_mask, **geometry, reach=reach)[0]
    kept = KEEP_WINDOW(out, q, k, v, key_mask, torch.tensor(shown), SINK, WINDOW, LAST, 8**-0.5, reach)
    # (10, 0): so short that no row could see further; whatever was compiled holds.
    real = far if limited else None if far > 10 else reach
    want = oracle(q, k, v, key_mask, SINK, WINDOW, LAST, 8**-0.5, real)[0]
    assert (kept - want).abs().max() < 1e-11
    grad = torch.randn_like(kept)
    found = torch.autograd.grad(kept, (q, k, v), grad)
    for a, b in zip(found, torch.autograd.grad(want, (q, k, v), grad), strict=True):
        assert (a - b).abs().max() < 1e-11


# Masks that can be read in part --------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Causal, and every token of an image sees all of its image (Gemma 3 with images)."""

    def __init__(self, bidirectional=False):
        super().__init__()
        self.layers = nn.ModuleList([Layer()])
        self.bidirectional = bidirectional

    def forward(self, x, image):
        place = torch.arange(x.shape[2])
        mask = place[None, None] <= place[:, None] + (x.shape[2] if self.bidirectional else 0)
        same = (image[:, None] == image[:, :, None]) & (image[:, None] > 0)
        return self.layers[0](x, x, (mask | same)[:, None])


def test_a_mask_of_image_blocks_is_checked_as_a_whole():
    config = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4000, min_seq_len=100)
    backend = tmx_backend(config, lowering="operator", assume_causal=True)
    run = torch.compile(Blocks(), backend=backend)
    x, image = torch.randn(2, 2, 150, 16), torch.zeros(2, 150, dtype=torch.long)
    torch.testing.assert_close(run(x, image), Blocks()(x, image), atol=2e-5, rtol=1e-5)
    assert [site.decision for site in backend.report] == ["triangle"]
    image[1, 40:60] = 1
    with pytest.raises(ValueError, match="assume_causal was promised, but a mask is not causal"):
        run(x, image)


def test_the_promise_does_not_cover_a_mask_that_is_read_as_not_causal():
    config = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4000, min_seq_len=100)
    backend = tmx_backend(config, lowering="operator", assume_causal=True)
    x, image = torch.randn(2, 2, 150, 16), torch.zeros(2, 150, dtype=torch.long)
    model = Blocks(bidirectional=True)
    torch.testing.assert_close(torch.compile(model, backend=backend)(x, image), model(x, image))
    assert [site.reason for site in backend.report] == ["NOT_CAUSAL"]
