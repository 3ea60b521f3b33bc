"""``flex_attention`` in a Dynamo graph: the mask is its ``mask_mod``, and its block plan must agree with it."""

from __future__ import annotations

from typing import Any

import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import GraphModule, Node

from tmx_compile.find.repeat import divides, same, unrepeated
from tmx_compile.find.sdpa import scale_of
from tmx_compile.find.site import AttentionSite, BlockMaskNodes, MaskMod, Operand
from tmx_compile.graph.calls import bound, named
from tmx_compile.graph.erase import dead_ends
from tmx_compile.graph.nodes import INSERTED, tensor_of, value_of
from tmx_compile.graph.operators import Signature
from tmx_compile.report import Reason, Rejected

_SIGNATURE = Signature.of(
    "query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_other_buffers=(), "
    "mask_mod_other_buffers=()"
)
# torch's block size for "no block mask".
_NO_BLOCKS = 1 << 30


def find_flex(node: Node) -> AttentionSite | Rejected | None:
    """A ``flex_attention`` node. The site's node is its first result, the only one that may be used."""
    if node.op != "call_function" or node.target is not flex_attention or node.meta.get(INSERTED):
        return None
    given = bound(_SIGNATURE, node.args, node.kwargs)
    if given is None:
        return Rejected(Reason.FORM, "its arguments are not understood", node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    if not (isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node)):
        return Rejected(Reason.FORM, "an operand is not a tensor of the graph", node)
    q = tensor_of(query)
    if q is None or tensor_of(key) is None or tensor_of(value) is None:
        return Rejected(Reason.FORM, "tracing recorded no shape for it", node)
    out = _only_result(node)
    if isinstance(out, Rejected):
        return out
    change = _score_change(_child(node, given["score_mod"]))
    if change is None:
        return Rejected(Reason.SCORE_CHANGED, "score_mod is more than the score times a number and a softcap", node)
    scale = scale_of(given["scale"], q)
    if scale is None:
        return Rejected(Reason.SCALE, f"scale={given.get('scale')} is not known at compile time", node)
    base_key, key_factor = unrepeated(key)
    base_value, value_factor = unrepeated(value)
    if key_factor == value_factor:
        key, value = base_key, base_value
    operands = Operand(query), Operand(key), Operand(value)
    refused = _layout(node, *operands)
    if refused is not None:
        return refused
    mask = _mask(node, given, operands)
    if isinstance(mask, Rejected):
        return mask
    masks, plan = (mask[0],), mask[1]
    factor, softcap = change
    return AttentionSite(out, *operands, masks, False, scale * factor, "flex", softcap=softcap, block_plan=plan)


def _only_result(node: Node) -> Node | Rejected:
    """The node of the output; log-sum-exp and maxima are not those of the triangle."""
    taken = [(user, named(user, "getitem")) for user in node.users]
    results = [user for user, call in taken if call is not None and call["index"] == 0]
    if any(dead_ends(user) is None for user in node.users if user not in results):
        return Rejected(Reason.WEIGHTS_USED, "the log-sum-exp or the maximum scores are used", node)
    if len(results) != 1 or tensor_of(results[0]) is None:
        return Rejected(Reason.FORM, f"{len(results)} uses of the result", node)
    return results[0]


def _layout(node: Node, query: Operand, key: Operand, value: Operand) -> Rejected | None:
    q, k, v = query.fake, key.fake, value.fake
    if any(x.dim() != 4 for x in (q, k, v)):
        return Rejected(Reason.LAYOUT, "expected (batch, heads, tokens, head_dim)", node)
    if not (same(k.shape[1], v.shape[1]) and divides(_known(k.shape[1]), _known(q.shape[1]))):
        heads = f"{q.shape[1]} query heads, {k.shape[1]} key heads, {v.shape[1]} value heads"
        return Rejected(Reason.LAYOUT, heads, node)
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        return Rejected(Reason.LAYOUT, "query, key and value are broadcast over the batch", node)
    return None


def _mask(
    node: Node, given: dict[str, Any], operands: tuple[Operand, Operand, Operand]
) -> tuple[MaskMod, BlockMaskNodes | None] | Rejected:
    """The mask_mod and the block plan. The tuple has 13 entries in torch 2.11 and 17 in 2.13: its ends are the same."""
    entries = given["block_mask"]
    if not isinstance(entries, (tuple, list)) or len(entries) < 13:
        return Rejected(Reason.FORM, "the block mask is not understood", node)
    child = _child(node, entries[-1])
    buffers = given["mask_mod_other_buffers"]
    if child is None or not isinstance(buffers, (tuple, list)):
        return Rejected(Reason.FORM, "mask_mod is no graph", node)
    mod = MaskMod(child, tuple(buffers))
    lengths, (partial, full), (rows, keys) = entries[:2], (entries[2:4], entries[4:6]), entries[-3:-1]
    if rows == keys == _NO_BLOCKS:
        return mod, None
    q, k = operands[0].fake, operands[1].fake
    if not (_equals(lengths[0], q.shape[2]) and _equals(lengths[1], k.shape[2])):
        return Rejected(Reason.LAYOUT, "the block mask was made for other lengths", node)
    kept = [x for x in (*partial, *full) if x is not None]
    if len(kept) not in (2, 4) or kept[:2] != list(partial):
        return Rejected(Reason.FORM, "the block mask is not understood", node)
    for each in kept:
        fake = tensor_of(each)
        if fake is None or not _broadcasts(fake.shape[:2], q.shape[:2]):
            return Rejected(Reason.LAYOUT, "the block mask is for another batch or number of heads", node)
    return mod, BlockMaskNodes(rows, keys, tuple(partial), tuple(full) if len(kept) == 4 else None)


def _child(node: Node, arg: Any) -> GraphModule | None:
    owner = node.graph.owning_module
    if not isinstance(arg, Node) or arg.op != "get_attr" or owner is None:
        return None
    child = getattr(owner, str(arg.target), None)
    return child if isinstance(child, GraphModule) else None


def _score_change(score_mod: GraphModule | None) -> tuple[float, float | None] | None:
    """The number that a score_mod multiplies the score by, and its softcap; None for any other score_mod."""
    if score_mod is None:
        return None
    score = next(iter(score_mod.graph.find_nodes(op="placeholder")))
    result: Any = score_mod.graph.output_node().args[0]
    factor = 1.0
    softcap: float | None = None
    while result is not score:
        if isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
            continue
        call = named(result, "mul", "div", "tanh")
        if call is not None and call.name == "tanh" and softcap is None and factor > 0:
            # From below the number that multiplies is inside.
            result, softcap = call["input"], factor
            continue
        if call is None or call.name == "tanh" or call.arguments.get("rounding_mode") is not None:
            return None
        left, right = call["input"], call["other"]
        if call.name == "mul" and isinstance(left, (int, float)):
            left, right = right, left
        if isinstance(right, bool) or not isinstance(right, (int, float)) or right == 0:
            return None
        factor = factor * right if call.name == "mul" else factor / right
        result = left
    return factor, softcap


def _known(size: Any) -> Any:
    """A number that tracing has settled is one, though its type may still be that of a symbol."""
    settled = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if settled is None else settled


def _equals(arg: Any, size: Any) -> bool:
    value = value_of(arg) if isinstance(arg, Node) else arg
    return value is not None and same(value, size)


def _broadcasts(shape: Any, to: Any) -> bool:
    return all(same(a, 1) or same(a, b) for a, b in zip(shape, to, strict=True))
