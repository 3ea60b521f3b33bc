"""What tests share: the float64 oracle, random problems, tiny models, compiling one operator call."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch._inductor.compile_fx import compile_fx
from transformers import Qwen3Config, Qwen3ForCausalLM

from tmx_compile.graph.nodes import fake_mode_of, tensor_of
from tmx_compile.lowering.base import AttentionCall
from tmx_compile.mask.geometry import Geometry
from tmx_compile.operator import ALL_ROWS, OPERATOR
from tmx_compile.passes.lower import Lowerer
from tmx_compile.report import Rejected


def attended(q_len, kv_len, key_mask, sink, window, last, reach=None):
    """(B, Sq, Skv) bool, cell by cell from the definition."""
    batch = 1 if key_mask is None else key_mask.shape[0]
    mask = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
    for b in range(batch):
        documents = [None]
        if key_mask is not None and key_mask.dtype != torch.bool:
            documents = [number for number in key_mask[b].unique().tolist() if number > 0]
        for number in documents:
            if key_mask is None:
                valid = list(range(kv_len))
            else:
                mine = key_mask[b] if number is None else key_mask[b] == number
                own = None if number is None else (key_mask[b].abs() == number).nonzero().flatten().tolist()
                valid = mine.nonzero().flatten().tolist()
            if not valid:
                continue
            start, end = valid[0], valid[-1] + 1
            for i in range(q_len):
                p = kv_len - q_len + i
                if number is not None and p not in own:
                    continue
                final = p >= end - last and (p < end or last >= ALL_ROWS)
                for j in valid:
                    near = j < start + sink or p - j <= window
                    seen = reach is None or p - j <= reach
                    mask[b, i, j] = j <= p and seen and (near or final)
    return mask


def oracle(q, k, v, key_mask, sink, window, last, scale, reach=None):
    """out and lse in float64 with the mask written out; differentiable."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    mask = attended(q.shape[2], k.shape[2], key_mask, sink, window, last, reach)[:, None]
    scores = (q.double() @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    alive = mask.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~alive, 0.0), -1) * alive
    return weights @ v, torch.logsumexp(scores, -1)


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
        return self.geometry, *self.arguments[3:]

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


def tolerance(dtype):
    """Absolute error allowed against float64, for inputs of unit variance."""
    return {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


class OneCall(torch.nn.Module):
    """The operator alone."""

    def __init__(self, geometry, scale, *reach):
        super().__init__()
        self.arguments = (*geometry, scale, *reach)

    def forward(self, q, k, v, key_mask):
        return torch.ops.tmx.triangle_attention(q, k, v, key_mask, *self.arguments)[0]


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
            fakes = [None if a is None else tensor_of(a) for a in node.args[:4]]
            call = AttentionCall(*fakes, Geometry(*node.args[4:7], *node.args[8:]), node.args[7], grad)
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


def tiny_qwen3(layers=2, impl="sdpa", seed=0, **changes):
    """A random Qwen3 of real classes: 4 heads, 2 key heads, head dim 16."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1 << 17,
    )
    config = Qwen3Config(**(settings | changes))
    config._attn_implementation = impl
    return Qwen3ForCausalLM(config).eval()


def masked_oracle(model, config, ids, attention_mask=None):
    """Logits of a Hugging Face model in float64 with the triangle mask in the layers that ``config`` names.

    Every attention module is called with an explicit additive mask; nothing of the package takes part.
    """
    n = ids.shape[1]
    key_mask = None if attention_mask is None else attention_mask.bool()
    tri = attended(n, n, key_mask, *config.geometry)
    dense = attended(n, n, key_mask, 0, 0, n)
    masks = {index: tri if index in config.layers() else dense for index in range(len(model.model.layers))}
    return with_masks(model, ids, masks, attention_mask)


def with_masks(model, ids, masks, attention_mask=None):
    """Logits of a Hugging Face model in float64 with a mask, (N, N) or (B, N, N), True = attend, for each layer named.

    Other layers are causal.
    """
    model = copy.deepcopy(model).double()
    batch, n = ids.shape
    causal = torch.ones(n, n, dtype=torch.bool).tril()

    def hook(index):
        def before(module, args, kwargs):
            mask = masks.get(index, causal).expand(batch, n, n)
            # A row without keys sees itself: it is padding, and its result is never looked at.
            mask = mask | (torch.eye(n, dtype=torch.bool) & ~mask.any(-1, keepdim=True))
            zero = torch.zeros((), dtype=torch.float64)
            kwargs["attention_mask"] = torch.where(mask, zero, float("-inf"))[:, None]
            return args, kwargs

        return before

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(hook(index), with_kwargs=True)
    with torch.no_grad():
        return model(ids, attention_mask=attention_mask, use_cache=False).logits
