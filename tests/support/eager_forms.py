"""Attention written out, in every way that is found and computed: each form in ``FORMS`` with the heads of its keys."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from tests.support.layers import OneLayer
from tmx_compile import TriangleMixConfig

B, H, KV, N, D = 2, 6, 2, 40, 8
R = H // KV
SCALE = D**-0.5
CONFIG = TriangleMixConfig(
    num_sink_tokens=3, sliding_window_size=5, num_last_tokens=4, triangle_layer_indices=[0], min_seq_len=0
)
INF = float("inf")


def tensors(kv_heads=H, v_dim=D, dtype=torch.float32):
    shapes = (H, N, D), (kv_heads, N, D), (kv_heads, N, v_dim)
    return [torch.randn(B, *shape, dtype=dtype) for shape in shapes]


def causal(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


def additive(q, dtype=None):
    low = torch.finfo(dtype or q.dtype).min
    return torch.where(causal(q), 0.0, low)[None, None].to(dtype or q.dtype)


def positions(q):
    i = torch.arange(q.shape[2])
    return i[None, :] <= i[:, None]


def repeat_kv(x, r=R):
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, r, n, d).reshape(b, h * r, n, d)


def hugging_face(q, k, v):
    k, v = repeat_kv(k), repeat_kv(v)
    weights = torch.matmul(q, k.transpose(2, 3)) * SCALE
    weights = weights + additive(q)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.1, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous().transpose(1, 2)


def with_scores(scores, weigh=None):
    """A form that differs in its scores, given the (unscaled) product's operands."""

    def call(q, k, v):
        weights = scores(q, k).softmax(-1)
        return (weights if weigh is None else weigh(weights, q)) @ v

    return call


def masked(scores, q):
    return scores.masked_fill(~causal(q), -INF)


def merged(x):
    """(B, H, N, D) -> (B * H, N, D)."""
    return x.reshape(-1, *x.shape[2:])


def batched(q, k, v):
    scores = torch.bmm(merged(q), merged(k).transpose(1, 2)) * SCALE
    scores = scores + additive(q)[0]
    out = torch.bmm(scores.softmax(-1), merged(v))
    return out.view(B, H, -1, D)


def bloom(q, k, v):
    empty = torch.empty(B * H, N, N)
    scores = torch.baddbmm(empty, merged(q), merged(k).transpose(1, 2), beta=0, alpha=SCALE).view(B, H, N, N)
    weights = F.softmax(scores + additive(q), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, N, N), merged(v)).view(B, H, N, D)


def baddbmm_with_a_mask(q, k, v):
    scores = torch.baddbmm(additive(q)[0], merged(q), merged(k).mT, alpha=SCALE)
    return torch.bmm(F.softmax(scores, 2), merged(v)).unflatten(0, (B, H))


def grouped(q, k, v):
    """GQA by a view: five dimensions, the keys broadcast over the group."""
    scores = q.view(B, -1, R, N, D) @ k.unsqueeze(2).transpose(-1, -2) * SCALE
    weights = (scores + additive(q)[:, :, None]).softmax(-1)
    return (weights @ v[:, :, None]).flatten(1, 2)


def grouped_einsum(q, k, v):
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.unflatten(1, (KV, R)), k) / math.sqrt(D)
    weights = torch.where(causal(q), scores, -1e9).softmax(-1)
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).reshape(q.shape)


def group_first_einsum(q, k, v):
    """The group before the heads, as einops users write it."""
    scores = torch.einsum("bghqd,bhkd->bghqk", q.unflatten(1, (KV, R)).transpose(1, 2), k) * SCALE
    weights = masked(scores, q).softmax(-1)
    return torch.einsum("bghqk,bhkd->bghqd", weights, v).transpose(1, 2).reshape(B, H, N, D)


def tokens_first(q, k, v):
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
    weights = scores.masked_fill(torch.triu(torch.ones(N, N), 1) == 1, -INF).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def keys_repeated_tokens_first(q, k, v):
    """(B, N, H, D) with the keys repeated in that layout."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    k, v = (x[:, :, :, None, :].expand(B, N, KV, R, D).reshape(B, N, H, D) for x in (k, v))
    weights = masked(torch.einsum("b i h d, b j h d -> b h i j", q, k) * SCALE, q.transpose(1, 2)).softmax(-1)
    return torch.einsum("b h i j, b j h d -> b h i d", weights, v)


def einsum_the_other_way_round(q, k, v):
    scores = torch.einsum("...kd,...qd->...qk", k, q) * SCALE
    return torch.einsum("...kd,...qk->...qd", v, masked(scores, q).softmax(-1))


def in_place(q, k, v):
    """Falcon."""
    scores = q @ k.transpose(-1, -2)
    scores /= math.sqrt(D)
    weights = F.softmax(scores + additive(q), dim=-1, dtype=q.dtype)
    return (weights @ v).view(q.shape)


def written_as_statements(q, k, v):
    scores = q @ k.mT
    scores.mul_(SCALE)
    scores.masked_fill_(~causal(q), -INF)
    return F.softmax(scores, -1) @ v


def minimal(q, k, v):
    """GPT-2 of old: a buffer's slice chooses between the scores and the lowest number, then padding is added."""
    scores = q @ k.transpose(-1, -2)
    scores = scores / torch.full([], D**0.5, dtype=scores.dtype)
    low = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    scores = torch.where(causal(q)[None, None, :, :], scores, low) + torch.zeros(B, 1, 1, N)
    return F.dropout(F.softmax(scores, dim=-1).type(v.dtype), 0.0, True) @ v


class Modules(nn.Module):
    def __init__(self):
        super().__init__()
        self.softmax, self.dropout = nn.Softmax(dim=-1), nn.Dropout(0.2)
        self.register_buffer("norm", torch.tensor(SCALE))

    def forward(self, q, k, v):
        scores = torch.matmul(q, k.transpose(-2, -1)) * self.norm
        return torch.matmul(self.dropout(self.softmax(masked(scores, q))), v)


def shifted(q, k, v):
    scores = masked(q @ k.mT * SCALE, q)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    scores = scores - scores.amax(-1, keepdim=True).detach()
    return torch.softmax(scores, -1) @ v


def gpt_j(q, k, v):
    scores = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / math.sqrt(D)
    weights = F.softmax(scores + additive(q, torch.float32), dim=-1).to(v.dtype)
    return torch.matmul(weights, v)


FORMS = {
    "torch.matmul, add": (lambda q, k, v: F.softmax(q @ k.transpose(2, 3) * SCALE + additive(q), -1) @ v, H),
    "mask first, broadcast": (with_scores(lambda q, k: additive(q)[0, 0] + SCALE * (q @ k.mT)), H),
    "masked_fill": (with_scores(lambda q, k: masked(q @ k.mT * SCALE, q)), H),
    "masked_fill by comparison": (
        with_scores(lambda q, k: (q @ k.mT * SCALE).masked_fill(positions(q) == 0, -1e9)),
        H,
    ),
    "masked_fill of another kind": (
        with_scores(lambda q, k: torch.masked_fill(q @ k.mT / D**0.5, mask=torch.logical_not(causal(q)), value=-1e4)),
        H,
    ),
    "where": (with_scores(lambda q, k: torch.where(causal(q), q @ k.mT * SCALE, -INF)), H),
    "where, inverted": (with_scores(lambda q, k: torch.where(~positions(q), -INF, q @ k.mT * SCALE)), H),
    "where as a method": (
        with_scores(lambda q, k: (q @ k.mT * SCALE).where(causal(q), torch.tensor(-1e30))),
        H,
    ),
    "where with a whole tensor": (
        with_scores(lambda q, k: torch.where(causal(q), s := q @ k.mT * SCALE, torch.full_like(s, -INF))),
        H,
    ),
    "ones_like the scores": (
        with_scores(lambda q, k: (s := q @ k.mT * SCALE).masked_fill(torch.ones_like(s).triu(1).bool(), -INF)),
        H,
    ),
    "sizes of the scores": (
        with_scores(lambda q, k: (s := q @ k.mT * SCALE) + additive(q)[:, :, : s.size(-2), : s.shape[-1]]),
        H,
    ),
    "scaled after the mask": (with_scores(lambda q, k: (q @ k.mT + torch.where(causal(q), 0.0, -1e30)) * SCALE), H),
    "filled, then scaled": (with_scores(lambda q, k: torch.where(causal(q), q @ k.mT, -1e9) / math.sqrt(D)), H),
    "several masks": (
        with_scores(lambda q, k: masked(torch.where(positions(q), q @ k.mT * SCALE, -1e9) + additive(q), q)),
        H,
    ),
    "scaled by q": (with_scores(lambda q, k: masked((q * SCALE) @ k.mT, q)), H),
    "scaled by k": (with_scores(lambda q, k: masked(q @ (k / math.sqrt(D)).transpose(-1, -2), q)), H),
    "scaled by both": (with_scores(lambda q, k: masked((D**-0.25 * q) @ (k.mT * D**-0.25), q)), H),
    "scaled thrice": (with_scores(lambda q, k: masked(-((q / 2) @ (k * -SCALE).mT) * 2.0, q)), H),
    "scaled by the root of a tensor": (
        with_scores(lambda q, k: masked(q @ k.mT / torch.sqrt(torch.tensor(D, dtype=torch.float32)), q)),
        H,
    ),
    "contiguous": (
        with_scores(lambda q, k: masked((q.contiguous() @ k.mT.contiguous() * SCALE).clone(), q)),
        H,
    ),
    "cast and back": (
        with_scores(lambda q, k: masked(q @ k.mT * SCALE, q).double(), lambda w, q: w.type_as(q).contiguous()),
        H,
    ),
    "cut to what it is": (with_scores(lambda q, k: masked((q @ k.mT)[:, :, :N, :N] * SCALE, q[..., :D])), H),
    "subtracted maximum": (shifted, H),
    "modules and a buffer": (Modules().eval(), H),
    "where, then add": (minimal, H),
    "hugging face": (hugging_face, KV),
    "repeat_interleave": (
        lambda q, k, v: (
            hugging_face(q, k.repeat_interleave(R, 1), v.repeat_interleave(R, dim=1))
            if False
            else masked(q @ k.repeat_interleave(R, 1).mT * SCALE, q).softmax(-1) @ v.repeat_interleave(R, dim=1)
        ),
        KV,
    ),
    "one key head by broadcast": (with_scores(lambda q, k: masked(q @ k.mT * SCALE, q)), 1),
    "one key head by expand": (
        lambda q, k, v: masked(q @ k.expand(B, H, N, D).mT * SCALE, q).softmax(-1) @ v.expand(-1, H, -1, -1),
        1,
    ),
    "grouped by a view": (grouped, KV),
    "grouped by einsum": (grouped_einsum, KV),
    "group first": (group_first_einsum, KV),
    "bmm": (batched, H),
    "baddbmm": (bloom, H),
    "baddbmm with a mask": (baddbmm_with_a_mask, H),
    "einsum, tokens first": (tokens_first, H),
    "einsum, keys repeated": (keys_repeated_tokens_first, KV),
    "einsum, the other way round": (einsum_the_other_way_round, H),
    "in place": (in_place, H),
    "in place as statements": (written_as_statements, H),
}


def exported(call, args, decompose=False):
    """An exported program's graph and all of its inputs."""
    program = torch.export.export(OneLayer(call), tuple(args))
    program = program.run_decompositions() if decompose else program
    held, given = dict(program.state_dict) | dict(program.constants), iter(args)
    inputs = [held[s.target] if s.target else next(given) for s in program.graph_signature.input_specs]
    return program.graph_module, inputs


AOT = {
    "export": exported,
    "decomposed": lambda call, args: exported(call, args, decompose=True),
    "make_fx": lambda call, args: (make_fx(call, tracing_mode="fake")(*args), args),
}
