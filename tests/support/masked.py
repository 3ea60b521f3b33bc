"""One layer of attention under any mask, its numbers under that mask and the triangle, and the check of a backend."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.layers import OneLayer
from tests.support.oracle import rule
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.operator import OPERATOR

B, H, KV, N, D = 2, 4, 2, 120, 8
SINK, WINDOW, LAST = 3, 7, 5
CONFIG = TriangleMixConfig(
    num_sink_tokens=SINK,
    sliding_window_size=WINDOW,
    num_last_tokens=LAST,
    triangle_layer_indices=[0],
    min_seq_len=50,
)
INF = float("-inf")


class Layer(nn.Module):
    def __init__(self, mask_of):
        super().__init__()
        self.mask_of = mask_of

    def forward(self, q, k, v, *rest):
        if q.shape[2] == k.shape[2]:  # one symbol for both lengths
            q = q + 0 * k[:, :1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_of(q, k, *rest), enable_gqa=True)


def model_with(mask_of):
    """The layer alone."""
    return OneLayer(Layer(mask_of))


def tensors(kv_len=N, batch=B):
    return torch.randn(batch, H, N, D), torch.randn(batch, KV, kv_len, D), torch.randn(batch, KV, kv_len, D)


def expected(q, k, v, mask, first=None, document=None):
    """Attention in float64 under ``mask`` (bool, or added) and-ed with the triangle.

    ``first`` is the position of row 0, ``document`` (B, Skv) the number of each key's document.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    first = kv_len - q_len if first is None else first
    seen = mask if mask.dtype == torch.bool else mask > -9000
    seen = seen.expand(q.shape[0], 1, q_len, kv_len)[:, 0]
    document = torch.zeros(q.shape[0], kv_len) if document is None else document
    allowed = torch.zeros_like(seen)
    for b in range(q.shape[0]):
        valid = seen[b].any(0)
        for i in range(q_len):
            mine = valid & (document[b] == document[b, first + i])
            if mine.any():
                start, end = mine.nonzero()[0], mine.nonzero()[-1] + 1
                allowed[b, i] = (
                    rule(first + i, torch.arange(kv_len), start, end, *CONFIG.geometry.counts) & mine & seen[b, i]
                )
    k, v = (x.double().repeat_interleave(H // KV, 1) for x in (k, v))
    scores = (q.double() @ k.transpose(2, 3) * D**-0.5).masked_fill(~allowed[:, None], INF)
    alive = allowed.any(-1)[:, None, :, None]
    return torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive @ v


def check(mask_of, args, *rest, eager, first=None, document=None, lowering="operator", dynamic=False, **options):
    """The compiled model's numbers; returns the operator's node."""
    backend = tmx_backend(CONFIG, lowering=lowering, strict=True, **options)
    if dynamic:
        for x in (*args, *rest):
            if x.dim():
                torch._dynamo.mark_dynamic(x, 2 if x.dim() == 4 and x.shape[-1] == D else x.dim() - 1)
    before = len(eager)
    got = torch.compile(model_with(mask_of), backend=backend)(*args, *rest)
    want = expected(*args, mask_of(*args[:2], *rest), first, document)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
    (site,) = backend.report
    assert site.decision == "triangle"
    sizes = {args[0].shape[2], args[1].shape[2]}
    # The form for long prompts, before or after the one for short ones.
    sparse = [gm.graph for gm in eager[before:] if gm.graph.find_nodes(op="call_function", target=OPERATOR)]
    nodes = [node for graph in sparse for node in graph.find_nodes(op="call_function", target=OPERATOR)]
    if not options and lowering == "operator":
        (graph,) = sparse
        for node in graph.nodes:
            value = node.meta.get("example_value")
            if torch.is_tensor(value) and value.dim() >= 2:
                assert sum(int(size) in sizes for size in value.shape) < 2, f"{node} {value.shape} is N x N"
    return nodes


def rows(q, first=0):
    return (torch.arange(q.shape[2]) + first)[:, None]


def keys(k):
    return torch.arange(k.shape[2])[None, :]


def causal(q, k):
    return keys(k) <= rows(q, k.shape[2] - q.shape[2])


def numbers():
    """Three documents in one sequence, two in the other; of very different lengths."""
    document = torch.zeros(B, N, dtype=torch.long)
    document[0, 50:], document[0, 53:] = 1, 2
    document[1, 7:] = 5
    return document
