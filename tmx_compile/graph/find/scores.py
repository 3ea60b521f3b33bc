"""The way from ``query @ key^T`` through the softmax to the weights, read call by call with exact bookkeeping.

After every call the scores are ``product * scale * factor``, masked by ``masks``: whatever multiplies the scores later
multiplies what an additive mask adds, and the number that a filled score has got.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch.fx import Node

from tmx_compile.graph.find.axes import (
    Axes,
    backward,
    complete,
    forward,
    heads_of,
    is_cast,
    is_move,
    is_reshape,
    order_of,
    same_shape,
    source_of,
)
from tmx_compile.graph.find.constant import number_of
from tmx_compile.graph.find.operand import DIVISIONS, MULTIPLICATIONS
from tmx_compile.graph.find.repeat import same
from tmx_compile.graph.nodes import is_in_place, op_name, tensor_of
from tmx_compile.graph.site import MaskPart
from tmx_compile.report import Reason, Rejected

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
DROPOUT = frozenset({"dropout", "native_dropout"})
_MAXIMA = frozenset({"amax", "max"})
_SHAPE_READERS = frozenset(
    """size sym_size dim ndimension numel getattr ones_like zeros_like full_like empty_like rand_like
    new_ones new_zeros new_full new_empty _assert_tensor_metadata""".split()  # noqa: SIM905
)
_LIKE_ANOTHER = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
ROWS_AND_KEYS = ("q", "k")


class NotAttention(Exception):
    """Raised while reading, with the refusal that it becomes."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(str(rejected))
        self.rejected = rejected


def refuse(reason: Reason, detail: str, node: Node) -> NoReturn:
    """Give up a site."""
    raise NotAttention(Rejected(reason, detail, node))


def plain_name(node: Node) -> str:
    """:func:`op_name` without the mark of a call that works in place."""
    name = op_name(node)
    if not is_in_place(node):
        return name
    return _IN_PLACE.get(name, name.rstrip("_"))


@dataclass
class Scores:
    """Scores on their way; ``axes`` are the names of the present tensor's axes.

    Attributes:
        scale: number that the product has been multiplied by.
        factor: 0-d tensor that it has been multiplied by, at most one; ``factor_reader`` is the call that did.
        masks: what masks the scores, with the numbers of the present tensor.
        chain: the tensors between the product and the weights, each read by the next.
        helpers: other calls on them that go with the site.
        effects: calls on them with an effect, which go with the site too.
        extents: sizes of batch and heads, wherever they were seen.
    """

    present: Node
    axes: Axes
    scale: float = 1.0
    factor: Node | None = None
    factor_reader: Node | None = None
    masks: list[MaskPart] = field(default_factory=list)
    chain: list[Node] = field(default_factory=list)
    helpers: set[Node] = field(default_factory=set)
    effects: list[Node] = field(default_factory=list)
    extents: dict[str, Any] = field(default_factory=dict)
    weights: bool = False

    def __post_init__(self) -> None:
        self.chain.append(self.present)
        self._name(self.axes)

    # Walking ----------------------------------------------------------------------------------------------------------

    def advance(self, node: Node) -> None:
        """Go on to the next call of the chain, after what is written into the present tensor before it."""
        written = [user for user in self.present.users if user is not node and _writes(user, self.present)]
        for user in sorted(written):
            if user.users or not user < node:
                refuse(Reason.WRITTEN_IN_PLACE, f"{user.name} writes into the scores", user)
            self._take(user)
        self._take(node)
        self.present = node
        self.chain.append(node)

    def _take(self, node: Node) -> None:
        if is_in_place(node) or node.is_impure():
            # Dropout counts as impure even where it does nothing.
            self.effects.append(node)
        name = plain_name(node)
        if name in DROPOUT:
            check_dropout(node)
        elif name == "getitem" and op_name(self.present) == "native_dropout" and node.args[1] == 0:
            pass
        elif is_move(node) or is_cast(node):
            self._move(node)
        elif name in SOFTMAX and not self.weights:
            self._softmax(node)
        elif self.weights:
            if not (name == "where" and self._clears_empty_rows(node)):
                refuse(Reason.SCORE_CHANGED, f"{name} after the softmax", node)
        else:
            self._change(node, name)

    def _move(self, node: Node) -> None:
        axes = forward(node, self.axes)
        if axes is None:
            refuse(Reason.LAYOUT, f"{node.name} cuts rows or keys", node)
        self._name(axes, node)

    def _name(self, axes: Axes, node: Node | None = None) -> None:
        self.axes = complete(axes, ROWS_AND_KEYS)
        fake = tensor_of(node or self.present)
        assert fake is not None
        for name, size in zip(self.axes, fake.shape, strict=True):
            self.extent(name, size, node or self.present)

    def extent(self, name: str, size: Any, node: Node) -> None:
        """Batch and heads have one size each, however often they are merged and split."""
        if name in ("b", "h", "g", "hg") and not same(self.extents.setdefault(name, size), size):
            refuse(Reason.LAYOUT, f"{self.extents[name]} is {size} at {node.name}", node)

    # Softmax ----------------------------------------------------------------------------------------------------------

    def _softmax(self, node: Node) -> None:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not isinstance(dim, int) or self.axes[dim] != "k":
            refuse(Reason.FORM, f"the softmax is not over the keys (dim={dim})", node)
        self.weights = True

    def _clears_empty_rows(self, node: Node) -> bool:
        """``where(not any(not(scores == -inf)), 0, weights)``: SDPA written out gives rows without a key zeros."""
        if len(node.args) != 3 or node.args[2] is not self.present or number_of(node.args[1]) != 0.0:
            return False
        no_key = node.args[0]
        steps: list[Node] = []
        for name in ("not", "any", "not", "eq"):
            if not isinstance(no_key, Node) or op_name(no_key) != name or not no_key.args:
                return False
            steps.append(no_key)
            no_key = no_key.args[0]
        _, some, _, equal = steps
        over_keys = some.args[1:] in ((-1, True), ([-1], True), ((-1,), True))
        before = source_of(self.present) if op_name(self.present) in SOFTMAX else None
        if not over_keys or no_key is not before or number_of(equal.args[1]) != -math.inf:
            return False
        self.helpers |= set(steps)
        return True

    # Scaling and masking ----------------------------------------------------------------------------------------------

    def _change(self, node: Node, name: str) -> None:
        operands = [arg for arg in node.args if arg is self.present]
        old, new = tensor_of(self.present), tensor_of(node)
        assert old is not None
        unread = Reason.WRITTEN_IN_PLACE if is_in_place(node) else Reason.SCORE_CHANGED
        if name in ("cat", "concat", "concatenate"):
            refuse(Reason.SCORE_CHANGED, "columns are joined to the scores, such as attention sinks", node)
        if new is None or len(operands) != 1 or "out" in node.kwargs:
            refuse(unread, f"{name} before the softmax", node)
        if not same_shape(old.shape, new.shape):
            refuse(Reason.SCORE_CHANGED, f"{name} changes the shape of the scores", node)
        if name in MULTIPLICATIONS or name in DIVISIONS or name == "neg":
            self._multiply(node, name)
        elif name in ("add", "sub"):
            self._add(node, name)
        elif name == "masked_fill":
            mask = node.args[1] if len(node.args) > 1 else node.kwargs.get("mask")
            value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value")
            if node.args[0] is not self.present:
                refuse(Reason.SCORE_CHANGED, "the scores are no scores of their own", node)
            self._fill(node, mask, "drop", value)
        elif name == "where" and len(node.args) == 3:
            condition, yes, no = node.args
            if node.op == "call_method":
                condition, yes = yes, condition
            if yes is self.present:
                self._fill(node, condition, "keep", no)
            elif no is self.present:
                self._fill(node, condition, "drop", yes)
            else:
                refuse(Reason.SCORE_CHANGED, "the scores are a condition", node)
        else:
            refuse(unread, f"{name} before the softmax", node)

    def _other(self, node: Node) -> Any:
        """The operand of a call of two that is not the scores."""
        if len(node.args) != 2:
            refuse(Reason.SCORE_CHANGED, f"{node.name} has more than two operands", node)
        return node.args[1] if node.args[0] is self.present else node.args[0]

    def _multiply(self, node: Node, name: str) -> None:
        if name == "neg":
            self.multiply(-1.0, node)
            return
        other = self._other(node)
        divides = name in DIVISIONS
        if node.kwargs or (divides and node.args[0] is not self.present):
            refuse(Reason.SCORE_CHANGED, f"{name} with {', '.join(node.kwargs) or 'the scores below'}", node)
        number = number_of(other)
        if number is not None:
            if divides and number == 0:
                refuse(Reason.SCALE, "the scores are divided by 0", node)
            self.multiply(1.0 / number if divides else number, node)
            return
        fake = tensor_of(other)
        if fake is not None and any(not same(size, 1) for size in fake.shape[-2:]):
            refuse(Reason.SCORE_CHANGED, f"multiplied by a tensor of shape {tuple(fake.shape)}", node)
        known = isinstance(other, Node) and fake is not None and fake.dim() == 0 and fake.dtype.is_floating_point
        if divides or not known or self.factor is not None or self.masks:
            how = "divided by" if divides else "multiplied by"
            refuse(Reason.SCALE, f"{how} {other}, which is not known at compile time", node)
        self.factor, self.factor_reader = other, node

    def multiply(self, number: float, node: Node) -> None:
        """Multiply the scores as they stand, masks included."""
        if not math.isfinite(number):
            refuse(Reason.SCALE, f"a factor of {number:g}", node)
        if self.masks and number <= 0:
            refuse(Reason.SCORE_CHANGED, f"masked scores are multiplied by {number:g}", node)
        self.scale *= number
        self.masks = [replace(part, number=part.number * number) for part in self.masks]

    def _add(self, node: Node, name: str) -> None:
        other = self._other(node)
        alpha = number_of(node.kwargs.get("alpha", 1))
        first = node.args[0] is self.present
        if set(node.kwargs) - {"alpha"} or alpha != 1 or (name == "sub" and not first):
            refuse(Reason.SCORE_CHANGED, f"{name} with alpha={alpha}, or of the scores", node)
        if name == "sub" and self._is_row_maximum(other):
            return
        if not isinstance(other, Node) or tensor_of(other) is None:
            refuse(Reason.SCORE_CHANGED, f"{name} of {other}", node)
        self.mask(other, "add", -1.0 if name == "sub" else 1.0, node)

    def _is_row_maximum(self, node: Any) -> bool:
        """The greatest score of each row: softmax does not see that it is subtracted."""
        steps: list[Node] = []
        while isinstance(node, Node) and len(steps) < 4:
            steps.append(node)
            if op_name(node) in _MAXIMA:
                given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
                dim = given.get("dim")
                dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
                source = source_of(node)
                if source not in self.chain or not isinstance(dim, int) or given.get("keepdim") is not True:
                    return False
                fake = tensor_of(source)
                assert fake is not None
                if dim % fake.dim() != fake.dim() - 1 or self.axes[-1] != "k":
                    return False
                self.helpers |= set(steps)
                return True
            if op_name(node) not in ("getitem", "getattr", "detach", "alias"):
                return False
            if node.args[1:] not in ((0,), ("values",), ()):
                return False
            node = node.args[0]
        return False

    def _fill(self, node: Node, condition: Any, how: Any, value: Any) -> None:
        number = number_of(value)
        fake = tensor_of(condition)
        if fake is None or str(fake.dtype) != "torch.bool":
            refuse(Reason.FORM, f"{condition} is no boolean mask", node)
        if number is None:
            refuse(Reason.MASK_UNKNOWN, f"masked scores become {value}, which is not known at compile time", node)
        self.mask(condition, how, number, node)

    def mask(self, mask: Node, how: Any, number: float, node: Node) -> None:
        """Take a mask that broadcasts to the scores as they stand."""
        fake = tensor_of(mask)
        assert fake is not None
        shape = tuple(fake.shape)
        if how == "add" and not fake.dtype.is_floating_point:
            refuse(Reason.FLOAT_BIAS, f"adds {mask.name} of {fake.dtype}", node)
        named = [name if not same(size, 1) else "" for name, size in zip(self.axes[::-1], shape[::-1], strict=False)]
        aligned = self._aligned(mask, tuple(reversed(named)))
        if aligned is None:
            reason = Reason.FLOAT_BIAS if how == "add" else Reason.LAYOUT
            refuse(reason, f"{mask.name} of shape {shape} has no (batch, heads, rows, keys)", node)
        self.masks.append(MaskPart(aligned, how, number))

    def _aligned(self, mask: Node, axes: Axes) -> Node | None:
        """The tensor below a mask that broadcasts to (batch, heads, rows, keys), seen through reshapes."""
        grouped = "h" in self.axes and "g" in self.axes
        heads = "hg" if grouped else heads_of(self.axes)
        for _ in range(6):
            wanted = ("b", heads, "q", "k")[-len(axes) :] if axes else ()
            if len(axes) <= 4 and all(name in ("", want) for name, want in zip(axes, wanted, strict=True)):
                return mask
            source = source_of(mask)
            if source is None or is_in_place(mask) or not (is_reshape(mask) or is_cast(mask) or order_of(mask)):
                return None
            below = backward(mask, axes)
            if below is None:
                return None
            fake = tensor_of(source)
            assert fake is not None
            mask, axes = source, below
            for name, size in zip(axes, fake.shape, strict=True):
                self.extent(name, size, mask)
        return None

    # Other uses -------------------------------------------------------------------------------------------------------

    def check_uses(self, last: Node) -> None:
        """Nothing but the chain, up to ``last``, may read the scores and weights; shapes and dtypes may be read."""
        own = {*self.chain, *self.helpers, *self.effects, last}
        for node in (*self.chain, *self.helpers):
            for user in node.users:
                if user in own or (self._reads_shape(user, node) and not is_in_place(user)):
                    continue
                if user.users or user.op == "output" or is_in_place(user) or user.is_impure():
                    refuse(Reason.WEIGHTS_USED, f"{user.name} reads {node.name}", user)
                # Nothing needs it, and it would keep the scores.
                self.effects.append(user)

    def _reads_shape(self, user: Node, node: Node) -> bool:
        name = op_name(user)
        if name == "getattr":
            return user.args[1] in ("shape", "dtype", "device", "ndim")
        return name in _SHAPE_READERS or (name in _LIKE_ANOTHER and user.args[0] is not node)


def _writes(user: Node, node: Node) -> bool:
    return is_in_place(user) and bool(user.args) and user.args[0] is node


def check_dropout(node: Node) -> None:
    """Dropout that does nothing: outside of training, or of probability 0."""
    names = ("p", "training", "inplace") if op_name(node) != "native_dropout" else ("p", "train")
    given: dict[str, Any] = {"train": True, "training": True, "p": 0.5}
    given |= dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    training = given["train"] is not False and given["training"] is not False
    if training and not (isinstance(given["p"], (int, float)) and given["p"] == 0):
        refuse(Reason.DROPOUT, f"p={given['p']} on the weights", node)
