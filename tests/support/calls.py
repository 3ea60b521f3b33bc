"""One call of the operator: random problems, the call as a module, and a backend that lowers it with one lowering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._inductor.compile_fx import compile_fx

from tmx_compile.graph.nodes import fake_mode_of, tensor_of
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import OPERATOR
from tmx_compile.passes.lower import Lowerer
from tmx_compile.report import Rejected


@dataclass(frozen=True)
class Case:
    """One operator problem.

    ``valid`` gives each sequence's valid keys as (start, end), ``holes`` drops some inside; with ``documents`` the keys
    are packed documents instead, of random lengths, the first no document; holes hide some of their keys.
    """

    q_len: int
    kv_len: int
    sink: int
    window: int
    last: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    v_dim: int | None = None
    dtype: torch.dtype = torch.float32
    valid: tuple[tuple[int, int], ...] | None = None
    holes: bool = False
    strided: bool = False
    reach: int | None = None
    documents: bool = False
    sinks: bool = False  # learned ones: see sink_logits
    softcap: float | None = None

    @property
    def scale(self):
        return self.dim**-0.5

    @property
    def geometry(self):
        return self.sink, self.window, self.last

    @property
    def mask(self):
        """The same with the reach, as the lowerings take it."""
        return Geometry(*self.geometry, self.reach)

    @property
    def arguments(self):
        """What follows the tensors in a call of the operator."""
        return (*self.geometry, self.scale, *(() if self.reach is None else (self.reach,)))

    @property
    def one_call(self):
        """The arguments of :class:`OneCall`."""
        return self.geometry, self.scale, self.reach, self.softcap

    def sink_logits(self, requires_grad=False, device="cpu", dtype=None):
        """Fresh random (H,) logits about as large as the scores, None where there are no learned sinks."""
        if not self.sinks:
            return None
        return torch.randn(self.heads, dtype=dtype or self.dtype, device=device).add_(1.0).requires_grad_(requires_grad)

    def tensors(self, requires_grad=False, device="cpu"):
        """Fresh random query, key, value and key mask."""
        v_dim = self.v_dim or self.dim
        shapes = [(self.heads, self.q_len, self.dim), (self.kv_heads, self.kv_len, self.dim)]
        shapes.append((self.kv_heads, self.kv_len, v_dim))
        made = []
        for h, n, d in shapes:
            if self.strided:
                # (B, N, H, D) memory with a gap after every row, as a slice of a fused projection has.
                x = torch.randn(self.batch, n, h, d + 8, dtype=self.dtype, device=device)[..., :d].transpose(1, 2)
            else:
                x = torch.randn(self.batch, h, n, d, dtype=self.dtype, device=device)
            made.append(x.detach().requires_grad_(requires_grad))
        key_mask = self.key_mask()
        return (*made, None if key_mask is None else key_mask.to(device))

    def key_mask(self):
        if self.documents:
            numbers = ((torch.rand(self.batch, self.kv_len) < 0.1).long().cumsum(1) - 3).clamp(min=0)
            hidden = torch.rand(self.batch, self.kv_len) < 0.1
            return torch.where(hidden, -numbers, numbers) if self.holes else numbers
        if self.valid is None:
            return None
        mask = torch.zeros(self.batch, self.kv_len, dtype=torch.bool)
        for b, (start, end) in enumerate(self.valid):
            mask[b, start:end] = True
            if self.holes and end - start > 2:
                mask[b, start + 1 : end - 1] &= torch.rand(end - start - 2) < 0.8
        return mask


class OneCall(torch.nn.Module):
    """The operator alone."""

    def __init__(self, geometry, scale, reach=None, softcap=None):
        super().__init__()
        self.geometry, self.scale, self.softcap = Geometry(*geometry, reach), scale, softcap

    def forward(self, q, k, v, key_mask, sink_logits=None):
        arguments = self.geometry.arguments(self.scale, sink_logits, self.softcap)
        return torch.ops.tmx.triangle_attention(q, k, v, key_mask, *arguments)[0]


def call_of(node, needs_grad=False):
    """What a lowering is told of an operator's node."""
    *fakes, sink, window, last, scale, reach, sink_logits, softcap = [*node.args, *[None] * (11 - len(node.args))]
    fakes = [None if x is None else tensor_of(x) for x in (*fakes, sink_logits)]
    geometry = Geometry(sink, window, last, reach)
    return AttentionCall(*fakes[:4], geometry, scale, needs_grad, sink_logits=fakes[4], softcap=softcap)


class LoweringBackend:
    """Lowers the operator's nodes of a graph with one lowering, then runs it in eager mode or through Inductor."""

    def __init__(self, lowering, inductor):
        self.lowering = lowering
        self.inductor = inductor
        self.compiles = 0

    def __call__(self, gm, example_inputs):
        self.compiles += 1
        grad = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in example_inputs)
        lowerer = Lowerer(gm, fake_mode_of(gm))
        options = {}
        for node in [n for n in gm.graph.nodes if n.target in (OPERATOR, torch.ops.tmx.triangle_attention)]:
            node.target = OPERATOR
            call = call_of(node, grad)
            answer = self.lowering.supports(call)
            if isinstance(answer, Rejected):
                raise AssertionError(f"refused: {answer}")
            options.update(self.lowering.inductor_options(call))
            if self.lowering.name != "operator":
                lowerer.lower(node, call, self.lowering)
        gm.graph.lint()
        gm.recompile()
        if not self.inductor:
            return gm.forward
        return compile_fx(gm, example_inputs, config_patches=options or None)
