"""The stand-in for compiled FlexAttention: it agrees with torch, is strict, and reads plans as the template does."""

import math

import pytest
import torch
from torch._higher_order_ops.flex_attention import flex_attention

from tests.support.flex_eager import as_read, flex_eager
from tests.support.problems import CASES
from tmx_compile.lowering import rows
from tmx_compile.lowering.flex.call import KeyBlocks
from tmx_compile.lowering.flex.plan import Tiles, streaming_plan
from tmx_compile.mask.geometry import Geometry


def everything(n, block):
    """A plan that lists all blocks."""
    blocks = -(-n // block)
    counts = torch.full((1, 1, blocks), blocks, dtype=torch.int32)
    return counts, torch.arange(blocks, dtype=torch.int32).expand(1, 1, blocks, blocks).contiguous()


def run_stand_in(counts, indices, full_counts=None, full_indices=None, block=16):
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    plan = BlockMask.from_kv_blocks(*everything(40, block), BLOCK_SIZE=block, compute_q_blocks=False).as_tuple()
    lists = (counts, indices, full_counts, full_indices)

    def causal(b, h, row, key):
        return key <= row

    block_mask = (40, 40, *lists, *plan[6:-3], block, block, causal)
    options = {"FORCE_USE_FLEX_ATTENTION": True, "OUTPUT_LOGSUMEXP": True, "BLOCK_M": block, "BLOCK_N": block}
    arguments = (q, k, v, lambda score, *_: score, block_mask, 0.25, options)
    return flex_eager(*arguments)[:2], arguments


def test_the_stand_in_agrees_with_torch():
    """Also on the base of the log-sum-exp, 2, which the public function converts."""
    (out, lse), arguments = run_stand_in(*everything(40, 16))
    want, want_lse, _ = flex_attention(*arguments)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    q, k = arguments[0], arguments[1].repeat_interleave(2, 1)
    scores = (q @ k.transpose(2, 3) * 0.25).masked_fill(~torch.ones(40, 40).tril().bool(), float("-inf"))
    torch.testing.assert_close(lse * math.log(2), torch.logsumexp(scores, -1))


@pytest.mark.parametrize("fault", ["twice", "out of range", "negative", "too many", "full as well", "narrow"])
def test_the_stand_in_is_strict(fault):
    counts, indices = everything(40, 16)
    full = (None, None)
    message = ""
    if fault == "twice":
        indices[0, 0, 1, 2], message = 0, "twice"
    elif fault == "out of range":
        indices[0, 0, 1, 2], message = 3, "block 3 of 3"
    elif fault == "negative":
        indices[0, 0, 1, 2], message = -1, "block -1 of 3"
    elif fault == "too many":
        counts[0, 0, 1], message = 4, "4 blocks in a row of 3"
    elif fault == "full as well":
        full = (torch.ones_like(counts), indices.clone())
        message = "twice"
    elif fault == "narrow":
        # As wide in its strides as before, but two columns.
        counts, indices, message = counts.clone(), indices[..., :2], "3 blocks in a row of 2"
    with pytest.raises(AssertionError, match=message):
        run_stand_in(counts, indices, *full)


def test_the_stand_in_reads_plans_as_the_template_does():
    """The stride of a dimension of size 1 matters: 0 there reads the first sequence's plan for all."""
    case = CASES["left padding"]
    *qkv, key_mask = case.tensors()
    where = rows.extent(key_mask, case.kv_len)
    tile = Tiles(64, 64, 4, 3)
    plan = streaming_plan(qkv[0], 200, 200, where, True, Geometry(4, 20, 0), tile)
    flat = KeyBlocks(64, 64, torch.as_strided(plan.counts, plan.counts.shape, (plan.counts.stride(0), 0, 1)), None)
    assert [as_read(plan.counts, b, 0, 0) for b in range(3)] == plan.counts[:, 0, 0].tolist()
    assert len({as_read(flat.counts, b, 0, 0) for b in range(3)}) == 1
    assert len(set(plan.counts[:, 0, 0].tolist())) > 1
