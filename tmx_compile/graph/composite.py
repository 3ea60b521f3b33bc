"""Calls that hold a whole attention layer, as the operations that they run.

``nn.MultiheadAttention`` is one node of a Dynamo graph, and ``nn.TransformerEncoderLayer`` in inference another. Their
bodies are traced on the recorded values, so that whatever options a call has, its body means the same.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tmx_compile.graph.calls import named
from tmx_compile.graph.erase import dead_ends
from tmx_compile.graph.nodes import value_of
from tmx_compile.graph.sizes import size_of


def _encoder_layer(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
    *,
    weights: bool = False,
) -> Tensor:
    """What ``torch._transformer_encoder_layer_fwd`` computes for (batch, tokens, features), its mask true where masked.

    ``mask_type`` 0 is a mask over (rows, keys), 1 over (batch, keys), 2 over (batch, heads, rows, keys).
    """
    bias: Tensor | None = None
    if mask is not None:
        masked = mask.to(torch.bool)
        added = torch.zeros_like(masked, dtype=x.dtype).masked_fill(masked, -torch.inf)
        bias = added[None, None] if mask_type == 0 else added[:, None, None] if mask_type == 1 else added

    def attend(x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = F.linear(x, in_weight, in_bias).view(batch, tokens, 3, num_heads, embed_dim // num_heads)
        query, key, value = (heads[:, :, i].transpose(1, 2) for i in range(3))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return F.linear(out.transpose(1, 2).flatten(-2), out_weight, out_bias)

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, weight1, bias1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), weight2, bias2)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), weight, bias, eps)

    if norm_first:
        x = x + attend(norm(x, norm1_weight, norm1_bias))
        return x + feed(norm(x, norm2_weight, norm2_bias))
    x = norm(x + attend(x), norm1_weight, norm1_bias)
    return norm(x + feed(x), norm2_weight, norm2_bias)


def _multi_head_attention(*args: Any, weights: bool, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``, by one SDPA call where it can be; without ``weights`` these are not wanted.

    Torch merges the batch with the heads, and masks of both kinds with each other, before it takes them apart again.
    """
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    call = given.arguments
    extra = ("bias_k", "bias_v", "static_k", "static_v")
    plain = all(call[name] is None for name in extra) and not call["add_zero_attn"] and call["query"].dim() == 3
    if not plain or call["use_separate_proj_weight"] or (call["need_weights"] and weights):
        return F.multi_head_attention_forward(*args, **kwargs)
    query, key, value, heads = (call[name] for name in ("query", "key", "value", "num_heads"))
    rows, batch, embed_dim = query.shape
    biases = (None,) * 3 if call["in_proj_bias"] is None else call["in_proj_bias"].chunk(3)
    q, k, v = (
        F.linear(x, weight, bias).view(x.shape[0], batch, heads, embed_dim // heads).permute(1, 2, 0, 3)
        for x, weight, bias in zip((query, key, value), call["in_proj_weight"].chunk(3), biases, strict=True)
    )
    mask, padding = call["attn_mask"], call["key_padding_mask"]
    # The hint is taken at its word where there is nothing but it to apply.
    hinted = call["is_causal"] and padding is None and not call["need_weights"]
    added: Tensor | None = None
    if mask is not None and not hinted:
        added = _added(mask, query.dtype)
        added = added[None, None] if mask.dim() == 2 else added.view(batch, heads, rows, key.shape[0])
    if padding is not None:
        keys = _added(padding, query.dtype)[:, None, None]
        added = keys if added is None else added + keys
    dropout = call["dropout_p"] if call["training"] else 0.0
    out = F.scaled_dot_product_attention(q, k, v, added, dropout, is_causal=hinted)
    out = out.permute(2, 0, 1, 3).reshape(rows, batch, embed_dim)
    return F.linear(out, call["out_proj_weight"], call["out_proj_bias"]), None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores; a bool one is true where masked."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


COMPOSITES: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: _multi_head_attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
"""Calls that are traced, with the function that says what they compute; ``weights`` says if a last result is wanted."""


def body_of(call: Node) -> GraphModule | None:
    """The operations of a composite call, as a graph of its input nodes (in their order) that returns a tuple.

    Results that nothing needs are None in it. None where the body does not give what was recorded for the call, as
    under autocast, or cannot be traced.
    """
    function = COMPOSITES[call.target]
    inputs = call.all_input_nodes
    values = [value_of(node) for node in inputs]
    recorded = value_of(call)
    wanted = recorded if isinstance(recorded, (tuple, list)) else (recorded,)
    if recorded is None:
        wanted = tuple(_recorded(call, index) for index in range(2))
    needed = [value if _is_needed(call, index) else None for index, value in enumerate(wanted)]

    def run(*given: Any) -> tuple[Any, ...]:
        env = dict(zip(inputs, given, strict=True))
        args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), lambda node: env[node])
        out = function(*args, **kwargs, weights=needed[-1] is not None)
        results = out if isinstance(out, tuple) else (out,)
        return tuple(None if want is None else result for want, result in zip(needed, results, strict=True))

    try:
        # Tensors that the body makes belong to the same fake mode.
        mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), contextlib.nullcontext())
        with warnings.catch_warnings(), mode:
            warnings.simplefilter("ignore")
            body = make_fx(run, pre_dispatch=True)(*values)
    except (RuntimeError, TypeError, AssertionError):
        return None
    outputs = body.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list))
    if not all(_same(value_of(x) if isinstance(x, Node) else x, want) for x, want in zip(outputs, needed, strict=True)):
        return None
    for node in body.graph.nodes:
        if "val" in node.meta:
            node.meta = {"example_value": node.meta["val"]}
        out_of_place(node)
    body.graph.eliminate_dead_code()
    return body


def _recorded(call: Node, index: int) -> Any:
    """The value of one result, recorded where it is taken out of the tuple."""
    return next((value_of(user) for user in call.users if _takes(user, index)), None)


def _is_needed(call: Node, index: int) -> bool:
    if isinstance(value_of(call), Tensor):
        return True
    return any(_takes(user, index) and dead_ends(user) is None for user in call.users)


def _takes(user: Node, index: int) -> bool:
    taken = named(user, "getitem")
    return taken is not None and bool(taken["index"] == index)


def _same(value: object, want: object) -> bool:
    if isinstance(value, Tensor) and isinstance(want, Tensor):
        shapes = [tuple(map(size_of, x.shape)) for x in (value, want)]
        return all((shapes[0] == shapes[1], value.dtype == want.dtype, value.device == want.device))
    return value is None and want is None


def out_of_place(node: Node) -> None:
    """Write ``zeros_like(x).masked_fill_(...)`` without writing in place: nothing else sees the zeros."""
    filled = named(node, "masked_fill_")
    fresh = None if filled is None else named(filled["input"], "zeros_like")
    if fresh is None or len(fresh.node.users) > 1:
        return
    if node.op == "call_method":
        node.target = "masked_fill"
    elif node.target is torch.ops.aten.masked_fill_.Scalar:
        node.target = torch.ops.aten.masked_fill.Scalar
