"""Written-out attention drawn at random: composed of every option, and changed a little so that it means another thing.

A geometry whose last rows are all rows makes the triangle the causal mask, so that the compiled function must equal the
function itself: a site that was understood wrongly shows in its numbers, whatever it was.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.graphs import squares
from tests.support.layers import OneLayer
from tests.support.oracle import oracle
from tmx_compile import TriangleMixConfig, tmx_backend

B, N, D = 2, 24, 8
INF = float("inf")
TRIANGLE = TriangleMixConfig(
    num_sink_tokens=2, sliding_window_size=3, num_last_tokens=2, triangle_layer_indices=[0], min_seq_len=0
)
EVERYTHING = TRIANGLE.replace(num_last_tokens=2 * N)

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "einsum, tokens first", "grouped", "grouped einsum")
SCALES = ("none", "mul", "div", "q", "k", "both", "tensor", "in place")
MASKS = ("add", "add -1e9", "where", "where inverted", "masked_fill", "masked_fill inverted", "statement", "twice")
CASTS = ("none", "double", "softmax dtype", "type_as")
REPEATS = ("none", "expand", "repeat_interleave", "broadcast")
MUTATIONS = (
    "mask after softmax",
    "wrong axis",
    "dropout",
    "tanh",
    "transposed value",
    "transposed query",
    "missing scale",
    "scale after softmax",
    "normalised twice",
    "mask negated",
    "mask shifted",
    "mask scaled",
    "bias",
    "square",
    "sink",
    "value from the scores",
    "wrong reshape",
    "query written",
)


@dataclass(frozen=True)
class Program:
    """One way of writing attention, with at most one mutation."""

    product: str
    scale: str
    mask_first: bool
    mask: str
    cast: str
    repeat: str
    softmax: str
    copies: bool
    shift: bool
    factor: float
    kv_heads: int
    group: int
    mutation: str = ""

    @property
    def heads(self):
        return self.kv_heads * self.group

    def tensors(self):
        return [torch.randn(B, heads, N, D) for heads in (self.heads, self.kv_heads, self.kv_heads)]

    # The steps --------------------------------------------------------------------------------------------------------

    def repeated(self, x):
        if self.product.startswith("grouped") or (self.repeat == "broadcast" and self.kv_heads == 1):
            return x
        if self.repeat == "repeat_interleave":
            return x.repeat_interleave(self.group, 1)
        return x[:, :, None].expand(-1, -1, self.group, -1, -1).reshape(B, self.heads, N, x.shape[3])

    def scores(self, q, k, bias):
        if self.product == "matmul":
            return q @ k.transpose(-1, -2)
        if self.product in ("bmm", "baddbmm"):
            k = k.expand(B, self.heads, N, D)
            a, b = q.reshape(-1, N, D), k.reshape(-1, N, D).transpose(1, 2)
            if self.product == "bmm":
                return torch.bmm(a, b).view(B, self.heads, N, N)
            return torch.baddbmm(torch.empty(1, N, N), a, b, beta=0, alpha=bias).view(B, self.heads, N, N)
        if self.product == "einsum":
            return torch.einsum("bhid,bhjd->bhij", q, k)
        if self.product == "einsum, tokens first":
            return torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))
        q = q.view(B, self.kv_heads, self.group, N, D)
        if self.product == "grouped":
            return q @ k.unsqueeze(2).mT
        return torch.einsum("bhgqd,bhkd->bhgqk", q, k)

    def result(self, weights, v):
        if self.product in ("bmm", "baddbmm"):
            v = v.expand(B, self.heads, N, v.shape[3])
            return torch.bmm(weights.reshape(-1, N, N), v.reshape(-1, N, v.shape[3])).view(B, self.heads, N, -1)
        if self.product == "einsum":
            return torch.einsum("bhij,bhjd->bihd", weights, v).transpose(1, 2)
        if self.product == "grouped":
            return (weights @ v[:, :, None]).flatten(1, 2)
        if self.product == "grouped einsum":
            return torch.einsum("bhgqk,bhkd->bhgqd", weights, v).reshape(B, self.heads, N, -1)
        return weights @ v

    def masked(self, s):
        mask = torch.ones(N, N, dtype=torch.bool).tril(1 if self.mutation == "mask shifted" else 0)
        low = 0.0 if self.mutation == "mask scaled" else -INF
        if self.mutation == "mask negated":
            mask = ~mask
        match self.mask:
            case "add":
                return s + torch.where(mask, 0.0, torch.finfo(torch.float32).min if low else 0.5)
            case "add -1e9":
                return torch.where(mask, 0.0, -1e9 if low else -1.0) + s
            case "where":
                return torch.where(mask, s, low)
            case "where inverted":
                return torch.where(~mask, torch.full((), low or -50.0), s)
            case "masked_fill":
                return s.masked_fill(mask == 0, low)
            case "masked_fill inverted":
                return s.masked_fill(torch.logical_not(mask), low or -3.0)
            case "statement":
                s = s.clone()
                s.masked_fill_(~mask, low)
                return s
            case _:
                return torch.where(mask, s, -1e9 if low else -10.0).masked_fill(~mask, -1e9 if low else -10.0)

    def scaled(self, s):
        match self.scale:
            case "mul":
                return self.factor * s
            case "div":
                return s / (1 / self.factor)
            case "tensor":
                return s * torch.full([], self.factor, dtype=s.dtype)
            case "in place":
                s = s * 1.0
                s *= self.factor
                return s
        return s

    def __call__(self, q, k, v):
        mutation = self.mutation
        before, factor = q, self.factor
        if mutation == "missing scale":
            factor = 1.0
        if mutation == "transposed query":
            q = q.reshape(B, N, self.heads, D).transpose(1, 2)
        if mutation == "transposed value":
            v = v[:, :, :D].mT.repeat(1, 1, N // D, 1)
        if mutation == "wrong reshape":
            k = k.transpose(1, 2).reshape(k.shape)
        if mutation == "query written":
            q = q.clone()
            q[:, :, 0] = 1.0
            q.mul_(0.5)
        k, v = self.repeated(k), self.repeated(v)
        q = q * factor if self.scale == "q" else q * factor**0.5 if self.scale == "both" else q
        k = k * factor if self.scale == "k" else k / factor**-0.5 if self.scale == "both" else k
        if self.copies:
            q, k = q.contiguous(), k.clone()
        alpha = factor if self.scale == "mul" and self.product == "baddbmm" else 1.0
        s = self.scores(q, k, alpha)
        program = replace(self, scale="none") if alpha != 1.0 or mutation == "missing scale" else self
        s = s.double() if self.cast == "double" else s
        if mutation == "tanh":
            s = torch.tanh(s)
        if mutation == "square":
            s = s * s
        if mutation == "bias":
            s = s + torch.linspace(0, 1, N)
        if mutation == "mask after softmax":
            s = program.scaled(s)
        else:
            s = program.scaled(program.masked(s)) if self.mask_first else program.masked(program.scaled(s))
        if self.shift:
            s = s - s.amax(-1, keepdim=True)
        if mutation == "sink":
            s = torch.cat([s, torch.zeros(*s.shape[:-1], 1, dtype=s.dtype)], -1)
        axis = -2 if mutation == "wrong axis" else -1
        if self.softmax == "module":
            w = torch.nn.Softmax(axis)(s)
        elif self.cast == "softmax dtype":
            w = F.softmax(s, dim=axis, dtype=torch.float64)
        else:
            w = torch.softmax(s, axis) if self.softmax == "function" else s.softmax(axis)
        if mutation == "sink":
            w = w[..., :-1]
        w = w.type_as(v) if self.cast == "type_as" else w.to(v.dtype)
        if mutation == "normalised twice":
            w = w / (w.sum(-1, keepdim=True) + 0.5)
        if mutation == "scale after softmax":
            w = w * 0.5
        if mutation == "mask after softmax":
            w = w * torch.ones(N, N).tril()
        if mutation == "dropout":
            w = F.dropout(w, 0.25)
        w = F.dropout(w, 0.5, training=False)
        if mutation == "value from the scores":
            return self.result(w, v) + s.sum() * 0.01 + before.sum() * 0
        return self.result(w, v)


@st.composite
def programs(draw, mutations=("",)):
    product = draw(st.sampled_from(PRODUCTS))
    repeat = draw(st.sampled_from(REPEATS))
    return Program(
        product=product,
        scale=draw(st.sampled_from(SCALES)),
        mask_first=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        cast=draw(st.sampled_from(CASTS)),
        repeat=repeat,
        softmax=draw(st.sampled_from(("module", "function", "method"))),
        copies=draw(st.booleans()),
        shift=draw(st.booleans()),
        factor=draw(st.sampled_from((D**-0.5, 0.7, 2.0))),
        kv_heads=draw(st.sampled_from((1, 2))),
        group=1 if repeat == "none" else draw(st.sampled_from((1, 3))),
        mutation=draw(st.sampled_from(mutations)),
    )


QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# These are no attention, or not causal, or more than attention: no site may come of them.
NEVER = frozenset(MUTATIONS) - {"transposed value", "transposed query", "missing scale", "wrong reshape"}


def compiled(program, args, config, strict=False):
    """The result of the rewritten program, and its report."""
    torch._dynamo.reset()
    backend = tmx_backend(config, lowering="operator", strict=strict)
    out = torch.compile(OneLayer(program), backend=backend)(*args)
    return out, backend.report


@QUICK
@given(program=programs())
def test_random_programs_are_found(program, eager):
    q, k, v = program.tensors()
    out, report = compiled(program, (q, k, v), TRIANGLE, strict=True)
    (site,) = report
    assert site.decision == "triangle"
    assert site.key == (B, program.kv_heads, N, D)
    want, _ = oracle(q, k, v, None, *TRIANGLE.geometry.counts, 1.0 if program.scale == "none" else program.factor)
    torch.testing.assert_close(out.double(), want, atol=5e-5, rtol=0)
    assert squares(eager[-1], N) == []


@QUICK
@given(program=programs(MUTATIONS))
def test_mutations_are_refused_or_computed_as_written(program, eager):
    args = program.tensors()
    torch.manual_seed(1)
    want = program(*args)
    torch.manual_seed(1)
    out, report = compiled(program, args, EVERYTHING)
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4, equal_nan=True)
    decisions = [site.decision for site in report]
    if program.mutation in NEVER:
        assert "triangle" not in decisions
    else:
        assert len(decisions) == 1
