"""One ``flex_attention`` higher-order call, written into a graph by hand: what the CPU and the CUDA emission share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.proxy import GraphAppendingTracer

from tmx_compile.lowering.base import Writer, example, length

_OPTIONS = {
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,
    "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True,
    "OUTPUT_LOGSUMEXP": False,
    "OUTPUT_MAX": False,
}


def placeholders(graph: Graph) -> Callable[[str], Any]:
    """What adds an input to the graph of a ``mask_mod``, by name, and returns its proxy."""
    tracer = GraphAppendingTracer(graph)
    return lambda name: Proxy(graph.placeholder(name), tracer)


@dataclass(frozen=True)
class KeyBlocks:
    """Which blocks of keys each block of rows reads.

    counts (B or 1, 1, Q) and indices (B or 1, 1, Q, K), int32, for blocks of ``rows`` x ``keys``: of the K columns of a
    row, the first ``counts`` are read, and ``mask_mod`` applies. The blocks of ``full_counts`` and ``full_indices``, of
    the same shapes, are read without a mask. No block is in both, or twice in one.
    """

    rows: int
    keys: int
    counts: Any
    indices: Any
    full_counts: Any = None
    full_indices: Any = None


def flex_call(
    write: Writer,
    qkv: Sequence[Any],
    lengths: tuple[Any, Any],
    plan: KeyBlocks,
    mask_mod: GraphModule,
    buffers: tuple[Any, ...],
    scale: float,
    options: Mapping[str, Any],
) -> Proxy:
    """The call; its three results are out (B, H, Sq, Dv), log-sum-exp (B, H, Sq) float32 in base 2, maximum scores.

    ``lengths`` are Sq and Skv, as numbers or their nodes.
    ``mask_mod`` is a graph of (batch, head, row, key) and ``buffers``, which are tensors that went through
    :func:`stored`. The log-sum-exp is written only where ``options`` say ``OUTPUT_LOGSUMEXP``.
    """
    q, k, v = qkv
    score = write.submodule("tmx_score_mod", _score_mod())
    mask = write.submodule("tmx_mask_mod", mask_mod)
    unused = (None,) * (_tuple_length() - 9)
    lists = (plan.counts, plan.indices, plan.full_counts, plan.full_indices)
    block_mask = (*lengths, *lists, *unused, plan.rows, plan.keys, mask)
    # The call itself is not run on fakes: on CPU that would form the N x N scores.
    flex = write.call(_call_flex, q, k, v, score, block_mask, scale, {**_OPTIONS, **options}, (), buffers)
    flex.node.target = flex_attention
    return flex


def stored(x: Any, dims: int | None = None) -> Any:
    """``x`` as a tensor with storage and contiguous strides of its own; ``dims`` leaves out last dimensions of size 1.

    The templates read buffers and plans as they lie in memory. The CPU template cannot read a buffer that is still an
    expression; the CUDA template counts on contiguous strides, where Inductor may pad, and gives a dimension of size 1
    in a view the stride 0. ``as_strided`` makes Inductor compute its input first, dense, and has just these strides. On
    CUDA ``x`` must be computed and no view: of a view, Inductor takes the base.
    """
    sizes = [length(x, dim) for dim in range(example(x).dim() if dims is None else dims)]
    strides = [1, *sizes[:0:-1]][: len(sizes)]
    for dim in range(2, len(strides)):
        strides[dim] = strides[dim] * strides[dim - 1]
    return torch.as_strided(x.contiguous(), sizes, tuple(reversed(strides)))


def _call_flex(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ``flex_attention`` returns on fake tensors: out, log-sum-exp, maximum scores."""
    batch, heads, q_len = q.shape[:3]
    rows_only = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    return q.new_empty(batch, heads, q_len, v.shape[3]), rows_only, torch.empty_like(rows_only)


def _tuple_length() -> int:
    """Entries of a flattened ``BlockMask``: 13 in torch 2.11, 17 in 2.13; asked of torch, once per emission."""
    from torch.nn.attention.flex_attention import BlockMask

    ones = torch.ones(1, 1, 1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(ones, ones[..., None] - 1, BLOCK_SIZE=1, compute_q_blocks=False)
    return len(mask.as_tuple())


def _score_mod() -> GraphModule:
    """The identity, as a graph: torch's own identity function cannot be pickled and bypasses the cache."""
    graph = Graph()
    score, *_ = [graph.placeholder(name) for name in ("score", "b", "h", "row", "key")]
    graph.output(score)
    return GraphModule({}, graph)
