"""Rows whose own key is hidden: one rule on every path, and every row that eager attention defines equals it.

The window is wider than the prompts, so that a sparse layer's numbers are those of dense attention under the mask.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.calls import Case, LoweringBackend, OneCall
from tests.support.layers import OneLayer
from tests.support.oracle import oracle, under_mask
from tmx_compile import Report, TriangleMixConfig, tmx_backend
from tmx_compile.lowering.table import BLOCKED, OPERATOR, REFERENCE, TRITON
from tmx_compile.operator import ALL_ROWS, triangle_attention

N = 70
CONFIG = TriangleMixConfig(triangle_layer_indices=[0], sliding_window_size=4000, min_seq_len=32)


class Layer(nn.Module):
    def __init__(self, documents):
        super().__init__()
        self.documents = documents

    def forward(self, x, shown, document):
        place = torch.arange(x.shape[2])
        mask = (place[None] <= place[:, None]) & shown[:, None, None]
        if self.documents:
            mask = mask & (document[:, None, :, None] == document[:, None, None, :])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


HIDDEN = {
    "inside": [33],
    "the last": [N - 1],
    "the first": [0, 1],
    "a run at the end": list(range(50, N)),
    "the end of a document": [28, 29],
    "a document's start": [30, 31],
    "a whole document": list(range(30, 60)),
    "nothing": [],
    "everything": list(range(N)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("path", ["operator", "blocked", "reference", "documents"])
def test_every_row_with_a_visible_key_equals_eager(path, dynamic, eager):
    documents = path == "documents"
    report = Report()
    lowering = "operator" if documents else path
    model = torch.compile(OneLayer(Layer(documents)), backend=tmx_backend(CONFIG, report=report, lowering=lowering))
    place = torch.arange(N)
    document = (place // 30)[None].expand(2, -1).contiguous()
    for name, hidden in HIDDEN.items():
        x, shown = torch.randn(2, 2, N, 16), torch.ones(2, N, dtype=torch.bool)
        shown[0, hidden] = False
        if dynamic:
            for tensor, dim in ((x, 2), (shown, 1), (document, 1)):
                torch._dynamo.mark_dynamic(tensor, dim)
        mask = (place[None] <= place[:, None]) & shown[:, None]
        if documents:
            mask = mask & (document[:, :, None] == document[:, None])
        with torch.no_grad():
            assert (model(x, shown, document) - under_mask(x, x, mask[:, None])).abs().max() < 2e-5, name
    assert {site.decision for site in report} == {"triangle"}


@pytest.mark.parametrize("last", [0, 7, 500, ALL_ROWS])
@pytest.mark.parametrize("lowering", [BLOCKED, REFERENCE, OPERATOR, TRITON], ids=lambda low: low.name)
def test_rows_behind_the_last_key(lowering, last):
    case = Case(60, 90, 3, 11, last, batch=4, valid=((0, 90), (4, 50), (0, 20), (0, 0)), holes=True)
    *qkv, key_mask = case.tensors()
    backend = LoweringBackend(lowering, inductor=False)
    with torch.no_grad():
        out = torch.compile(OneCall(*case.one_call), backend=backend, dynamic=False)(*qkv, key_mask)
    assert (out - oracle(*qkv, key_mask, *case.arguments)[0]).abs().max() < 2e-5


def test_a_hidden_key_has_a_document_all_the_same():
    numbers = torch.tensor([[-1, 1, 1, -1, -2, 2, -2, 0, 3, -3]])
    q, k, v = (torch.randn(1, 1, 10, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out, lse = triangle_attention(q, k, v, numbers, sink=0, window=50, last=0)
    row = numbers[0].abs()
    mask = torch.ones(10, 10, dtype=torch.bool).tril() & (row[:, None] == row) & (numbers > 0)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~mask, float("-inf"))
    want = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(out, want)
    assert lse.isinf()[0, 0].tolist() == (~mask.any(1)).tolist()
    assert (~mask.any(1)).tolist() == [True, False, False, False, True, False, False, True, False, False]
    grad = torch.randn_like(out)
    safe = scores.masked_fill(~mask.any(1)[:, None], 0.0)
    want = (torch.softmax(safe, -1) * mask.any(1)[:, None]) @ v
    for mine, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
