"""The way from ``query @ key^T`` through the softmax to the weights, read call by call with exact bookkeeping.

After every call the scores are ``product * scale * factor``, masked by ``masks``: whatever multiplies the scores later
multiplies what an additive mask adds, and the number that a filled score has got.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from tmx_compile.find.axes import (
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
from tmx_compile.find.constant import number_of
from tmx_compile.find.learned_sinks import drops_sinks, joined_sinks
from tmx_compile.find.refusal import check_dropout, refuse
from tmx_compile.find.repeat import same
from tmx_compile.find.site import MaskPart, SinkLogits
from tmx_compile.graph.calls import Call, call_of, named
from tmx_compile.graph.effects import writes
from tmx_compile.graph.nodes import op_name, tensor_of
from tmx_compile.report import Reason

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
DROPOUT = frozenset({"dropout", "native_dropout"})
_MAXIMA = frozenset({"amax", "max"})
_SHAPE_READERS = frozenset(
    """size sym_size dim ndimension numel ones_like zeros_like full_like empty_like rand_like
    new_ones new_zeros new_full new_empty _assert_tensor_metadata""".split()  # noqa: SIM905
)
_LIKE_ANOTHER = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
ROWS_AND_KEYS = ("q", "k")


def plain_name(node: Node) -> str:
    """:func:`op_name` without the mark of a call that works in place."""
    return op_name(node).rstrip("_") if writes(node) else op_name(node)


@dataclass
class Scores:
    """Scores on their way; ``axes`` are the names of the present tensor's axes.

    Attributes:
        scale: number that the product has been multiplied by; once capped, that the hyperbolic tangent has been.
        capped: number that the product was multiplied by before its hyperbolic tangent was taken; None: it was not.
        sinks: learned sinks that were joined to the scores, with ``before_sinks``, the scores without them.
        shifted: whether the row's maximum has been subtracted.
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
    capped: float | None = None
    sinks: SinkLogits | None = None
    before_sinks: Node | None = None
    shifted: bool = False
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
        if writes(node) or node.is_impure():
            # Dropout counts as impure even where it does nothing.
            self.effects.append(node)
        name, call = plain_name(node), call_of(node)
        if name in DROPOUT:
            check_dropout(node)
        elif op_name(self.present) == "native_dropout" and call is not None and call.arguments.get("index") == 0:
            pass
        elif is_move(node) or is_cast(node):
            self._move(node)
        elif name in SOFTMAX and not self.weights:
            self._softmax(node)
        elif self.weights and call is not None and self._drops_sinks(call):
            self._name(self.axes, node)
        elif self.weights:
            if call is None or not (name == "where" and self._clears_empty_rows(call)):
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
        call = call_of(node)
        dim = None if call is None else call["dim"]
        if not isinstance(dim, int) or self.axes[dim] != "k":
            refuse(Reason.FORM, f"the softmax is not over the keys (dim={dim})", node)
        self.weights = True

    def _clears_empty_rows(self, call: Call) -> bool:
        """``where(not any(not(scores == -inf)), 0, weights)``: SDPA written out gives rows without a key zeros."""
        if call["other"] is not self.present or number_of(call["input"]) != 0.0:
            return False
        no_key = call["condition"]
        steps: list[Call] = []
        for name in ("not", "any", "not", "eq"):
            step = named(no_key, name)
            if step is None:
                return False
            steps.append(step)
            no_key = step["input"]
        _, some, _, equal = steps
        over_keys = some["dim"] in (-1, [-1], (-1,)) and some["keepdim"] is True
        before = source_of(self.present) if op_name(self.present) in SOFTMAX else None
        if not over_keys or no_key is not before or number_of(equal["other"]) != -math.inf:
            return False
        self.helpers |= {step.node for step in steps}
        return True

    # Scaling and masking ----------------------------------------------------------------------------------------------

    def _change(self, node: Node, name: str) -> None:
        old, new, call = tensor_of(self.present), tensor_of(node), call_of(node)
        assert old is not None
        unread = Reason.WRITTEN_IN_PLACE if writes(node) else Reason.SCORE_CHANGED
        if name == "cat" and call is not None:
            self._join(call)
            return
        if self.sinks is not None and name != "sub":
            refuse(Reason.SCORE_CHANGED, f"{name} of the scores and their sinks", node)
        if new is None or call is None or list(call.arguments.values()).count(self.present) != 1:
            refuse(unread, f"{name} before the softmax", node)
        if not same_shape(old.shape, new.shape):
            refuse(Reason.SCORE_CHANGED, f"{name} changes the shape of the scores", node)
        if name in ("mul", "div", "neg"):
            self._multiply(call, name)
        elif name in ("add", "sub", "rsub"):
            self._add(call, name)
        elif name == "tanh":
            self._cap(node)
        elif name in ("maximum", "max", "clamp"):
            self._clamp(call, name)
        elif name == "masked_fill":
            if call["input"] is not self.present:
                refuse(Reason.SCORE_CHANGED, "the scores are no scores of their own", node)
            self._fill(node, call["mask"], "drop", call["value"])
        elif name == "where":
            if call["input"] is self.present:
                self._fill(node, call["condition"], "keep", call["other"])
            elif call["other"] is self.present:
                self._fill(node, call["condition"], "drop", call["input"])
            else:
                refuse(Reason.SCORE_CHANGED, "the scores are a condition", node)
        else:
            refuse(unread, f"{name} before the softmax", node)

    def _join(self, call: Call) -> None:
        """Learned sinks as one more column, behind the keys."""
        sinks = None if self.sinks or self.shifted else joined_sinks(call, self.present, self.axes)
        if sinks is None:
            refuse(Reason.SCORE_CHANGED, "columns are joined to the scores, and are no learned sinks", call.node)
        self.sinks, self.before_sinks = sinks, self.present
        self._name(self.axes, call.node)

    def _drops_sinks(self, call: Call) -> bool:
        before = self.before_sinks
        if before is None or call["input"] is not self.present or not drops_sinks(call, before):
            return False
        self.before_sinks = None
        return True

    def _cap(self, node: Node) -> None:
        """A softcap: what is multiplied from now on is its own height."""
        if self.capped is not None or self.masks or self.shifted:
            what = "of masked scores" if self.masks else "of scores that are none any more"
            refuse(Reason.SCORE_CHANGED, f"a hyperbolic tangent {what}", node)
        self.capped, self.scale = self.scale, 1.0

    def scoring(self, node: Node) -> tuple[float, float | None]:
        """The scale and the softcap, once everything is read."""
        if self.before_sinks is not None:
            refuse(Reason.SCORE_CHANGED, "the sinks' weights are not dropped behind the softmax", node)
        if self.capped is None:
            return self.scale, None
        if self.scale <= 0:
            refuse(Reason.SCORE_CHANGED, f"a softcap of {self.scale:g}", node)
        return self.capped * self.scale, self.scale

    def _other(self, call: Call) -> Any:
        """The operand of a call of two that is not the scores."""
        return call["other"] if call["input"] is self.present else call["input"]

    def _multiply(self, call: Call, name: str) -> None:
        node = call.node
        if name == "neg":
            self.multiply(-1.0, node)
            return
        other = self._other(call)
        divides = name == "div"
        if divides and (call["input"] is not self.present or call["rounding_mode"] is not None):
            how = "the scores below" if call["rounding_mode"] is None else "a rounding mode"
            refuse(Reason.SCORE_CHANGED, f"{name} with {how}", node)
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
        if divides or not known or self.factor is not None or self.masks or self.capped is not None:
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

    def _add(self, call: Call, name: str) -> None:
        node, other = call.node, self._other(call)
        alpha = number_of(call["alpha"])
        if alpha != 1 or name == "rsub" or (name == "sub" and call["input"] is not self.present):
            refuse(Reason.SCORE_CHANGED, f"{name} with alpha={alpha}, or of the scores", node)
        if name == "sub" and self._is_row_maximum(other):
            self.shifted = True
            return
        if self.sinks is not None:
            refuse(Reason.SCORE_CHANGED, f"{name} of the scores and their sinks", node)
        if not isinstance(other, Node) or tensor_of(other) is None:
            refuse(Reason.SCORE_CHANGED, f"{name} of {other}", node)
        self.mask(other, "add", -1.0 if name == "sub" else 1.0, node)

    def _is_row_maximum(self, node: Any) -> bool:
        """The greatest score of each row: softmax does not see that it is subtracted."""
        steps: list[Node] = []
        while (call := call_of(node)) is not None and len(steps) < 4:
            steps.append(call.node)
            source = source_of(call.node)
            if call.name in _MAXIMA:
                dim = call["dim"]
                dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
                if source not in self.chain or not isinstance(dim, int) or call["keepdim"] is not True:
                    return False
                fake = tensor_of(source)
                assert fake is not None
                if dim % fake.dim() != fake.dim() - 1 or self.axes[-1] != "k":
                    return False
                self.helpers |= set(steps)
                return True
            values = call.arguments.get("index") == 0 or call.arguments.get("name") == "values"
            if call.name not in ("detach", "alias") and not (call.name in ("getitem", "getattr") and values):
                return False
            node = call["input"]
        return False

    def _clamp(self, call: Call, name: str) -> None:
        """From below at the dtype's least number: no finite score is lower, and what is masked stays masked."""
        node, fake = call.node, tensor_of(self.present)
        assert fake is not None
        if name == "clamp" and (call["input"] is not self.present or call["max"] is not None):
            refuse(Reason.SCORE_CHANGED, "the scores are clamped from above", node)
        low = number_of(call["min"] if name == "clamp" else self._other(call))
        new = tensor_of(node)
        assert new is not None
        if low is None or low > torch.finfo(fake.dtype).min or new.dtype != fake.dtype:
            refuse(Reason.SCORE_CHANGED, f"{name} of the scores and {low}", node)
        self.masks = [replace(x, number=max(x.number, low)) if x.how != "add" else x for x in self.masks]

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
            if source is None or writes(mask) or not (is_reshape(mask) or is_cast(mask) or order_of(mask)):
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
                if user in own or (self._reads_shape(user, node) and not writes(user)):
                    continue
                if user.users or user.op == "output" or writes(user) or user.is_impure():
                    refuse(Reason.WEIGHTS_USED, f"{user.name} reads {node.name}", user)
                # Nothing needs it, and it would keep the scores.
                self.effects.append(user)

    def _reads_shape(self, user: Node, node: Node) -> bool:
        name = op_name(user)
        call = call_of(user)
        if name == "getattr":
            return call is not None and call["name"] in ("shape", "dtype", "device", "ndim")
        return name in _SHAPE_READERS or (name in _LIKE_ANOTHER and call is not None and call["input"] is not node)


def _writes(user: Node, node: Node) -> bool:
    return writes(user) and bool(user.args) and user.args[0] is node
