"""FlexAttention block masks through Inductor, written into the graph before AOTAutograd sees it.

The streaming rows are one ``flex_attention`` higher-order call. Its block plan is ordinary arange / where / clamp
nodes, O(N) in memory; the graph is its own cache key. The last rows are a second, small call (``rows.last_rows``):
inside the first, few blocks would walk all keys. This file has the CPU's form; CUDA's is in ``cuda.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Lowering, Operands, Writer, arange, first_position, length
from tmx_compile.lowering.flex import cuda as flex_cuda
from tmx_compile.lowering.flex.call import KeyBlocks, flex_call, placeholders, stored
from tmx_compile.lowering.scoring import Scoring
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Reason, Rejected

# 64-wide blocks were fastest or equal on CPU, 128 slowest (benchmarks/results). A power of two: the plan divides by a
# right shift, because Inductor asserts on an integer floor division of a symbolic length there.
_SHIFT = 6
_BLOCK = 1 << _SHIFT


class Flex(Lowering):
    """The ``flex`` lowering."""

    name = "flex"

    def inductor_options(self, call: AttentionCall) -> Mapping[str, Any]:
        """The CPU template cannot be fused with what follows it: "Unsupported for epilogue_nodes" stops the compile."""
        return {"epilogue_fusion": False} if call.query.device.type == "cpu" else {}

    def supports(self, call: AttentionCall) -> Accepted | Rejected:
        """What Inductor's FlexAttention templates take: forward only, float32, bfloat16, float16, a CPU with AVX2."""
        device = call.query.device.type
        if call.documents:
            return Rejected(Reason.NO_LOWERING, "flex: packed documents")
        if device == "cuda":
            return flex_cuda.supports(call)
        if device != "cpu":
            return Rejected(Reason.NO_LOWERING, f"flex: written for cpu and cuda, got {device}")
        if call.needs_grad:
            return Rejected(Reason.NO_LOWERING, "flex: Inductor's CPU template has no backward")
        if call.sink_logits is not None:
            return Rejected(Reason.NO_LOWERING, "flex: learned sinks, and Inductor's CPU template gives no log-sum-exp")
        if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Rejected(Reason.NO_LOWERING, f"flex: {call.query.dtype} is not float32, bfloat16 or float16")
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return Rejected(Reason.NO_LOWERING, "flex: this CPU has no AVX2")
        if 0 in call.query.shape or 0 in call.value.shape:
            return Rejected(Reason.NO_LOWERING, "flex: an empty tensor")
        if call.key_mask is not None and not isinstance(call.query.shape[0], int):
            return Rejected(Reason.NO_LOWERING, "flex: padding with a dynamic batch size")
        q_len = call.query.shape[2]
        last = call.geometry.last
        if (min(last, q_len) if isinstance(q_len, int) else last) > rows.MAX_LAST_ROWS:
            return Rejected(Reason.NO_LOWERING, f"flex: last={last} is more than {rows.MAX_LAST_ROWS}")
        return Accepted()

    def emit(self, write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
        """Streaming rows through FlexAttention, last rows through SDPA, joined; on CUDA, both through FlexAttention."""
        if call.query.device.type == "cuda":
            return flex_cuda.emit(write, call, operands)
        q, k, v, key_mask = operands.of_attention
        q_len, kv_len = length(q, 2), length(k, 2)
        where = rows.extent(key_mask, kv_len)
        ending = where if key_mask is None else rows.last_extent(where, kv_len, call.geometry.last)
        geometry = call.geometry.within_reach().bounded(kv_len, q_len)
        fakes = call.query, call.key, call.value
        own = [_own(x, fake) for x, fake in zip((q, k, v), fakes, strict=True)]
        scoring = Scoring.of(call, operands)
        out = _streaming(write, own, key_mask, where, geometry, scoring)
        if geometry.last > 0:
            final = rows.last_rows(q, k, v, key_mask, ending, geometry, scoring)
            out = rows.join(out, final, q, k, key_mask, ending, geometry.last, call.layout)
        if key_mask is not None:
            out = rows.zero_empty(out, q, k, key_mask, ending, geometry)
        return out


def _own(x: Any, fake: torch.Tensor) -> Any:
    """A tensor (B, H, N, D) in a buffer of its own, of just this shape.

    The template reads wrong elements of a query that is a slice of a larger tensor, or a view of a buffer of another
    shape (one head, or a product of merged batches), and 2.11 rejects inputs that share a buffer.
    """
    order = zip(fake.shape[::-1], fake.stride()[::-1], strict=True)
    expected: Any = 1
    for size, stride in order:
        if statically_known_true(size != 1) and statically_known_true(stride != expected):
            return x.contiguous()
        expected = expected * size
    # Where ``contiguous`` may do nothing: a gather of every row is never left out.
    return torch.index_select(x, 2, arange(x, length(x, 2)))


def _streaming(
    write: Writer, qkv: list[Any], key_mask: Any, where: rows.Extent, geometry: Geometry, scoring: Scoring
) -> Proxy:
    q, k, _ = qkv
    q_len, kv_len = length(q, 2), length(k, 2)
    offset = first_position(q, k)
    plan = KeyBlocks(_BLOCK, _BLOCK, *key_blocks(q, q_len, kv_len, where, key_mask is not None, geometry))
    buffers: tuple[Any, ...] = ()
    if key_mask is not None:
        # Keys first: the template's kernel knows no symbolic stride, and the batch is the static one of the two.
        buffers += tuple(stored(x) for x in (key_mask.transpose(0, 1), where.start[:, 0], where.end[:, 0]))
    if isinstance(offset, Proxy):
        # As a tensor: the CPU template captures no expression of two lengths.
        buffers += (stored(arange(q, 1) + offset),)
    constant = None if isinstance(offset, Proxy) else offset
    mask = _mask_mod(key_mask is not None, constant, geometry)
    flex = flex_call(write, qkv, (q_len, kv_len), plan, mask, buffers, scoring, {})
    out: Proxy = write.call(operator.getitem, flex, 0)
    return out


def key_blocks(
    like: Any, q_len: Any, kv_len: Any, where: rows.Extent, padded: bool, geometry: Geometry
) -> tuple[Any, Any]:
    """Key blocks of every block of rows: counts (B or 1, 1, Q) and indices (B or 1, 1, Q, K), int32.

    A row block touches the blocks of the sinks, then those of its window. Only a few columns of ``indices`` are ever
    read, but the CPU template asserts a full width of K = Skv / block: ``as_strided`` lets rows overlap, so that the
    storage stays O(Q).
    """
    sink, window = geometry.sink, geometry.window
    # Always a block to spare, and never one block alone: either would be a guard on the length. Inductor also asks if a
    # row's stride equals its width (a contiguous plan): one is odd, the other even, so that no length can answer yes.
    q_blocks = (q_len >> _SHIFT) + 2
    k_blocks = ((kv_len >> (_SHIFT + 1)) + 2) * 2
    first_row = arange(like, q_blocks)[None, :, None] * _BLOCK + (kv_len - q_len)
    last_row = torch.clamp(first_row + (_BLOCK - 1), max=kv_len - 1)
    near = (first_row - window).clamp(min=0) >> _SHIFT
    own = last_row >> _SHIFT
    start = where.start[:, :, None] if padded else 0
    # Sink blocks [far, far_end) that lie before the window's first block.
    far = torch.minimum(near, near * 0 + (start >> _SHIFT))
    sink_stop = ((start + (sink - 1)) >> _SHIFT) + 1 if sink > 0 else far
    far_count = (torch.minimum(near, near * 0 + sink_stop) - far).clamp(min=0)
    # Sinks that start at any position reach one block more than aligned ones.
    width = (_blocks_of(sink) + (1 if padded and sink > 0 else 0) + _blocks_of(window + 1) + 2) | 1
    column = arange(like, width)[None, None, :]
    index = torch.where(column < far_count, far + column, near + column - far_count)
    index = torch.minimum(index, own).to(torch.int32)
    count = (far_count + own - near + 1).clamp(min=0).to(torch.int32)[:, None, :, 0]
    batch = length(like, 0) if padded else 1
    flat = torch.nn.functional.pad(index.reshape(batch, q_blocks * width), (0, k_blocks))
    row_stride = q_blocks * width + k_blocks
    shape, strides = (batch, 1, q_blocks, k_blocks), (row_stride, row_stride, width, 1)
    return count, torch.as_strided(flat, shape, strides)


def _blocks_of(keys: int) -> int:
    return -(-keys // _BLOCK)


def _mask_mod(padded: bool, offset: int | None, geometry: Geometry) -> GraphModule:
    """The streaming part of the mask as a graph of (batch, head, row, key) and its buffers."""
    graph = Graph()
    placeholder = placeholders(graph)
    b, _, row, key = map(placeholder, ("b", "h", "row", "key"))
    start: Any = 0
    valid: Any = None
    if padded:
        key_mask, starts, ends = map(placeholder, ("key_mask", "start", "end"))
        start = starts[b]
        # A plain index would test the key against the number of keys, a symbol that the template's kernel lacks.
        inside = key < ends[b]
        masked_index = torch.ops.aten._unsafe_masked_index.default
        valid = key.tracer.create_proxy("call_function", masked_index, (key_mask, inside, [key, b], False), {})
    position = row + (placeholder("offset")[0] if offset is None else offset)
    allowed = formula.causal(position, key) & formula.streamed(position, key, start, geometry)
    allowed = formula.within(allowed, position, key, geometry.reach)
    graph.output((allowed if valid is None else allowed & valid).node)
    return GraphModule({}, graph)
