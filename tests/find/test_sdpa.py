"""Finding SDPA: what a site is said to be, keys seen through their repetition, and repetitions in another order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.graphs import found_in
from tests.support.layers import OneLayer
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend
from tmx_compile.find import find_attention
from tmx_compile.find.repeat import unrepeated
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.nodes import tensor_of
from tmx_compile.operator import OPERATOR
from tmx_compile.report import Reason, Rejected
from tmx_compile.testing import captured_graphs

sdpa = F.scaled_dot_product_attention
B, H, KV, N, D, R = 2, 6, 2, 40, 8, 3
CONFIG = TriangleMixConfig(
    num_sink_tokens=3, sliding_window_size=5, num_last_tokens=4, triangle_layer_indices=[0], min_seq_len=0
)


def tensors(kv_heads=KV, v_heads=None):
    return [torch.randn(B, heads, N, D) for heads in (H, kv_heads, v_heads or kv_heads)]


def rewritten(call, args, graphs):
    """The result of the rewritten call, and the shape of the keys that the operator reads."""
    backend = tmx_backend(CONFIG, lowering="operator", strict=True)
    out = torch.compile(OneLayer(call), backend=backend)(*args)
    (node,) = [node for node in graphs[-1].graph.nodes if node.target is OPERATOR]
    return out, tuple(tensor_of(node.args[1]).shape)


def widened(x, order=2):
    """(B, KV, N, D) -> (B, KV, R, N, D), or (B, R, KV, N, D) for order 1."""
    return x.unsqueeze(order).expand(*(R if d == order else -1 for d in range(5)))


def hugging_face(x):
    batch, heads, length, dim = x.shape
    wide = x[:, :, None, :, :].expand(batch, heads, R, length, dim)
    return wide.reshape(batch, heads * R, length, dim)


SEEN_THROUGH = {
    "repeat_kv": hugging_face,
    "getitem and flatten": lambda x: x[:, :, None].expand(-1, -1, R, -1, -1).flatten(1, 2),
    "getitem with an ellipsis": lambda x: x[:, :, None, ...].expand(-1, -1, R, -1, -1).flatten(1, 2),
    "unsqueeze and reshape": lambda x: widened(x).reshape(x.shape[0], H, x.shape[2], D),
    "unsqueeze and reshape with -1": lambda x: widened(x).reshape(x.shape[0], -1, x.shape[2], D),
    "unsqueeze(-3) and flatten": lambda x: x.unsqueeze(-3).expand(-1, -1, R, -1, -1).flatten(1, 2),
    "contiguous and view": lambda x: widened(x).contiguous().view(x.shape[0], H, x.shape[2], D),
    "functions of torch": lambda x: torch.flatten(
        torch.broadcast_to(torch.unsqueeze(x, dim=2), (B, KV, R, x.shape[2], D)), 1, 2
    ),
    "repeat_interleave": lambda x: x.repeat_interleave(R, 1),
    "repeat_interleave with dim=": lambda x: torch.repeat_interleave(x, R, dim=1),
    "repeat_interleave from the right": lambda x: x.repeat_interleave(R, dim=-3),
}

# The heads come in another order, or the repetition is written in a way that is not understood.
NOT_SEEN_THROUGH = {
    "tiled": lambda x: x.repeat(1, R, 1, 1),
    "tiled by cat": lambda x: torch.cat([x] * R, 1),
    "unsqueeze(1)": lambda x: widened(x, order=1).reshape(x.shape[0], H, x.shape[2], D),
    "None at 1": lambda x: x[:, None].expand(-1, R, -1, -1, -1).flatten(1, 2),
    "heads swapped by the index": lambda x: x[:, [1, 0], None].expand(-1, -1, R, -1, -1).flatten(1, 2),
    "transposed after expand": lambda x: widened(x).transpose(1, 2).reshape(x.shape[0], H, x.shape[2], D),
    "another tensor's shape": lambda x: (widened(x) * 1).flatten(1, 2),
    "reversed heads": lambda x: widened(x.flip(1)).flatten(1, 2).flip(1),
    "repeat_interleave by a tensor": lambda x: x.repeat_interleave(torch.tensor([2, 4]), 1, output_size=H),
}


def check_numbers(repeat_key, repeat_value, args, graphs, mark=False):
    """The tensors go in as one, so that their lengths are one symbol; returns the shape of the operator's keys."""
    packed, sizes = torch.cat(args, 1), [x.shape[1] for x in args]
    if mark:
        torch._dynamo.mark_dynamic(packed, 2)

    def call(packed):
        q, k, v = packed.split(sizes, 1)
        return sdpa(q, repeat_key(k), repeat_value(v), is_causal=True)

    out, keys = rewritten(call, (packed,), graphs)
    q, k, v = args
    want, _ = oracle(q, repeat_key(k), repeat_value(v), None, *CONFIG.geometry.counts, D**-0.5)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert isinstance(keys[2], torch.SymInt) == mark
    return keys


@pytest.mark.parametrize("mark", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SEEN_THROUGH)
def test_repeated_keys_are_seen_through(name, mark, eager):
    keys = check_numbers(SEEN_THROUGH[name], SEEN_THROUGH[name], tensors(), eager, mark)
    assert keys[:2] == (B, KV)
    # Nothing repeats them any more.
    assert not any(tensor_of(node) is not None and tensor_of(node).dim() == 5 for node in eager[-1].graph.nodes), (
        "the repetition is dead code"
    )


@pytest.mark.parametrize("mark", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", NOT_SEEN_THROUGH)
def test_another_order_of_heads_is_kept(name, mark, eager):
    keys = check_numbers(NOT_SEEN_THROUGH[name], NOT_SEEN_THROUGH[name], tensors(), eager, mark)
    assert keys[:2] == (B, H)


@pytest.mark.parametrize(
    ("key", "value"),
    [("repeat_kv", "tiled"), ("tiled", "repeat_kv"), ("unsqueeze(1)", "repeat_interleave")],
)
def test_key_and_value_repeated_in_different_ways(key, value, eager):
    ways = SEEN_THROUGH | NOT_SEEN_THROUGH
    assert check_numbers(ways[key], ways[value], tensors(), eager)[:2] == (B, H)


def test_key_and_value_repeated_in_two_ways_of_one_order(eager):
    ways = SEEN_THROUGH["repeat_kv"], SEEN_THROUGH["repeat_interleave"]
    assert check_numbers(*ways, tensors(), eager)[:2] == (B, KV)


def test_key_and_value_repeated_by_different_factors(eager):
    """Two key heads three times, three value heads twice: both must stay repeated."""
    three, two = (lambda x: x.repeat_interleave(3, 1)), (lambda x: x.repeat_interleave(2, 1))
    keys = check_numbers(three, two, tensors(2, 3), eager)
    assert keys[:2] == (B, H)


def test_key_repeated_and_value_not(eager):
    assert check_numbers(SEEN_THROUGH["repeat_kv"], lambda x: x, tensors(KV, H), eager)[:2] == (B, H)


def test_repetition_along_other_axes_is_no_repetition_of_heads():
    x = torch.randn(B, KV, N, D)
    for repeat in (
        lambda x: x.repeat_interleave(R, 2),
        lambda x: x.repeat_interleave(R, 0),
        lambda x: x.unsqueeze(3).expand(-1, -1, -1, R, -1).reshape(B, KV, N * R, D),
        lambda x: x.unsqueeze(2).expand(-1, -1, R, -1, -1).reshape(B, KV, N * R, D),
        lambda x: x.repeat_interleave(R),
    ):
        torch._dynamo.reset()
        (gm,) = captured_graphs(repeat, x)
        node = gm.graph.output_node().args[0][0]
        assert unrepeated(node) == (node, 1)


# Arguments ----------------------------------------------------------------------------------------------------------


def mask_of(q):
    return torch.ones(N, N, dtype=torch.bool).tril()


WRITTEN = {
    "positions": lambda q, k, v: sdpa(q, k, v, None, 0.0, True, scale=None, enable_gqa=True),
    "keywords": lambda q, k, v: sdpa(query=q, key=k, value=v, is_causal=True, enable_gqa=True),
    "keywords in another order": lambda q, k, v: sdpa(
        enable_gqa=True, is_causal=True, dropout_p=0, value=v, key=k, query=q
    ),
    "a mask by position": lambda q, k, v: sdpa(q, k, v, mask_of(q), enable_gqa=True),
    "a mask by keyword": lambda q, k, v: sdpa(q, k, v, attn_mask=mask_of(q), is_causal=False, enable_gqa=True),
    "the builtin": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_arguments_by_position_and_by_keyword(name, eager):
    q, k, v = tensors()
    site = found_in(WRITTEN[name], q, k, v, dynamic=None)
    assert isinstance(site, AttentionSite), site
    assert [tuple(site.fake(x).shape) for x in ("query", "key", "value")] == [tuple(x.shape) for x in (q, k, v)]
    assert [x.node.name for x in (site.query, site.key, site.value)] == ["l_q_", "l_k_", "l_v_"]
    assert (bool(site.masks), site.is_causal) == (("mask" in name), ("mask" not in name))
    assert site.scale == pytest.approx(D**-0.5)
    torch._dynamo.reset()
    out, keys = rewritten(WRITTEN[name], (q, k, v), eager)
    assert keys == (B, KV, N, D)
    want, _ = oracle(q, k, v, None, *CONFIG.geometry.counts, D**-0.5)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)


class Attention(nn.Module):
    """Self-attention whose heads are constants: nothing but batch and length can be dynamic."""

    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.scaling = scale
        self.projections = nn.ModuleDict({name: nn.Linear(16, h * D) for name, h in (("q", H), ("k", KV), ("v", KV))})

    def heads(self, x):
        return [p(x).unflatten(-1, (-1, D)).transpose(1, 2) for p in self.projections.values()]

    def forward(self, x):
        q, k, v = self.heads(x)
        return sdpa(q, k, v, is_causal=True, scale=self.scaling, enable_gqa=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3, 1.0, 2, -0.5])
def test_the_scale(scale, dynamic, eager):
    """dynamic=True makes a float attribute a symbol: it is read, with a guard, or another value would be wrong."""
    attention, x = Attention(scale), torch.randn(B, N, 16)
    site = found_in(attention, x, dynamic=dynamic)
    assert isinstance(site, AttentionSite), site
    assert site.scale == pytest.approx(D**-0.5 if scale is None else scale)
    assert isinstance(site.scale, float)
    torch._dynamo.reset()
    model = OneLayer(None)
    model.layers[0] = attention
    compiled = torch.compile(model, backend=tmx_backend(CONFIG, lowering="operator", strict=True), dynamic=dynamic)
    for again in (scale, 0.7):
        attention.scaling = again
        want, _ = oracle(*attention.heads(x), None, *CONFIG.geometry.counts, D**-0.5 if again is None else again)
        torch.testing.assert_close(compiled(x).double(), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v: sdpa(q, k, v, is_causal=True, dropout_p=0.5, enable_gqa=True), Reason.DROPOUT),
        (lambda q, k, v: sdpa(q[0], q[0], q[0], is_causal=True), Reason.LAYOUT),
        (lambda q, k, v: sdpa(q, k[:1], v[:1], is_causal=True, enable_gqa=True), Reason.LAYOUT),
        (lambda q, k, v: sdpa(q[..., :0], q[..., :0], q, is_causal=True), Reason.SCALE),
    ],
)
def test_what_makes_no_site(call, reason):
    answer = found_in(call, *tensors(), dynamic=None)
    assert isinstance(answer, Rejected)
    assert answer.reason is reason
    assert answer.node is not None


def test_sites_come_in_the_order_of_the_graph():
    def call(q, k, v):
        first = sdpa(q, k, v, is_causal=True, enable_gqa=True, scale=0.1)
        second = sdpa(first[0], first[0], first[0])
        return sdpa(second[None], k[:1], v[:1], is_causal=True, enable_gqa=True, scale=0.3)

    (gm,) = captured_graphs(call, *tensors())
    first, second, third = find_attention(gm)
    assert isinstance(second, Rejected)
    assert (first.scale, third.scale) == (0.1, 0.3)
