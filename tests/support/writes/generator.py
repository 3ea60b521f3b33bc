"""Random attention programs with writes, as source text: a seed gives the same program everywhere.

A program is a model of a few layers in an ``nn.ModuleList``. Its mask, its attention and its key heads are written in a
random form, and a few lines that write a tensor in place stand at random places of the model's and the layers' forward:
any tensor that is in scope there, through any view, by any operator. Nothing says that a write matters: before the
tensor is read it belongs to its value, after the last reading it is nobody's business.
"""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.writes.function import Function
from tests.support.writes.masks import LEAST, ROOM, Masks
from tests.support.writes.watch import WATCH
from tests.support.writes.written import Var


@dataclass(frozen=True)
class Program:
    """One drawn program and how it is to be run.

    ``lengths`` are those of its calls, one model for all. ``outside`` is a statement on the model between the calls.
    ``geometry`` is None for a window that covers every prompt.
    """

    seed: str
    source: str
    writes: tuple[str, ...]
    form: str
    mask: str
    layers: int
    batch: int
    lengths: tuple[int, ...]
    dynamic: bool
    dim: int
    layered: tuple[int, ...]
    min_seq_len: int
    lowering: str
    outside: str
    cached: bool
    geometry: tuple[int, int, int] | None

    def model(self) -> torch.nn.Module:
        """A new model; the same every time."""
        name = f"<writes {self.seed}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        scope: dict[str, Any] = {"__name__": "tmx_writes_program", "limited": WATCH.limited}
        exec(compile(self.source, name, "exec"), scope)
        torch.manual_seed(1)
        made: torch.nn.Module = scope["Model"]().eval()
        return made

    def state(self) -> dict[str, torch.Tensor]:
        """What the model gets beside its first input, and may write; it lives on from call to call."""
        made: dict[str, torch.Tensor] = {}
        n = max(self.lengths)
        if "attention_mask" in self.source:
            made["attention_mask"] = torch.ones(self.batch, n, dtype=torch.long)
            made["attention_mask"][-1, n - 20 :] = 0
        if "lengths" in self.source:
            made["lengths"] = torch.tensor([n, n - 30][: self.batch])
        if "position" in self.source and "self.position" not in self.source:
            made["position"] = torch.tensor(0)
        return made

    def inputs(self, call: int) -> torch.Tensor:
        """The first input of a call, (B, N, D)."""
        generator = torch.Generator().manual_seed(call + 10)
        return torch.randn(self.batch, self.lengths[call], self.dim, generator=generator)


class Draw(Masks):
    """Draws one program."""

    def __init__(self, seed: str, *, inductor: bool) -> None:
        rng = self.rng = random.Random(seed)
        self.seed, self.inductor = seed, inductor
        self.batch = rng.choice((1, 2))
        self.kv_heads = rng.choice((1, 2))
        self.group = rng.choice((1, 1, 2))
        self.heads = self.kv_heads * self.group
        self.dim = rng.choice((8, 16))
        self.layers = rng.choice((2, 2, 2, 3))
        self.written_out = rng.random() < 0.45
        self.flex = inductor and rng.random() < 0.2
        self.bare = rng.random() < 0.25
        kinds = ("none", "bool", "float", "buffer", "cache", "padding")
        self.mask = rng.choices(kinds, (1, 4, 3, 2, 2, 3))[0]
        if self.flex:
            self.mask, self.written_out = rng.choice(("none", "cache")), False
        self.float_mask = self.mask == "float"
        self.mask_shape: tuple[int, ...] = (LEAST, LEAST)
        self.buffers: list[str] = []
        self.model = Function(())
        self.shared: list[Var] = []

    # A layer --------------------------------------------------------------------------------------------------------

    def layer(self, index: int) -> None:
        rng, b, d = self.rng, self.batch, self.dim
        cached = self.mask == "cache"
        wide = ROOM if cached else LEAST
        columns = "ROOM" if cached else "n"
        body = Function(tuple(self.shared))
        if self.bare:
            shape = (b, self.heads, LEAST, d)
            body.scope = (*body.scope, self.var("x", "float", shape, "x", 1))
            self.operands_of_x(body, shape)
        else:
            self.projected(body)
        if cached:
            self.into_cache(body)
        q_shape, kv = (b, self.heads, LEAST, d), (b, self.heads, wide, d)
        gqa = self.group > 1 and not self.written_out and rng.random() < 0.3
        if self.group > 1 and not gqa:
            for one in ("key", "value"):
                repeat = rng.choice((
                    f"{one}.repeat_interleave({self.group}, dim=1)",
                    f"{one}.repeat_interleave({self.group}, 1)",
                    f"{one}[:, :, None].expand(-1, -1, {self.group}, -1, -1).reshape(b, {self.heads}, {columns}, {d})",
                    f"{one}.unsqueeze(2).expand(b, {self.kv_heads}, {self.group}, {columns}, {d}).flatten(1, 2)",
                ))  # fmt: skip
                body.add(f"{one}s = {repeat}", self.var(f"{one}s", "float", kv, f"repeated {one}", 3))
            key, value = "keys", "values"
        else:
            key, value = "key", "value"
        if self.written_out:
            self.long_hand(body, key, value, columns)
        elif self.flex:
            mod = "j <= rows[i]" if cached else rng.choice(("j <= i", "i >= j"))
            plan = f"create_block_mask(lambda b, h, i, j: {mod}, None, None, n, {columns}, device='cpu')"
            gqa_word = ", enable_gqa=True" if gqa else ""
            body.add(f"plan = {plan}")
            body.add(f"out = flex_attention(query, {key}, {value}, block_mask=plan{gqa_word})")
        else:
            self.one_call(body, key, value, gqa)
        body.lines[-1].makes = (*body.lines[-1].makes, self.var("out", "float", q_shape, "result", 2))
        if self.bare:
            body.add(f"return {rng.choice(('out', 'out', 'out + 0.5 * x', 'out + query'))}")
        else:
            tail = rng.choice((
                f"out.transpose(1, 2).reshape(b, n, {self.heads * d})",
                "out.transpose(1, 2).contiguous().view(b, n, -1)",
                f"out.transpose(1, 2).view(b, n, {self.heads * d})",
                "out.transpose(1, 2).flatten(2)",
            ))  # fmt: skip
            body.add(f"merged = {tail}", self.var("merged", "float", (b, LEAST, self.heads * d), "after", 1))
            body.add("return x + self.o(merged)")
        names = ", ".join(var.name for var in self.shared)
        text = [f"class Layer{index}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        text.append("        self.rectify = nn.ReLU(inplace=True)")
        if not self.bare:
            for one, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                text.append(f"        self.{one} = nn.Linear({d}, {heads * d})")
            text.append(f"        self.o = nn.Linear({self.heads * d}, {d})")
        if cached:
            for one in ("keys", "values"):
                text.append(f'        self.register_buffer("{one}", torch.zeros({b}, {self.kv_heads}, ROOM, {d}))')
        text += ["", f"    def forward(self, x{', ' if names else ''}{names}):"]
        text += [f"        b, n = x.shape[0], x.shape[{2 if self.bare else 1}]"]
        self.bodies.append(body)
        self.texts.append(text)

    def operands_of_x(self, body: Function, shape: tuple[int, ...]) -> None:
        few = (self.batch, self.kv_heads, *shape[2:])
        query = self.rng.choice(("x", "x + 1", "x * 1.5", "x"))
        role = {"x": 2}.get(query, 4)
        body.add(f"query = {query}", self.var("query", "float", shape, "query", role))
        for one in ("key", "value"):
            text = self.rng.choice(("x", "x - 0.25", "x.clone()", "x"))
            text = text if self.group == 1 else f"({text})[:, :{self.kv_heads}]"
            body.add(f"{one} = {text}", self.var(one, "float", few, one, 3))

    def projected(self, body: Function) -> None:
        d = self.dim
        body.scope = (*body.scope, self.var("x", "float", (self.batch, LEAST, d), "x", 1))
        for one, heads, name in (
            ("q", self.heads, "query"),
            ("k", self.kv_heads, "key"),
            ("v", self.kv_heads, "value"),
        ):
            by = self.rng.choice((f"view(b, n, {heads}, {d})", f"unflatten(-1, ({heads}, {d}))"))
            var = self.var(name, "float", (self.batch, heads, LEAST, d), name, 3)
            body.add(f"{name} = self.{one}(x).{by}.transpose(1, 2)", var)

    def into_cache(self, body: Function) -> None:
        shape = (self.batch, self.kv_heads, ROOM, self.dim)
        for one in ("key", "value"):
            by = self.rng.choice((
                f"self.{one}s.index_copy_(2, rows, {one})",
                f"self.{one}s[:, :, rows] = {one}",
                f"self.{one}s.index_copy_(2, rows, {one})",
            ))  # fmt: skip
            body.add(by, self.var(f"self.{one}s", "float", shape, "cache", 2))
            body.add(f"{one} = self.{one}s", self.var(one, "float", shape, one, 2))

    def one_call(self, body: Function, key: str, value: str, gqa: bool) -> None:
        rng = self.rng
        name = rng.choice(("F.scaled_dot_product_attention", "torch.nn.functional.scaled_dot_product_attention"))
        extra = rng.choice(("", "", ", scale=0.3")) + (", enable_gqa=True" if gqa else "")
        if self.mask == "none":
            causal = f"{name}(query, {key}, {value}, is_causal=True{extra})"
            written = f"{name}(query, {key}, {value}, attn_mask=seen{extra})"
            body.add("if torch.compiler.is_compiling():")
            body.add(f"    out = {causal}", glued=True)
            body.add("else:", glued=True)
            body.add("    seen = limited(torch.ones(n, n, dtype=torch.bool).tril(), self)", glued=True)
            body.add(f"    out = {written}", glued=True)
            return
        body.add("seen = mask")
        body.add("if not torch.compiler.is_compiling():", glued=True)
        body.add("    seen = limited(seen, self)", glued=True)
        call = rng.choice((
            f"{name}(query, {key}, {value}, attn_mask=seen{extra})",
            f"{name}(query, {key}, {value}, seen{extra})",
            f"{name}(query, {key}, {value}, seen, 0.0, False{extra})",
            f"{name}(query=query, key={key}, value={value}, attn_mask=seen, dropout_p=0.0, is_causal=False{extra})",
            f"{name}(query, value={value}, key={key}, attn_mask=seen{extra})",
        ))  # fmt: skip
        body.add(f"out = {call}", glued=True)

    def long_hand(self, body: Function, key: str, value: str, columns: str) -> None:
        rng, b, d = self.rng, self.batch, self.dim
        wide = self.mask_shape[-1]
        shape = (b, self.heads, LEAST, wide)
        query, scale = "query", rng.choice(("query", "scores", "divide", "none"))
        if scale == "query":
            by = rng.choice(("query * 0.3", "query / math.sqrt(8)", "0.25 * query", "torch.mul(query, 0.3)"))
            body.add(f"scaled = {by}", self.var("scaled", "float", (b, self.heads, LEAST, d), "scaled query", 3))
            query = "scaled"
        product = rng.choice((
            f"{query} @ {key}.transpose(-1, -2)",
            f"torch.matmul({query}, {key}.mT)",
            f"torch.einsum('bhid,bhjd->bhij', {query}, {key})",
            f"torch.bmm({query}.flatten(0, 1), {key}.flatten(0, 1).mT).view(b, {self.heads}, n, {columns})",
        ))  # fmt: skip
        scores = self.var("scores", "float", shape, "scores", 3)
        body.add(f"scores = {product}", scores)
        if scale in ("scores", "divide"):
            by = ("scores = scores * 0.3", "scores *= 0.3", "scores.mul_(0.3)", "scores = scores / 3")
            body.add(rng.choice(by[:3] if scale == "scores" else by[3:]), scores)
        if self.mask == "none":
            fill = "torch.ones(n, n, dtype=torch.bool).triu(1)"
            masked = rng.choice((f"scores.masked_fill({fill}, -math.inf)", f"scores + torch.where({fill}, -1e9, 0.0)"))
        elif self.float_mask:
            masked = rng.choice(("scores + mask", "torch.add(scores, mask)", "mask + scores", "+= mask"))
        else:
            masked = rng.choice((
                "scores.masked_fill(~mask, -math.inf)",
                "scores.masked_fill(mask == 0, -1e9)",
                "torch.where(mask, scores, -math.inf)",
                "torch.masked_fill(scores, torch.logical_not(mask), -math.inf)",
                ".masked_fill_(~mask, -math.inf)",
            ))  # fmt: skip
        in_place = {"+= mask": "scores += mask", ".masked_fill_(~mask, -math.inf)": f"scores{masked}"}
        body.add(in_place.get(masked, f"scores = {masked}"), scores)
        body.add("if not torch.compiler.is_compiling():")
        body.add("    scores = limited(scores, self)", glued=True)
        by = rng.choice((
            "scores.softmax(-1)", "torch.softmax(scores, dim=-1)", "F.softmax(scores, dim=-1, dtype=torch.float32)",
            "F.softmax(input=scores, dim=-1)", "self.softmax(scores)",
        ))  # fmt: skip
        by = by.replace("self.softmax", "nn.Softmax(-1)")
        weights = self.var("weights", "float", shape, "weights", 1)
        body.add(f"weights = {by}", weights, glued=True)
        if rng.random() < 0.2:
            body.add("weights = F.dropout(weights, 0.1, training=self.training)", weights)
        out = rng.choice((f"weights @ {value}", f"torch.matmul(weights, {value})",
                          f"torch.einsum('bhij,bhjd->bhid', weights, {value})"))  # fmt: skip
        body.add(f"out = {out}")

    # The program ----------------------------------------------------------------------------------------------------

    def program(self) -> Program | None:
        rng = self.rng
        self.bodies: list[Function] = []
        self.texts: list[list[str]] = []
        if self.bare:
            self.model.scope = (self.var("x", "float", (self.batch, self.heads, LEAST, self.dim), "x", 1),)
        else:
            self.model.scope = (self.var("x", "float", (self.batch, LEAST, self.dim), "x", 1),)
        self.build_mask()
        if self.mask != "none" and not self.flex:
            kind = "float" if self.float_mask else "bool"
            self.shared.append(self.var("mask", kind, self.mask_shape, "mask", 4))
        for index in range(1 if rng.random() < 0.5 else self.layers):
            self.layer(index)
        names = ", ".join(var.name for var in self.shared)
        early = rng.random() < 0.3
        if self.mask == "cache" and early:
            self.model.add(self.raise_position())
        for index in range(self.layers):
            self.model.add(f"x = self.layers[{index}](x{', ' if names else ''}{names})", self.model.scope[0])
        if self.mask == "cache" and not early:
            self.model.add(self.raise_position())
        self.model.add("return x.transpose(1, 2).flatten(2)" if self.bare else "return x")
        writes = self.writes()
        if writes is None:
            return None
        if len(self.bodies) < self.layers:
            self.bodies = self.bodies * self.layers
            self.texts = [[line.replace("Layer0", f"Layer{i}") for line in self.texts[0]] for i in range(self.layers)]
        return self.assembled(writes)

    def writes(self) -> tuple[str, ...] | None:
        made = []
        for number in range(self.rng.choice((0, 1, 1, 1, 2))):
            inside = self.rng.random() < 0.5
            where = self.rng.choice(self.bodies) if inside else self.model
            for _ in range(20):
                described = where.write(self.rng, f"part{number}")
                if described is not None:
                    made.append(f"{'layer' if inside else 'model'} | {described}")
                    break
            else:
                return None
        return tuple(made)

    def assembled(self, writes: tuple[str, ...]) -> Program:
        rng = self.rng
        text = ["import math", "import torch", "import torch.nn.functional as F", "from torch import nn"]
        if self.flex:
            text.append("from torch.nn.attention.flex_attention import create_block_mask, flex_attention")
        text += ["", f"ROOM = {ROOM}", ""]
        for body, lines in zip(self.bodies, self.texts, strict=True):
            text += ["", *lines, *body.text(), ""]
        given = [var.name for var in self.model.scope[1:] if not var.name.startswith("self.")]
        text += ["", "class Model(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        text += ["        self.rectify = nn.ReLU(inplace=True)"]
        layers = ", ".join(f"Layer{index}()" for index in range(self.layers))
        text += [f"        self.layers = nn.ModuleList([{layers}])", *("        " + line for line in self.buffers), ""]
        text += [f"    def forward(self, {', '.join(['x', *given])}):", "        b, n = x.shape[0], x.shape[1]"]
        if self.bare:
            text.append(f"        x = x.view(b, n, {self.heads}, {self.dim}).transpose(1, 2)")
        text += [*self.model.text(), ""]
        dynamic = rng.random() < 0.25
        first = rng.randint(LEAST, 220)
        more = [rng.randint(LEAST, 220) if dynamic else first for _ in range(rng.choice((0, 1, 1, 2)))]
        if dynamic and rng.random() < 0.15:
            # A short prompt between long ones; the writes' indices want so many tokens too, or the draw is void.
            more.append(rng.randint(50, 64))
        outside = ""
        if more and self.buffers and rng.random() < 0.1:
            name = self.buffers[0].split('"')[1]
            outside = rng.choice(("model.{}.data.mul_(1)", "model.{}.fill_(0)", "model.{}.data.fill_(0)",
                                  "model.{0}.data = torch.zeros_like(model.{0})")).format(name)  # fmt: skip
        chosen = [i for i in range(self.layers) if rng.random() < 0.8] or [0]
        width = self.heads * self.dim if self.bare else self.dim
        real = rng.random() < 0.25 and self.mask != "cache" and not self.flex
        form = "flex" if self.flex else "written out" if self.written_out else "sdpa"
        return Program(
            self.seed, "\n".join(text), writes, form, self.mask, self.layers, self.batch, (first, *more), dynamic,
            width, tuple(chosen), rng.choice((64, 128)), rng.choice(("auto", "operator", "blocked")), outside,
            self.mask == "cache", (4, 20, 16) if real else None,
        )  # fmt: skip


def draw(seed: str, *, inductor: bool = False) -> Program | None:
    """The program of a seed; None where the draw fits no tensor."""
    return Draw(seed, inductor=inductor).program()
