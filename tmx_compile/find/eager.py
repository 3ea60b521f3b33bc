"""Attention written out: ``softmax(query @ key^T * scale + mask) @ value`` as products and a softmax.

The search starts at a product, goes down its operands to a softmax and from there to another product. What lies on the
way back up is then read call by call (:mod:`tmx_compile.find.scores`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.fx import Node

from tmx_compile.find.axes import Axes, complete, forward, is_cast, is_expand, is_move, order_to, source_of
from tmx_compile.find.operand import IDENTITY, Found, operands
from tmx_compile.find.product import Product, factors_of, is_product, product_of
from tmx_compile.find.refusal import NotAttention, refuse
from tmx_compile.find.repeat import divides, same
from tmx_compile.find.scores import SOFTMAX, Scores
from tmx_compile.find.site import AttentionSite
from tmx_compile.graph.calls import call_of
from tmx_compile.graph.nodes import op_name, tensor_of
from tmx_compile.report import Reason, Rejected

# How many calls a search may look at: few lie between a softmax and its product, more between the products.
_WEIGHTS, _SCORES = 16, 64
_OTHER_WIDTH = frozenset({"cat", "getitem", "slice", "narrow", "pad", "constant_pad_nd"})
_GRAD_MODES = frozenset({"_set_grad_enabled", "set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"})


def find_eager(node: Node) -> AttentionSite | Rejected | None:
    """The product of attention weights and values, where the weights come from a softmax of another product."""
    if not is_product(node):
        return None
    for operand in factors_of(node):
        weights = _trail(operand, _is_softmax, _WEIGHTS)
        scores = _trail(source_of(weights[-1]), _multiplies_batches, _SCORES) if weights else None
        if weights is None or scores is None:
            continue
        try:
            return _read(node, operand, scores[::-1], weights[::-1])
        except NotAttention as error:
            rejected = error.rejected
            return Rejected(rejected.reason, rejected.detail, node)
    return None


# The way down ---------------------------------------------------------------------------------------------------------


def _trail(start: Node | None, end: Callable[[Node], bool], budget: int) -> list[Node] | None:
    """The nodes from ``start`` down to the first that is an ``end``, along tensors of the same rows."""
    if start is None:
        return None
    above: dict[Node, Node | None] = {start: None}
    stack = [start]
    while stack and len(above) <= budget:
        node = stack.pop()
        if end(node):
            trail: list[Node] = []
            step: Node | None = node
            while step is not None:
                trail.append(step)
                step = above[step]
            return trail[::-1]
        for source in reversed(_sources(node)):
            if source not in above:
                above[source] = node
                stack.append(source)
    return None


def _sources(node: Node) -> list[Node]:
    """The tensors that may be the scores below a call that may change them."""
    fake = tensor_of(node)
    if node.op not in ("call_function", "call_method") or is_product(node) or _is_softmax(node):
        return []
    call = call_of(node)
    if fake is None or (call is not None and call.name == "getitem" and tensor_of(call["input"]) is None):
        first = call.arguments.get("input") if call is not None else next(iter(node.args), None)
        return [first] if isinstance(first, Node) and first.op != "placeholder" else []
    source = source_of(node)
    if source is not None and (is_move(node) or is_cast(node) or is_expand(node)):
        return [source]
    rows, width = fake.shape[-2:] if fake.dim() >= 2 else (None, None)
    found: list[Node] = []
    for other in node.all_input_nodes:
        below = tensor_of(other)
        if below is None or below.dim() != fake.dim() or below.dim() < 3 or not below.dtype.is_floating_point:
            continue
        if same(below.shape[-2], rows) and (same(below.shape[-1], width) or op_name(node) in _OTHER_WIDTH):
            found.append(other)
    return found


def _is_softmax(node: Node) -> bool:
    return op_name(node) in SOFTMAX


def _multiplies_batches(node: Node) -> bool:
    """A product of two tensors that share a batch, as scores are; a product with weights does not."""
    if not is_product(node):
        return False
    product = product_of(node)
    return bool(product.shared) if product is not None else op_name(node) == "einsum"


# The way up -----------------------------------------------------------------------------------------------------------


def _read(node: Node, operand: Node, scores_path: list[Node], weights_path: list[Node]) -> AttentionSite:
    """The site of the product ``node``; the paths lead up from the first product and from the softmax."""
    first, second = product_of(scores_path[0]), product_of(node)
    if first is None or second is None:
        refuse(Reason.FORM, "a product that is not two tensors summed over one dimension", node)
    if second.left is not operand:
        second = second.swapped()
    first, names = _named(first)
    scores = _scores(first, names, [*scores_path[1:], *weights_path])
    if second.bias is not None or second.alpha != 1.0:
        refuse(Reason.SCORE_CHANGED, "the last product adds or scales", node)
    scores.check_uses(node)

    axes = dict(zip(second.left_axes, scores.axes, strict=True))
    free = [letter for letter in second.right_axes if letter not in axes]
    if axes[second.summed] != "k" or len(free) != 1:
        refuse(Reason.LAYOUT, "the weights are not multiplied with values over the keys", node)
    axes[free[0]] = "e"
    query, key, value = _choice(
        node,
        operands(first.node, first.left, _of(first.left_axes, names), ("q", "d")),
        operands(first.node, first.right, _of(first.right_axes, names), ("k", "d")),
        operands(node, second.right, _of(second.right_axes, axes), ("k", "e"), scales=False),
    )
    result, order = _result(node, _of(second.out_axes, axes))
    _check_sizes(node, scores, result, order, query, value)
    _check_dtypes(node, first.node, query, key)
    scale, softcap = scores.scoring(node)
    scale *= query.scale * key.scale
    if not math.isfinite(scale):
        refuse(Reason.SCALE, f"a scale of {scale:g}", node)
    _check_gradient_mode(result, first.node)
    return AttentionSite(
        result,
        query.operand,
        key.operand,
        value.operand,
        tuple(scores.masks),
        is_causal=False,
        scale=scale,
        form="eager",
        factor=scores.factor,
        softcap=softcap,
        sink_logits=scores.sinks,
        result_order=None if order == IDENTITY else order,
        effects=tuple(scores.effects),
    )


def _named(product: Product) -> tuple[Product, dict[str, str]]:
    """The first product with the queries on its left, and what its letters stand for."""
    out, shared = product.out_axes, product.shared
    if out[-1] in product.left_axes:
        product = product.swapped()
    names = {product.summed: "d", out[-1]: "k", out[-2]: "q"}
    leading = out[:-2]
    if out[-1] in shared or out[-2] in shared or out[-2] not in product.left_axes or not 1 <= len(leading) <= 3:
        refuse(Reason.LAYOUT, "the scores are not (batch, heads, rows, keys)", product.node)
    group = ""
    if len(leading) == 3:
        own = [letter for letter in leading if letter not in shared] or _unit_of_key(product, leading)
        group = own[0] if own else leading[-1]
        names[group] = "g"
    rest = leading.replace(group, "") if group else leading
    if any(letter not in shared for letter in rest):
        refuse(Reason.LAYOUT, "queries and keys do not share batch and heads", product.node)
    return product, names | dict(zip(rest, "*" if len(rest) == 1 else "bh", strict=True))


def _unit_of_key(product: Product, leading: str) -> list[str]:
    """The letters behind the batch whose axis has size 1 in the keys: the group that shares a key head."""
    fake = tensor_of(product.right)
    assert fake is not None
    sizes = dict(zip(product.right_axes, fake.shape, strict=True))
    return [letter for letter in leading[:0:-1] if same(sizes[letter], 1)]


def _of(letters: str, names: dict[str, str]) -> Axes:
    return tuple(names[letter] for letter in letters)


def _scores(product: Product, names: dict[str, str], path: Sequence[Node]) -> Scores:
    """Read everything from the first product to the weights."""
    scores = Scores(product.node, _of(product.out_axes, names))
    if product.alpha is None or product.beta is None:
        refuse(Reason.SCALE, "alpha or beta is not known at compile time", product.node)
    scores.multiply(product.alpha, product.node)
    if product.bias is not None:
        scores.mask(product.bias, "add", product.beta, product.node)
    for node in path:
        scores.advance(node)
    return scores


def _choice(
    node: Node, queries: Iterator[Found], keys: Iterator[Found], values: Iterator[Found]
) -> tuple[Found, Found, Found]:
    """The deepest query, and the deepest key and value that have as many heads as each other."""
    found = [list(every)[::-1] for every in (queries, keys, values)]
    for name, every in zip(("query", "key", "value"), found, strict=True):
        if not every:
            refuse(Reason.LAYOUT, f"the {name} is not (batch, heads, tokens, head_dim)", node)
    query = found[0][0]
    batch, heads = query.shape[:2]
    for key in found[1]:
        for value in found[2]:
            if not same(key.shape[1], value.shape[1]) or not divides(key.shape[1], heads):
                continue
            if same(key.shape[0], batch) and same(value.shape[0], batch) and same(key.shape[2], value.shape[2]):
                return query, key, value
    shapes = ", ".join(str(tuple(every[0].shape)) for every in found)
    return refuse(Reason.LAYOUT, f"query, key and value of {shapes}", node)


def _result(node: Node, axes: Axes) -> tuple[Node, tuple[int, ...]]:
    """The first tensor from the product on that is (batch, heads, rows, head_dim) in some order, and the order.

    The order is how (batch, heads, rows, head_dim) is permuted to it.
    """
    while True:
        axes = complete(axes, ("q", "e"))
        order = order_to(axes, ("q", "e"))
        if order is not None:
            return node, tuple(order.index(d) for d in range(4))
        users = list(node.users)
        moved = forward(users[0], axes) if len(users) == 1 and is_move(users[0]) else None
        if moved is None:
            shape = tuple(fake.shape) if (fake := tensor_of(node)) is not None else ()
            refuse(Reason.LAYOUT, f"the result of shape {shape} is not made (batch, heads, tokens, head_dim)", node)
        node, axes = users[0], moved


# What has to hold besides ---------------------------------------------------------------------------------------------


def _check_sizes(node: Node, scores: Scores, result: Node, order: tuple[int, ...], query: Found, value: Found) -> None:
    """The operands give a result, and scores, of the sizes that the graph has."""
    out = tensor_of(result)
    assert out is not None
    batch, heads, rows, _ = query.shape
    wanted = [(batch, heads, rows, value.shape[3])[d] for d in order]
    if not all(same(a, b) for a, b in zip(out.shape, wanted, strict=True)):
        refuse(Reason.LAYOUT, f"a result of {tuple(out.shape)} for queries of {tuple(query.shape)}", node)
    for name in ("b", "hg") if "hg" in scores.extents or "g" in scores.extents else ("b", "h"):
        scores.extent(name, batch if name == "b" else heads, node)


def _check_dtypes(node: Node, product: Node, query: Found, key: Found) -> None:
    """The operator computes in the result's dtype: nothing that the graph computes in a wider one may be lost."""
    fakes = [tensor_of(x) for x in (node, product, query.operand.node, key.operand.node)]
    out, scores, *inputs = (fake.dtype for fake in fakes if fake is not None)
    if not all(dtype.is_floating_point for dtype in (out, scores, *inputs)):
        refuse(Reason.FORM, f"a result of {out} from {scores}", node)

    def wider(dtype: torch.dtype) -> bool:
        return torch.promote_types(dtype, out) != out

    if wider(scores) and any(map(wider, inputs)):
        refuse(Reason.FORM, f"scores of {inputs[0]} and {inputs[1]} operands for a result of {out}", node)


def _check_gradient_mode(result: Node, product: Node) -> None:
    """One operator computes with or without gradients as a whole."""
    node = result
    while node is not product and node.op != "root":
        if op_name(node) in _GRAD_MODES:
            refuse(Reason.FORM, f"{node.name} changes the gradient mode inside", node)
        node = node.prev
