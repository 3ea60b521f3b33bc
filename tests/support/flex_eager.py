"""FlexAttention as the CUDA template computes it, in eager PyTorch: the listed blocks and no others.

What torch runs in eager mode ignores the block plan. Here the plan decides, is read from memory as the template reads
it, and is held to what the template takes for granted: no block twice, none out of range, no list longer than its row.
"""

import math

import torch
from torch._higher_order_ops.flex_attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from tmx_compile.lowering.flex import cuda as flex_cuda


def entries(block_mask):
    """The parts of a flattened block mask that the forward template reads; torch 2.11 and 2.13 differ between them."""
    ones = torch.ones(1, 1, 1, dtype=torch.int32)
    like = BlockMask.from_kv_blocks(ones, ones[..., None] - 1, BLOCK_SIZE=1, compute_q_blocks=False).as_tuple()
    assert len(block_mask) == len(like)
    assert all(entry is None for entry in block_mask[6:-3])
    return block_mask[:6], block_mask[-3:]


def as_read(tensor, sequence, head, *place):
    """An element of a plan where the template looks for it: by the strides of its last dimensions alone."""
    heads = tensor.shape[1]
    line = (sequence % tensor.shape[0]) * heads + head % heads
    steps = (*tensor.stride()[2:-1], 1)
    offset = line * tensor.stride(1) + sum(at * step for at, step in zip(place, steps, strict=True))
    return int(torch.as_strided(tensor, (), (), tensor.storage_offset() + offset))


def listed(counts, indices, sequence, head, row_block, key_blocks):
    """The key blocks of one block of rows."""
    width = indices.shape[-1]
    assert counts.dtype == indices.dtype == torch.int32
    assert counts.shape == indices.shape[:-1]
    assert width > 0
    count = as_read(counts, sequence, head, row_block)
    assert 0 <= count <= width, f"{count} blocks in a row of {width}"
    found = [as_read(indices, sequence, head, row_block, column) for column in range(count)]
    # The template reads the first entry of every row.
    for block in (*found, as_read(indices, sequence, head, row_block, 0)):
        assert 0 <= block < key_blocks, f"block {block} of {key_blocks}"
    return found


def flex_eager(q, k, v, score_mod, block_mask, scale, options, score_buffers=(), mask_buffers=()):
    """out (B, H, Sq, Dv), base-2 log-sum-exp and maximum (B, H, Sq) float32, as the higher-order call returns them."""
    (q_len, kv_len, counts, indices, full_counts, full_indices), (rows, keys, mask_mod) = entries(block_mask)
    assert (q_len, kv_len) == (q.shape[2], k.shape[2])
    assert min(q_len, q.shape[3], v.shape[3]) > 0
    assert q.shape[3] >= 16, "the template takes no smaller head dim"
    assert v.shape[3] >= 16, "the template takes no smaller value dim"
    assert options["FORCE_USE_FLEX_ATTENTION"], "or calls of under 128 rows go elsewhere"
    assert rows % options["BLOCK_M"] == 0
    assert keys % options["BLOCK_N"] == 0
    if full_counts is not None:
        # torch 2.11 reads the full blocks with the strides of the others.
        assert full_counts.shape == counts.shape
        assert full_indices.shape == indices.shape
        assert full_indices.stride() == indices.stride()
    batch, heads = q.shape[:2]
    key_blocks = -(-kv_len // keys)
    partial = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    full = torch.zeros_like(partial)
    assert counts.shape[2] * rows >= q_len
    for sequence in range(batch):
        for head in range(heads):
            for row_block in range(-(-q_len // rows)):
                own = slice(row_block * rows, (row_block + 1) * rows)
                blocks = listed(counts, indices, sequence, head, row_block, key_blocks)
                whole = []
                if full_counts is not None:
                    whole = listed(full_counts, full_indices, sequence, head, row_block, key_blocks)
                assert len(set(blocks + whole)) == len(blocks) + len(whole), "a block listed twice counts twice"
                for target, some in ((partial, blocks), (full, whole)):
                    for block in some:
                        target[sequence, head, own, block * keys : (block + 1) * keys] = True
    b, h = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    row, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    places = [x.to(torch.int32) for x in (b, h, row, key)]
    for buffer in mask_buffers:
        assert buffer.is_contiguous()
    group = heads // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = score_mod(q.float() @ k.transpose(2, 3) * scale, *places, *score_buffers)
    scores = scores.masked_fill(~(full | (partial & mask_mod(*places, *mask_buffers))), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse)[..., None])
    if not options["OUTPUT_LOGSUMEXP"]:
        # The template leaves it unwritten.
        lse = torch.full_like(lse, float("nan"))
    out = (weights @ v).to(q.dtype)
    # In memory, the result's dimensions have the order of the query's.
    order = sorted(range(3), key=lambda dim: (-q.stride(dim), dim))
    memory = out.permute(*order, 3).contiguous()
    out = memory.permute(*(order.index(dim) for dim in range(3)), 3)
    return out, lse / math.log(2), torch.full_like(lse, float("nan"))


class CudaFlexInEager:
    """The CUDA emission of ``flex``, run on CPU tensors with :func:`flex_eager` as the higher-order call."""

    name = "flex-cuda"

    def supports(self, call):
        return flex_cuda.supports(call)

    def inductor_options(self, call):
        return {}

    def emit(self, write, call, operands):
        out = flex_cuda.emit(write, call, operands)
        for node in write.gm.graph.nodes:
            if node.target is flex_attention:
                node.target = flex_eager
        return out
