"""FlexAttention on CUDA: the streaming rows in one call with a compact block plan, the last rows in a second.

In one call, the few programs of the last rows would walk all keys one after another. So the last rows stand in the
second call several times over, each copy with its own part of the keys, and a log-sum-exp merge joins the copies.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Proxy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tmx_compile.lowering import rows
from tmx_compile.lowering.base import AttentionCall, Operands, Writer, arange, example, first_position, length, symbol
from tmx_compile.lowering.flex.call import flex_call, placeholders, stored
from tmx_compile.lowering.flex.plan import Tiles, last_plan, streaming_plan
from tmx_compile.mask import formula
from tmx_compile.mask.geometry import Geometry
from tmx_compile.report import Accepted, Reason, Rejected

# Wider plans would still be O(N), but their index tensors would be a burden of their own.
_MAX_REACH = 1 << 16
_HEAD_DIMS = (16, 256)

# Programs of the last rows' call: two waves of an H100's 132 processors, nearly full.
_PROGRAMS = 256
_MAX_COPIES = 64

# The template computes a key's offset within its head in 32 bits. Keys this close reach a million tokens.
_OFFSETS = 1 << 31
_CLOSE = 1 << 11


def supports(call: AttentionCall) -> Accepted | Rejected:
    """What Inductor's CUDA template takes: forward, float32, bfloat16, float16, head dims from 16 to 256."""
    no = Reason.NO_LOWERING
    if call.needs_grad:
        return Rejected(no, "flex: forward only")
    if call.query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Rejected(no, f"flex: {call.query.dtype} is not float32, bfloat16 or float16")
    static = (call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
    if not all(isinstance(size, int) for size in static):
        return Rejected(no, "flex: a dynamic number of heads or head dim")
    least, most = _HEAD_DIMS
    for name, dim in (("head dim", static[2]), ("value dim", static[3])):
        if not least <= dim <= most:
            return Rejected(no, f"flex: {name} {dim} is not from {least} to {most}, the sizes its CUDA template takes")
    if 0 in call.query.shape or 0 in call.key.shape:
        return Rejected(no, "flex: an empty tensor")
    for name, count, longest, limit in (
        ("window", call.geometry.window, call.key.shape[2], _MAX_REACH),
        ("sink", call.geometry.sink, call.key.shape[2], _MAX_REACH),
        ("last", call.geometry.last, call.query.shape[2], rows.MAX_LAST_ROWS),
    ):
        if (min(count, longest) if isinstance(longest, int) else count) > limit:
            return Rejected(no, f"flex: {name}={count} is more than {limit}")
    return Accepted()


def emit(write: Writer, call: AttentionCall, operands: Operands) -> Proxy:
    """Streaming rows, last rows, and the last rows written over the streaming ones in place."""
    q, key_mask = operands.query, operands.key_mask
    k, v = (close_keys(x) for x in (operands.key, operands.value))
    q_len, kv_len = length(q, 2), length(k, 2)
    where = rows.extent(key_mask, kv_len)
    ending = where if key_mask is None else rows.last_extent(where, kv_len, call.geometry.last)
    whole_is_last = key_mask is None or ending is not where
    geometry = call.geometry.within_reach().bounded(kv_len, q_len)
    # As int8, which is surely computed: `stored` must not meet a view.
    valid = None if key_mask is None else stored(key_mask.to(torch.int8))
    if isinstance(q_len, int) and geometry.last == q_len and whole_is_last:
        whole: Proxy = _last(write, [q, k, v], valid, ending, geometry, call.scale)[0]
        return whole
    out = _streaming(write, [q, k, v], valid, where, geometry, call.scale)
    if geometry.last > 0:
        final, index, position = _last(write, [q, k, v], valid, ending, geometry, call.scale)
        # Inductor does `index_put` in place on the template's output; a concatenation would copy all of it. Rows that
        # do not exist repeat row 0 with row 0's own result.
        if valid is None:
            out = write.call(torch.ops.aten.index_put.default, out, [None, None, index], final)
        else:
            # A row that is no last row keeps what it has: it stands for one that does not exist.
            places = index[:, None, :, None].expand(-1, length(q, 1), -1, length(v, 3))
            kept: Any = out.gather(2, places)
            final = torch.where((position >= 0)[:, None, :, None], final, kept)
            sequence = arange(q, length(q, 0))[:, None]
            out = write.call(torch.ops.aten.index_put.default, out, [sequence, None, index], final.transpose(1, 2))
    return out


def stream_tiles(dtype: torch.dtype, dim: int, window: int) -> Tiles:
    """Tiles of the streaming rows. Narrow windows want small ones: a block of rows reads its own height beside them."""
    tiles = last_tiles(dtype, dim, 1 << 16)
    if dtype.itemsize == 2 and dim <= 128 and window < 128:
        return Tiles(64, 64, 4, 3)
    return tiles


def last_tiles(dtype: torch.dtype, dim: int, count: int) -> Tiles:
    """Tiles of ``count`` rows that read many keys: Inductor's own choice for an H100 at these sizes.

    Its table knows three head dims and falls back to tiles that need not fit into shared memory; the template rounds
    head dims up to these three, and so does this.
    """
    wide, narrow = dtype.itemsize == 4, dtype.itemsize == 2
    if dim <= 64:
        tiles = Tiles(128, 32, 4, 3) if wide else Tiles(128, 64, 4, 3)
    elif dim <= 128:
        tiles = Tiles(32, 64, 4, 3) if wide else Tiles(128, 64, 8, 3)
    else:
        tiles = Tiles(32, 32, 4, 2) if wide else Tiles(64, 32, 4, 3)
    return Tiles(64, 64, 4, 3) if narrow and dim <= 128 and count <= 64 else tiles


def close_keys(x: Any) -> Any:
    """Keys or values, copied together where the template's 32-bit offsets might not span them."""
    tensor = example(x)
    stride = tensor.stride(2)
    close = isinstance(stride, int) and stride <= _CLOSE and not isinstance(tensor.shape[2], int)
    return x if close or statically_known_true(tensor.shape[2] * stride < _OFFSETS) else x.contiguous()


def _options(tiles: Tiles, *, logsumexp: bool) -> dict[str, Any]:
    return {
        # Never flex-decoding, which takes calls of under 128 rows and then only some of them.
        "FORCE_USE_FLEX_ATTENTION": True,
        "OUTPUT_LOGSUMEXP": logsumexp,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _streaming(
    write: Writer, qkv: list[Any], valid: Any, where: rows.Extent, geometry: Geometry, scale: float
) -> Proxy:
    q, k, v = qkv
    q_len, kv_len = length(q, 2), length(k, 2)
    offset = first_position(q, k)
    tiles = stream_tiles(example(q).dtype, max(length(q, 3), length(v, 3)), geometry.window)
    padded = valid is not None
    plan = streaming_plan(q, q_len, kv_len, where, padded, geometry, tiles)
    buffers: tuple[Any, ...] = ()
    if padded:
        buffers += (valid, stored(where.start[:, 0].to(torch.int32)))
    if isinstance(offset, Proxy):
        buffers += (stored((arange(q, 1) + offset).to(torch.int32)),)
    constant = None if isinstance(offset, Proxy) else offset
    mask = _streaming_mask(padded, constant, geometry)
    options = _options(tiles, logsumexp=False)
    flex = flex_call(write, qkv, (q_len, kv_len), plan, mask, buffers, scale, options)
    out: Proxy = write.call(operator.getitem, flex, 0)
    return out


def _last(
    write: Writer, qkv: list[Any], valid: Any, where: rows.Extent, geometry: Geometry, scale: float
) -> tuple[Any, Any, Any]:
    """Attention of the last rows over all keys in reach, (B, H, last, Dv), their row numbers and positions.

    The row numbers are (last,), or (B, last) with padding; positions are those of :func:`_choose`. The query heads of a
    key head are rows of one head here, so that its keys are read once for all of them.
    """
    q, k, v = qkv
    last, reach = geometry.last, geometry.reach
    batch, heads, kv_heads, dim, v_dim = length(q, 0), length(q, 1), length(k, 1), length(q, 3), length(v, 3)
    chosen, index, position = _choose(q, k, where, last, padded=valid is not None)
    count = heads // kv_heads * last
    tiles = last_tiles(example(q).dtype, max(dim, v_dim), count)
    blocks = -(-count // tiles.rows)
    height = blocks * tiles.rows
    copies = _copies(blocks * kv_heads * (batch if isinstance(batch, int) else 1))
    packed = F.pad(chosen.reshape(batch, kv_heads, count, dim), (0, 0, 0, height - count))
    query = packed[:, :, None].expand(-1, -1, copies, -1, -1).reshape(batch, kv_heads, copies * height, dim)
    # -1 for a row that attends to nothing.
    lines = 1 if valid is None else batch
    places = position[:, None].expand(-1, heads // kv_heads, -1).reshape(lines, count)
    places = F.pad(places, (0, height - count), value=-1)
    # Without padding one line of numbers: an index into one dimension has to be all tensors.
    shape = (copies * height,) if valid is None else (batch, copies * height)
    places = places[:, None].expand(-1, copies, -1).reshape(shape).to(torch.int32)
    first, final = span(q, k, where, last, padded=valid is not None)
    kv_len = length(k, 2)
    plan = last_plan(q, kv_len, where, valid is not None, first, final, reach, copies, blocks, tiles)
    mask = _last_mask(valid is not None, reach)
    buffers = (stored(places),) if valid is None else (stored(places), valid)
    options = _options(tiles, logsumexp=copies > 1)
    flex = flex_call(write, [query, k, v], (copies * height, kv_len), plan, mask, buffers, scale, options)
    out: Any = write.call(operator.getitem, flex, 0)
    if copies > 1:
        out = out.reshape(batch, kv_heads, copies, height, v_dim)
        out = _merge(out, write.call(operator.getitem, flex, 1).reshape(batch, kv_heads, copies, height))
    out = out[:, :, :count].reshape(batch, heads, last, v_dim)
    return out.to(example(q).dtype), index, position


def _choose(q: Any, k: Any, where: rows.Extent, last: int, *, padded: bool) -> tuple[Any, Any, Any]:
    """The last rows of q (B, H, last, D), their row numbers, and their positions (B or 1, last), -1 outside.

    A row number below 0 becomes 0, and the row stands for row 0 in every way, so that writing it there is right: where
    that happens, row 0 is a last row itself or lies outside its sequence.
    """
    q_len = length(q, 2)
    offset = first_position(q, k)
    if isinstance(q_len, int) and last == q_len:
        index = arange(q, last)
        position = (index + offset)[None]
        index = index[None].expand(length(q, 0), -1) if padded else index
        chosen = q
    elif not padded:
        index = (arange(q, last) + (q_len - last)).clamp(min=0)
        position = (index + offset)[None]
        fits = statically_known_true(symbol(q_len) >= last)
        chosen = q[:, :, q_len - last :] if fits else q.index_select(2, index)
    else:
        index = (where.end - last + arange(q, last)[None] - offset).clamp(min=0, max=q_len - 1)
        position = index + offset
        chosen = q.gather(2, index[:, None, :, None].expand(-1, length(q, 1), -1, length(q, 3)))
    if padded:
        position = torch.where((position >= where.start) & (position < where.end), position, -1)
    return chosen, index, position


def span(q: Any, k: Any, where: rows.Extent, last: int, *, padded: bool) -> tuple[Any, Any]:
    """Lowest and highest position of the last rows, (B or 1, 1, 1, 1)."""
    kv_len = length(k, 2)
    zero = arange(q, 1)[:, None, None, None]
    offset = zero + first_position(q, k)
    if not padded:
        return torch.maximum(zero + (kv_len - last), offset), zero + (kv_len - 1)
    start, end = where.start[:, :, None, None], where.end[:, :, None, None]
    q_len = length(q, 2)
    everything = isinstance(q_len, int) and last == q_len
    first = offset if everything else torch.maximum(end - last, offset)
    return torch.maximum(first, start), end - 1


def _copies(programs: int) -> int:
    """How often to write out the last rows, a power of two, where one copy is ``programs`` programs."""
    copies = 1
    while copies < _MAX_COPIES and copies * programs < _PROGRAMS:
        copies *= 2
    return copies


def _merge(out: Any, lse: Any) -> Any:
    """Join results over parts of the keys, (B, h, copies, R, Dv) and base-2 log-sum-exps, into (B, h, R, Dv) float32.

    A part without keys has the log-sum-exp -inf and counts for nothing; rows without any keys are 0.
    """
    top = lse.amax(2, keepdim=True)
    weight = torch.exp2(lse - torch.where(top == float("-inf"), 0.0, top))
    total = weight.sum(2)
    summed = (out.to(torch.float32) * weight[..., None]).sum(2)
    return summed / torch.where(total == 0.0, 1.0, total)[..., None]


def _streaming_mask(padded: bool, offset: int | None, geometry: Geometry) -> GraphModule:
    """The streaming part of the mask, a graph of (batch, head, row, key) and valid, start, end, offset as there are."""
    graph = Graph()
    placeholder = placeholders(graph)
    b, _, row, key = map(placeholder, ("b", "h", "row", "key"))
    start: Any = 0
    inside: Any = None
    if padded:
        valid, starts = map(placeholder, ("valid", "start"))
        start, inside = starts[b], valid[b, key] != 0
    position = row + (placeholder("offset")[0] if offset is None else offset)
    allowed = formula.causal(position, key) & formula.streamed(position, key, start, geometry)
    allowed = formula.within(allowed, position, key, geometry.reach)
    if padded:
        allowed = allowed & inside
    graph.output(allowed.node)
    return GraphModule({}, graph)


def _last_mask(padded: bool, reach: int | None) -> GraphModule:
    """Causality of rows whose positions are a buffer, a graph of (batch, head, row, key), positions and valid."""
    graph = Graph()
    placeholder = placeholders(graph)
    b, _, row, key, positions = map(placeholder, ("b", "h", "row", "key", "positions"))
    position = positions[b, row] if padded else positions[row]
    allowed = formula.within(formula.causal(position, key), position, key, reach)
    if padded:
        allowed = allowed & (placeholder("valid")[b, key] != 0)
    graph.output(allowed.node)
    return GraphModule({}, graph)
