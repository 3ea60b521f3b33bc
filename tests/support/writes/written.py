"""Random writes: through which view of a tensor, by which operator; as source text."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@torch.library.custom_op("tmx_writes::change", mutates_args={"x"})
def change(factor: float, x: torch.Tensor) -> None:
    """Writes its second argument, and no name in torch tells so."""
    if x.dtype == torch.bool:
        x.logical_not_()
    elif x.is_floating_point():
        x.mul_(factor)
    else:
        x.add_(1)


@change.register_fake
def _(factor, x):
    return None


@dataclass(frozen=True)
class Var:
    """A tensor of the program: what it is called, its values ("bool", "float", "int") and its shape at the least N.

    ``role`` is what it is for; ``weight`` is how often it is written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    role: str
    weight: int = 2


DTYPES = {"bool": torch.bool, "float": torch.float32, "int": torch.int64}

# Fewest dimensions, and how a view is written. Some are views only at times (contiguous, to, float), and one never is.
VIEWS = (
    (0, "{t}.data"),
    (0, "{t}.detach()"),
    (0, "{t}[...]"),
    (0, "{t}.unsqueeze(0)"),
    (0, "{t}[None]"),
    (0, "torch.atleast_3d({t})"),
    (0, "torch.atleast_1d({t})"),
    (0, "{t}.view_as({t})"),
    (0, "{t}.expand_as({t})"),
    (0, "{t}.to({t}.dtype)"),
    (0, "{t}.type_as({t})"),
    (0, "torch.as_tensor({t})"),
    (0, "{t}.positive()"),
    (0, "{t}.float()"),
    (0, "{t}.real"),
    (0, "{t}.clone()"),
    (0, "{t}.reshape({t}.shape)"),
    (0, "{t}.view(-1)"),
    (0, "{t}.unsqueeze(-1)"),
    (0, "F.dropout({t}, 0.5, training=False)"),
    (0, "F.dropout({t}, p=0.25, training=self.training)"),
    (0, "torch.broadcast_to({t}, {t}.shape)"),
    (0, "{t}.view(torch.uint8)"),
    (1, "{t}.contiguous()"),
    (1, "{t}.squeeze()"),
    (1, "{t}.ravel()"),
    (1, "{t}.reshape(-1)"),
    (1, "{t}.flatten()"),
    (1, "{t}.flatten(0)"),
    (1, "{t}.tensor_split(2)[0]"),
    (1, "{t}.tensor_split(2, dim=-1)[1]"),
    (1, "{t}.chunk(2, dim=-1)[1]"),
    (1, "torch.chunk({t}, 2, -1)[0]"),
    (1, "{t}.split(4, -1)[1]"),
    (1, "torch.hsplit({t}, [3])[1]"),
    (1, "{t}.narrow(-1, {i}, 3)"),
    (1, "{t}[..., {i}:]"),
    (1, "{t}[..., :{i}]"),
    (1, "{t}[..., ::2]"),
    (1, "{t}.unfold(-1, 2, 2)"),
    (1, "{t}.as_strided((3,), (1,), {i})"),
    (1, "torch.as_strided({t}, {t}.shape, {t}.stride())"),
    (1, "{t}.unflatten(-1, (1, -1))"),
    (1, "{t}.expand(1, *{t}.shape)"),
    (2, "{t}.mT"),
    (2, "{t}.transpose(-1, -2)"),
    (2, "torch.transpose({t}, -2, -1)"),
    (2, "{t}.swapdims(-1, -2)"),
    (2, "{t}.swapaxes(0, -1)"),
    (2, "{t}.moveaxis(-1, 0)"),
    (2, "{t}.movedim(-1, -2)"),
    (2, "{t}.permute({p})"),
    (2, "{t}.diagonal(dim1=-2, dim2=-1)"),
    (2, "torch.diagonal({t}, -1, -2, -1)"),
    (2, "{t}.unbind(-1)[{i}]"),
    (2, "{t}.select(-1, {i})"),
    (2, "{t}.select(-2, {i})"),
    (2, "{t}[..., {i}]"),
    (2, "{t}[..., {i}, :]"),
    (2, "torch.vsplit({t}, [1])[0]"),
    (2, "{t}.flatten(-2)"),
    (2, "{t}.adjoint()"),
)

ANY = (
    (1, "{t}[..., {i}] = {c}"),
    (0, "{t}[...] = {c}"),
    (1, "{t}[{j}] = {c}"),
    (0, "{t}.fill_({c})"),
    (0, "{t}.zero_()"),
    (0, "torch._foreach_zero_([{t}])"),
    (0, "torch.ops.tmx_writes.change(1.5, {t})"),
    (0, "torch.ops.tmx_writes.change(x={t}, factor=0.5)"),
    (1, "{t}.copy_(torch.roll({t}, 1, -1))"),
    (1, "{t}.copy_(torch.roll({t}, -1, 0))"),
    (0, "{t}.copy_({t}.clone())"),
    (0, "{t}.masked_fill_(torch.ones_like({t}, dtype=torch.bool), {c})"),
    (1, "{t}.index_fill_(-1, torch.tensor([{i}]), {c})"),
    (1, "{t}.index_put_((torch.tensor([{j}]),), torch.tensor({c}, dtype={t}.dtype))"),
    (1, "{t}.index_copy_(0, torch.tensor([{j}]), torch.zeros_like({t}[:1]))"),
    (1, "{t}.scatter_(-1, torch.zeros_like({t}, dtype=torch.long), {c})"),
    (2, "{t}.tril_(-3)"),
    (2, "{t}.triu_(2)"),
    (0, "torch.clone({t}, out={t})"),
    (0, "torch.full({t}.shape, {c}, out={t}, dtype={t}.dtype)"),
)
OPERATORS = {
    "bool": (
        *ANY,
        (0, "{t}.logical_not_()"),
        (0, "torch.logical_not({t}, out={t})"),
        (0, "torch.bitwise_not({t}, out={t})"),
        (0, "torch.logical_not(torch.zeros_like({t}), out={t})"),
        (0, "{t} |= True"),
        (0, "{t} ^= True"),
        (0, "{t} &= False"),
        (0, "{t}.logical_or_(torch.ones_like({t}))"),
        (0, "{t}.eq_(False)"),
    ),
    "float": (
        *ANY,
        (0, "{t}.mul_(3.0)"),
        (0, "{t}.add_(0.5)"),
        (0, "{t} *= 2.0"),
        (0, "{t} += 0.75"),
        (0, "{t} /= 2"),
        (0, "{t}.neg_()"),
        (0, "torch._foreach_mul_([{t}], 3.0)"),
        (0, "torch._foreach_add_([{t}], 1.0)"),
        (0, "F.relu({t}, inplace=True)"),
        (0, "F.silu({t}, inplace=True)"),
        (0, "F.threshold({t}, 0.1, 0.2, inplace=True)"),
        (0, "F.threshold({t}, 0.1, 0.2, True)"),
        (0, "F.hardtanh({t}, inplace=True)"),
        (0, "F.leaky_relu({t}, 0.1, True)"),
        (0, "torch.relu_({t})"),
        (0, "self.rectify({t})"),
        (0, "{t}.clamp_(-0.5, 0.5)"),
        (0, "{t}.clamp_(min=-2.0)"),
        (0, "torch.mul({t}, 2.0, out={t})"),
        (0, "torch.clamp({t}, max=0.3, out={t})"),
        (0, "torch.add({t}, 1.0, out={t})"),
        (0, "{t}.addcmul_({t}, {t})"),
        (0, "{t}.lerp_(torch.zeros_like({t}), 0.5)"),
    ),
    "int": (
        *ANY,
        (0, "{t}.add_(1)"),
        (0, "{t}.sub_(2)"),
        (0, "{t} += 3"),
        (0, "{t} -= 1"),
        (0, "{t}.mul_(2)"),
        (0, "{t}.clamp_(max=100)"),
        (0, "torch.add({t}, 2, out={t})"),
        (0, "torch._foreach_add_([{t}], 1)"),
        (1, "{t}.cumsum_(0)"),
    ),
}
# They change what a tensor is rather than its elements, and take no view.
SHAPES = (
    (2, "{t}.t_()"),
    (2, "{t}.transpose_(-1, -2)"),
    (1, "{t}.unsqueeze_(0).squeeze_(0)"),
    (1, "{t}.set_({t}.clone().zero_())"),
    (1, "{t}.resize_({t}.shape)"),
    (0, "{t}.data = torch.zeros_like({t})"),
    (1, "{t}.swapdims_(-1, -2)"),
)
CONSTANTS = {"bool": ("True", "False"), "float": ("0.0", "0.5", "-2.0"), "int": ("0", "1", "7", "140")}


@dataclass(frozen=True)
class Write:
    """One write: the line that takes the view (empty without one), the line that writes, and what to count it as."""

    view: str
    statement: str
    target: str
    through: str
    operator: str


def draw_write(rng: random.Random, var: Var, name: str) -> Write | None:
    """A write of ``var``; ``name`` is free for its view. None where the draw does not fit the shape."""
    constant = rng.choice(CONSTANTS[var.kind])
    if rng.random() < 0.05:
        _, template = rng.choice([form for form in SHAPES if form[0] <= len(var.shape)])
        return Write("", template.format(t=var.name), var.role, "none", template)
    expression, through, shape = var.name, [], var.shape
    kind = var.kind
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        least, template = rng.choice(VIEWS)
        if least > len(shape) or (template == "{t}.view(torch.uint8)" and kind != "bool"):
            continue
        index = _index(rng, shape, -1)
        order = ", ".join(map(str, reversed(range(len(shape)))))
        made = template.format(t="t", i=index, p=order)
        try:
            view = eval(made, {"t": torch.zeros(shape, dtype=DTYPES[kind]), "torch": torch, "F": F, "self": _Self()})
        except Exception:
            return None
        if view.numel() == 0:
            return None
        if "uint8" in template:
            kind, constant = "int", rng.choice(("0", "1"))
        elif template == "{t}.float()":
            kind, constant = "float", "0.5"
        expression = template.format(t=expression, i=index, p=order)
        through.append(template)
        shape = tuple(view.shape)
    if kind == "int" and var.kind == "bool":
        forms: tuple[tuple[int, str], ...] = ANY
    else:
        forms = OPERATORS[kind]
    least, template = rng.choice(forms)
    if least > len(shape):
        return None
    target = name if through else var.name
    statement = template.format(t=target, c=constant, i=_index(rng, shape, -1), j=_index(rng, shape, 0))
    view_line = f"{name} = {expression}" if through else ""
    return Write(view_line, statement, var.role, " ".join(through) or "none", template)


class _Self:
    training = False


def _index(rng: random.Random, shape: tuple[int, ...], dim: int) -> int:
    return rng.randrange(shape[dim]) if shape else 0
