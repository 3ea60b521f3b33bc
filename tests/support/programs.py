"""Exported programs of a stack of layers, and what is asked of a rewritten one."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from tests.support.layers import CONFIG, Stack, qkv
from tests.support.oracle import oracle

LOW, HIGH = CONFIG.min_seq_len + 1, 256
LENGTHS = (LOW, 128, 159, HIGH)
X = (2, 2, 150, 16)


def with_padding(x, valid):
    position = torch.arange(x.shape[2], device=x.device)
    mask = (position[:, None] >= position).to(torch.bool) & valid[:, None, None, :]
    return F.scaled_dot_product_attention(*qkv(x), attn_mask=mask)


def projected(x):
    """As models do it: (B, N, H, D) in memory, and heads merged again by a view of attention's result."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(x))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    batch, heads, length, dim = out.shape
    merged = out.transpose(1, 2).contiguous().view(batch, length, heads * dim)
    return merged.unflatten(-1, (heads, dim)).transpose(1, 2)


def export(model, *args, low=LOW, high=HIGH, **settings):
    """A program with a dynamic length; args are (B, H, N, D) tensors and (B, N) masks."""
    length = Dim("n", min=low, max=high)
    shapes = tuple({2: length} if x.dim() == 4 else {1: length} for x in args)
    if isinstance(model, Stack):
        shapes = (shapes[0], shapes[1:]) if shapes[1:] else shapes
    return torch.export.export(model, args, dynamic_shapes=shapes, **settings)


def valid_keys(length):
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, :17] = False
    return valid


def padded_oracle(x, valid):
    """``Stack(with_padding)`` in float64; rows of padding are never looked at."""
    x = x.double()
    for index in range(2):
        geometry = CONFIG.geometry.counts if index in CONFIG.layers() else (0, 0, 2**31 - 1)
        x = x + oracle(*qkv(x), valid, *geometry, x.shape[-1] ** -0.5)[0]
    return x


def close(got, want):
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)


def names(graph, op):
    return [node.name for node in graph.nodes if node.op == op]


def outputs(graph):
    return [node.name for node in graph.output_node().all_input_nodes]


def only_operators(gm):
    return all(
        isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))
        or getattr(node.target, "__module__", "") in ("_operator", "math", "torch")  # arithmetic of lengths
        for node in gm.graph.nodes
        if node.op == "call_function"
    ) and not any(node.op == "call_method" for node in gm.graph.nodes)


class Attend(nn.Module):
    def forward(self, x):
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Attend()])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))
