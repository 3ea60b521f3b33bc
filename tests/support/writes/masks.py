"""Masks in random written forms, with the tensors that they are made from."""

from __future__ import annotations

import random

from tests.support.writes.function import Function
from tests.support.writes.written import Var

ROOM = 700
"""Keys of a static cache."""
LEAST = 130
"""The shortest prompt that is drawn; what a write's indices are within."""


class Masks:
    """Writes the lines of one mask into the model's forward.

    Attributes:
        mask: its kind: "none" (is_causal), "bool", "float", "buffer", "padding" or "cache" (a static one).
        float_mask: it is added to the scores.
        shared: what the model hands to its layers.
        buffers: lines of the model's constructor.
    """

    rng: random.Random
    batch: int
    mask: str
    flex: bool
    float_mask: bool
    mask_shape: tuple[int, ...]
    model: Function
    shared: list[Var]
    buffers: list[str]
    position: str

    def var(self, name: str, kind: str, shape: tuple[int, ...], role: str = "", weight: int = 2) -> Var:
        return Var(name, kind, shape, role or name, weight)

    def build_mask(self) -> None:
        if self.mask in ("none", "cache"):
            if self.mask == "cache":
                self.cache_mask()
            return
        self.causal()
        mask = self.float_mask
        if self.mask == "padding":
            self.padding()
        if not mask and self.rng.random() < 0.25:
            self.to_float()
        if self.rng.random() < 0.25:
            by = self.rng.choice(("mask[None, None]", "mask.unsqueeze(0)", "mask.expand(b, 1, n, n)", "mask.clone()"))
            if len(self.mask_shape) == 4:
                by = "mask.contiguous()"
            shape = {"mask[None, None]": (1, 1), "mask.unsqueeze(0)": (1,), "mask.expand(b, 1, n, n)": (self.batch, 1)}
            if by == "mask.unsqueeze(0)" and self.batch > 1:
                by = "mask[None, None]"
            self.mask_shape = (*shape.get(by, ()), *self.mask_shape)
            self.line(f"mask = {by}", "mask", "float" if self.float_mask else "bool", self.mask_shape, "mask", 6)

    def line(self, text: str, name: str, kind: str, shape: tuple[int, ...], role: str = "", weight: int = 2) -> Var:
        var = self.var(name, kind, shape, role, weight)
        self.model.add(text, var)
        return var

    def causal(self) -> None:
        rng, n = self.rng, (LEAST, LEAST)
        if self.mask == "buffer":
            name = rng.choice(("causal", "square"))
            made = "torch.ones(256, 256, dtype=torch.bool).tril()"
            if rng.random() < 0.4:
                self.float_mask, made = True, "torch.full((256, 256), -math.inf).triu(1)"
            kind = "float" if self.float_mask else "bool"
            self.buffers.append(f'self.register_buffer("{name}", {made})')
            self.model.scope = (*self.model.scope, self.var(f"self.{name}", kind, (256, 256), "mask buffer", 3))
            self.line(f"mask = self.{name}[:n, :n]", "mask", kind, n, "mask", 6)
            return
        if self.float_mask:
            form = rng.randrange(5)
            if form < 2:
                how = ("torch.full((n, n), -math.inf).triu(1)", "torch.triu(torch.full((n, n), -math.inf), diagonal=1)")
                self.line(f"mask = {how[form]}", "mask", "float", n, "mask", 6)
            elif form == 2:
                self.line("future = torch.ones(n, n, dtype=torch.bool).triu(1)", "future", "bool", n, "source", 3)
                fill = rng.choice(("-math.inf", "-1e9", "torch.finfo(torch.float32).min"))
                self.line(f"mask = torch.zeros(n, n).masked_fill(future, {fill})", "mask", "float", n, "mask", 6)
            elif form == 3:
                self.line("future = torch.ones(n, n, dtype=torch.bool).triu(1)", "future", "bool", n, "source", 3)
                self.line("mask = torch.zeros(n, n)", "mask", "float", n, "mask", 2)
                self.line("mask.masked_fill_(future, -math.inf)", "mask", "float", n, "mask", 6)
            else:
                self.line("mask = torch.full((n, n), -math.inf)", "mask", "float", n, "mask", 2)
                self.line("mask.triu_(1)", "mask", "float", n, "mask", 6)
            return
        form = rng.randrange(8)
        if form == 0:
            self.line("mask = torch.ones(n, n, dtype=torch.bool).tril()", "mask", "bool", n, "mask", 6)
        elif form == 1:
            self.line("place = torch.arange(n)", "place", "int", n[:1], "source", 4)
            self.line("mask = place[None, :] <= place[:, None]", "mask", "bool", n, "mask", 6)
        elif form == 2:
            self.line("row = torch.arange(n)[:, None]", "row", "int", (LEAST, 1), "source", 3)
            self.line("col = torch.arange(n)[None, :]", "col", "int", (1, LEAST), "source", 3)
            self.line("mask = row >= col", "mask", "bool", n, "mask", 6)
        elif form == 3:
            self.line("future = torch.ones(n, n).triu(1)", "future", "float", n, "source", 4)
            self.line("mask = future == 0", "mask", "bool", n, "mask", 6)
        elif form == 4:
            self.line("ones = torch.ones(n, dtype=torch.long)", "ones", "int", n[:1], "source", 3)
            self.line("place = ones.cumsum(0) - 1", "place", "int", n[:1], "source", 3)
            self.line("mask = ~(place[None, :] > place[:, None])", "mask", "bool", n, "mask", 6)
        elif form == 5:
            shape = (2, *n)
            self.line("store = torch.ones(2, n, n, dtype=torch.bool).tril()", "store", "bool", shape, "source", 4)
            by = rng.choice(("store[1]", "store.unbind(0)[0]", "store.select(0, 1)", "store.chunk(2)[1].squeeze(0)"))
            self.line(f"mask = {by}", "mask", "bool", n, "mask", 5)
        elif form == 6:
            self.buffers.append('self.register_buffer("places", torch.arange(256))')
            self.model.scope = (*self.model.scope, self.var("self.places", "int", (256,), "places buffer", 3))
            self.line("place = self.places[:n]", "place", "int", n[:1], "source", 3)
            self.line("mask = place[:, None].ge(place)", "mask", "bool", n, "mask", 6)
        else:
            self.line("mask = torch.zeros(n, n, dtype=torch.bool)", "mask", "bool", n, "mask", 1)
            self.line("mask.copy_(torch.ones(n, n).tril() > 0)", "mask", "bool", n, "mask", 6)

    def padding(self) -> None:
        rng, b = self.rng, self.batch
        four = (b, 1, LEAST, LEAST)
        if rng.random() < 0.5:
            given = self.var("attention_mask", "int", (b, LEAST), "attention_mask", 3)
            by = rng.choice(("attention_mask[:, :n].bool()", "attention_mask[:, :n] != 0", "attention_mask[:, :n] > 0"))
        else:
            given = self.var("lengths", "int", (b,), "lengths", 4)
            by = rng.choice(("torch.arange(n)[None] < lengths[:, None]", "lengths[:, None] > torch.arange(n)"))
        self.model.scope = (*self.model.scope, given)
        self.line(f"shown = {by}", "shown", "bool", (b, LEAST), "source", 3)
        wide = rng.choice(("shown[:, None, None, :]", "shown.view(b, 1, 1, n)", "shown.unsqueeze(1).unsqueeze(1)"))
        if self.float_mask:
            join = rng.choice(("mask.masked_fill(~{}, -math.inf)", "mask + torch.where({}, 0.0, -math.inf)"))
        else:
            join = rng.choice(("mask & {}", "torch.logical_and(mask, {})", "{} & mask", "mask * {}"))
        self.mask_shape = four
        kind = "float" if self.float_mask else "bool"
        self.line(f"mask = {join.format(wide)}", "mask", kind, four, "mask", 6)
        self.shared.append(given)

    def to_float(self) -> None:
        by = ("torch.where(mask, 0.0, -math.inf)", "(1.0 - mask.float()) * -1e9", "mask.logical_not() * -1e9")
        self.float_mask = True
        how = self.rng.choice(by)
        self.line(f"mask = {how}", "mask", "float", self.mask_shape, "mask", 6)

    def cache_mask(self) -> None:
        rng = self.rng
        self.position = "position"
        if rng.random() < 0.5:
            self.position = "self.position"
            self.buffers.append('self.register_buffer("position", torch.zeros((), dtype=torch.long))')
        # Written once on purpose (it is raised), and by chance besides.
        place = self.var(self.position, "int", (), "position", 3)
        self.model.scope = (*self.model.scope, place)
        self.line(f"rows = {self.position} + torch.arange(n)", "rows", "int", (LEAST,), "source", 2)
        if not self.flex:
            self.mask_shape = (LEAST, ROOM)
            by = rng.choice(("torch.arange({r})[None] <= rows[:, None]", "rows[:, None] >= torch.arange({r})"))
            self.line(f"mask = {by.format(r=ROOM)}", "mask", "bool", self.mask_shape, "mask", 5)
        self.shared.append(self.var("rows", "int", (LEAST,), "source", 1))

    def raise_position(self) -> str:
        forms = ["{p}.add_(n)", "{p} += n", "{p}.copy_({p} + n)", "{p}.data.add_(n)", "{p}[...] = {p} + n"]
        if self.position.startswith("self"):
            forms.append("{p} = {p} + n")
        return self.rng.choice(forms).format(p=self.position)
